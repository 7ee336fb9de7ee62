"""The output directory as each worker sees it, found out before the first pass.

Workers of several hosts may see different disks under one path. Worker 0 writes the store; those
that see its directory write their own files there. Saved states lie under each worker's own.
"""

import os
import uuid
from contextlib import suppress
from pathlib import Path

from ekfac_dist.errors import OutputError
from ekfac_dist.factors.directory import make_folders
from ekfac_dist.factors.layout import STATE
from ekfac_dist.runtime.files import write_whole
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.processes import World


def workers_that_write(output: str | Path, world: World, *, saves: bool) -> frozenset[int]:
    """Ranks of the workers that can write into the directory of worker 0's store; a collective.

    Worker 0 writes a file with a random name, which the others look for. Which workers see another
    disk is logged.

    Args:
        output: The store's directory, which exists on worker 0.
        world: The workers.
        saves: Whether each worker saves the states of passes, under its own `output`.

    Raises:
        OutputError: If a worker that is to save states cannot write; on every worker.
    """
    if world.size == 1:
        return frozenset({0})
    state, token = Path(output) / STATE, world.share(uuid.uuid4().hex)
    seen = state / f".seen-{token}.tmp"
    own = state / f".of-{world.rank}-{token}.tmp"
    sees = False
    try:
        with world.agree(takes_part=world.is_main):
            if world.is_main:
                _write_token(seen)
        with world.agree():
            sees = os.path.exists(seen)
            try:
                if saves or sees:
                    _write_token(own)
            except OutputError:
                if saves:
                    raise
                sees = False
        writers = frozenset(rank for rank, each in enumerate(world.gather(sees)) if each)
    finally:
        for path in (own, seen) if world.is_main else (own,):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds saved states, or was never made
            state.rmdir()
    others = [str(rank) for rank in range(world.size) if rank not in writers]
    if others:
        who = f"worker {others[0]} sees" if len(others) == 1 else f"workers {', '.join(others)} see"
        states = "; saved states stay on each one's own disk" if saves else ""
        log_on_main(
            world, f"other disks   {who} another disk than worker 0, which writes its store{states}"
        )
    return writers


def _write_token(path: Path) -> None:
    make_folders(path.parents[1], path.parent.name)
    write_whole(path, [path.name.encode()])
