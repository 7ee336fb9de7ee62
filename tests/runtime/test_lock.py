"""A directory is one run's for as long as the run lives, and not longer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ekfac_dist.errors import OutputError
from ekfac_dist.runtime.lock import LOCK, DirectoryLock, require_unlocked

HOLDS = """
import sys, time
from pathlib import Path
from ekfac_dist.runtime.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_refused_and_told_who_holds_it(tmp_path: Path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        for refused in (DirectoryLock, require_unlocked):
            with pytest.raises(OutputError, match=rf"another run .process {owner.pid} on .*wait"):
                refused(tmp_path)
        owner.send_signal(signal.SIGKILL)
    require_unlocked(tmp_path)
    lock = DirectoryLock(tmp_path)
    with pytest.raises(OutputError, match=rf"process {os.getpid()}"):
        DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_to_look_whether_a_directory_is_free_leaves_nothing(tmp_path: Path):
    require_unlocked(tmp_path)
    assert not list(tmp_path.iterdir())
    DirectoryLock(tmp_path).release()
    assert not list(tmp_path.iterdir())
