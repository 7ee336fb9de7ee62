"""Hosts that are network namespaces of this machine. They need root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> None:
    """Runs `ip`."""
    subprocess.run(["ip", *words], check=True)


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that see each other by `veth`, and nothing else."""
    names = [f"ekfac{os.getpid()}{k}" for k in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [f"veth netns {name}".split() for name in names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth")
            ip("-n", name, "link", "set", "veth", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)
