"""Files of scores: what they were computed from, and how long that took."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ekfac_dist.factors.directory import make_folders
from ekfac_dist.runtime.files import safetensors_parts, write_whole


def stored_scores(file: Path, of: str) -> np.ndarray | None:
    """The scores in a file, if they are of what they should be of."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as opened:
            if (opened.metadata() or {}).get("of") != of:
                return None
            return opened.get_tensor("scores")
    except (OSError, SafetensorError):
        return None


def store_scores(file: Path, scores: np.ndarray, of: str, seconds: float) -> None:
    """Writes scores.

    Args:
        file: The file; its folder is made.
        scores: Scores [query groups, sequences].
        of: A digest of what they were computed from.
        seconds: How long that took.

    Raises:
        OutputError: If it cannot be written.
    """
    make_folders(file.parent)
    header = {"of": of, "seconds": f"{seconds:.3f}"}
    write_whole(file, safetensors_parts({"scores": torch.from_numpy(scores)}, header))


def seconds_in(file: Path) -> float | None:
    """How long the scores of a file took; None if it does not say so."""
    try:
        with safe_open(file, framework="np") as opened:
            return float((opened.metadata() or {})["seconds"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
