"""The factors of an evaluation: whether they are there, and of the settings that are asked for."""

from contextlib import suppress
from pathlib import Path

from ekfac_dist.config import EstimateConfig
from ekfac_dist.errors import OutputError, StoreError
from ekfac_dist.factors.reader import StoreReader
from ekfac_dist.runtime.resuming import require_same_config

# Settings of a fit that its factors do not depend on.
_MAY_CHANGE = ("output", "batch_tokens", "save_minutes", "factors.shard", "factors.eigen")
_OTHER_OUTPUT = "give another output directory"


def is_complete(store: Path) -> bool:
    """Whether a directory holds a finished store of factors."""
    with suppress(StoreError):
        StoreReader(store)
        return True
    return False


def require_same_factors(store: Path, config: EstimateConfig, data: str) -> None:
    """Refuses factors that were fitted with other settings, or to other sequences.

    Args:
        store: Their directory.
        config: The settings that they should have been fitted with.
        data: SHA-256 of the sequences.

    Raises:
        OutputError: If they were.
    """
    manifest = StoreReader(store).manifest
    # The model is compared by its weights, when it is used.
    may_change = [*_MAY_CHANGE, "model.name", "data.source"]
    require_same_config(
        store,
        manifest["config"],
        config.as_dict(),
        may_change=may_change,
        advice=_OTHER_OUTPUT,
    )
    if manifest["data"]["fingerprint"] != data:
        raise OutputError(f"{store} holds factors of other sequences; {_OTHER_OUTPUT}.")
