"""Fits of tiny models that are killed at any flush to the disk, and what they then hold."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ekfac_dist import estimate_factors, load_factors
from ekfac_dist.errors import StoreError
from ekfac_dist.factors.layout import MANIFEST
from ekfac_dist.runtime.journal import JOURNAL
from helpers.families import tiny_model
from helpers.networks import CONFIGS, build, examples

FITS = {
    "in groups and blocks": {"partitions": 2, "blocks": 2},
    "K-FAC, sums not kept": {"refit": "none", "keep_covariance": False},
    "sums not kept": {"keep_covariance": False, "accumulate": "float64"},
    "experts that nothing reached": {"family": "MixtralForCausalLM", "number": 2},
}


class Killed(BaseException):
    """What no part of the package expects."""


def fit(output: Path, *, family: str = "llama", seed: int = 0, number: int = 9, **settings):
    data = examples(number, prompts=True)
    settings = {"batch_tokens": 16, "save_minutes": 0, **settings}
    model = build(family, seed) if family in CONFIGS else tiny_model(family, seed)
    return estimate_factors(model, data, output=output, **settings)


def content(store: Path) -> dict[str, bytes]:
    """Every file's bytes; of the manifest, what does not tell the time."""
    found = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    manifest = json.loads(found.pop(MANIFEST))
    for told in manifest["passes"].values():
        del told["seconds"]
    del manifest["checksum"]
    manifest["config"].pop("output")
    manifest["config"].pop("save_minutes")
    return found | {MANIFEST: json.dumps(manifest).encode()}


def killed_in(flush: int, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether something came as far as that flush to the disk, where it was killed."""
    done, fsync = 0, os.fsync

    def count(file: int) -> None:
        nonlocal done
        done += 1
        if done >= flush:  # nothing reaches the disk any more, from no thread
            raise Killed
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", count)
        try:
            run()
        except Killed:
            return True
    return False


def killed_at(flush: int, output: Path, monkeypatch: pytest.MonkeyPatch, **settings) -> bool:
    """Whether a fit came as far as that flush to the disk, where it was killed."""
    return killed_in(flush, lambda: fit(output, **settings), monkeypatch)


def ends_with_the_same_bytes(
    name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills it at every so many'th flush to the disk."""
    fit(tmp_path / "whole", **FITS[name])
    wanted = content(tmp_path / "whole")
    flush, store = 1, tmp_path / "killed"
    while killed_at(flush, store, monkeypatch, **FITS[name]):
        if not is_complete(store):  # killed once more, a little later, before it is left to end
            killed_at(flush + 3, store, monkeypatch, **FITS[name])
        if is_complete(store):
            (store / JOURNAL).unlink(missing_ok=True)  # all that was still to be done
        else:
            fit(store, **FITS[name])
        assert content(store) == wanted, f"killed at flush {flush}"
        shutil.rmtree(store)
        flush += step
    assert flush > 30


def is_complete(store: Path) -> bool:
    try:
        load_factors(store)
    except StoreError:
        return False
    return True


def content_of_unfinished(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
