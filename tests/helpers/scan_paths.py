"""The ways in which a scan computes the scores of sequences, each forced."""

from ekfac_dist.curvature import costs
from ekfac_dist.influence.preconditioned import LowRankGradients, WholeGradients

# Whether by position; None: as costs say.
PATHS = {"as costs say": None, "by position": True, "by sequence": False}


def force_path(monkeypatch, path, tile_bytes=1000, rows=3):
    """Makes scans take one of `PATHS`, in tiles of so many bytes.

    Args:
        monkeypatch: The fixture.
        path: The path's name.
        tile_bytes: Bytes of a tile, or of the position scores that are computed at a time.
        rows: Rows of a tile at least.
    """
    if (chosen := PATHS[path]) is not None:
        for kind in (WholeGradients, LowRankGradients):
            monkeypatch.setattr(kind, "by_position", lambda *given: chosen)
    monkeypatch.setattr(costs, "MIN_TILE_ROWS", rows)
    monkeypatch.setattr(costs, "TILE_BYTES", {True: tile_bytes, False: tile_bytes})
