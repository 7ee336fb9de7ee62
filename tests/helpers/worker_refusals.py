"""A worker that is given one bad run after another, and notes how each ends.

    worker_refusals.py RUNS OUTPUT

RUNS is a JSON file: a list of command lines, or of lists of one for each worker. OUTPUT is a
directory; worker r writes to `r.json` there a list with the exit status and the standard error of
each run.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from ekfac_dist import cli


def end(status: int) -> NoReturn:
    """Ends a run, and not the worker."""
    raise SystemExit(status)


def main(runs: Path, output: Path) -> None:
    cli._leave = end
    ends = []
    for arguments in json.loads(runs.read_text()):
        if isinstance(arguments[0], list):
            arguments = arguments[int(os.environ["RANK"])]
        said, status = io.StringIO(), None
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                status = cli.main(arguments)
            except SystemExit as ended:
                status = ended.code
            except Exception:
                traceback.print_exc()
        ends.append([status, said.getvalue()])
        (output / f"{os.environ['RANK']}.json").write_text(
            json.dumps(ends)
        )  # even if it hangs next


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
