"""Workers wait for one that is slow for as long as it lives, whatever time a collective has."""

from pathlib import Path

import pytest
from helpers.long_runs import content
from helpers.workshop import run_workers
from worker_slow import FITS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of each fit, with one worker slow and with none."""
    root = tmp_path_factory.mktemp("waits")
    done = run_workers(HERE / "worker_slow.py", 2, root, timeout=180)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_a_worker_that_is_longer_at_work_than_a_collective_may_last_changes_nothing(
    name: str, stores: Path
):
    assert content(stores / name / "slow") == content(stores / name / "usual")
