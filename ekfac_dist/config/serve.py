"""The configuration of `serve`."""

import dataclasses
import ipaddress
import math
import os
from dataclasses import dataclass, field
from typing import Any

from ekfac_dist.config.checks import require_given, require_positive
from ekfac_dist.config.query import DampingConfig, QueryDataConfig, QueryModelConfig
from ekfac_dist.errors import ConfigError

TOKEN_VARIABLE = "EKFAC_DIST_TOKEN"


@dataclass(kw_only=True)
class ServeConfig:
    """A whole run of `serve`.

    Args:
        factors: Directory of the factor store.
        index: Directory of the index of the training data, which belongs to these factors.
        model: Which model; by default the one that the factors were fitted for.
        data: Which training sequences; by default those of the index.
        damping: The damping λ of a question that gives none.
        batch_tokens: Most tokens in a worker's step, padding included; on a CPU at most 1024 a
            thread.
        host: Address or name to listen at. Any but a loopback one needs a token.
        port: Port to listen at; 0: one that is free.
        token: What every request must carry (Authorization, Bearer); null: what the environment
            variable EKFAC_DIST_TOKEN holds, which other users of the machine cannot see, or none.
        queue_length: Most questions that wait; further ones get status 429.
        max_prompt_characters: Most characters of a question's texts together.
        max_top_k: Most sequences in either list of an answer, and most that are scored exactly at
            either end of the ranking.
        max_completion_tokens: Most tokens that the model goes on for.
        drain_seconds: How long after SIGTERM, or Ctrl-C, questions are still answered. A launcher
            kills its workers after 30 seconds.
    """

    factors: str | None = None
    index: str | None = None
    model: QueryModelConfig = field(default_factory=QueryModelConfig)
    data: QueryDataConfig = field(default_factory=QueryDataConfig)
    damping: DampingConfig = field(default_factory=DampingConfig)
    batch_tokens: int = 4096
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    queue_length: int = 32
    max_prompt_characters: int = 20_000
    max_top_k: int = 100
    max_completion_tokens: int = 256
    drain_seconds: float = 20.0

    def __post_init__(self) -> None:
        require_given({name: getattr(self, name) for name in ("factors", "index")})
        for name in ("factors", "index"):
            setattr(self, name, os.path.expanduser(getattr(self, name)))
        for name in (
            "batch_tokens",
            "queue_length",
            "max_prompt_characters",
            "max_top_k",
            "max_completion_tokens",
        ):
            require_positive(name, getattr(self, name))
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port is {self.port}; it must be from 0 to 65535.")
        if not 0 <= self.drain_seconds < math.inf:
            raise ConfigError(
                f"drain_seconds is {self.drain_seconds}; it must be a finite number of 0 or more."
            )
        require_given({"host": self.host})
        if self.token is None:
            self.token = os.environ.get(TOKEN_VARIABLE)
        self._check_token()

    def _check_token(self) -> None:
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError("token has characters other than ASCII's printable ones.")
        if self.token is not None and (not self.token or " " in self.token):
            raise ConfigError(
                "token is empty, or has a space in it; give a long random word, such as `openssl "
                "rand -hex 16` prints."
            )
        if self.token is None and not is_loopback(self.host):
            raise ConfigError(
                f"host is {self.host}, which other machines can reach, so a token is needed: set "
                f"{TOKEN_VARIABLE} in the environment or give --token, or leave host at 127.0.0.1."
            )

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as plain nested dictionaries, without the token itself."""
        shown = dataclasses.asdict(self)
        return shown | {"token": None if self.token is None else "given"}


def is_loopback(host: str) -> bool:
    """Whether a name or an address is one that only this machine reaches.

    Args:
        host: "localhost" or an address; another name could stand for any address.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
