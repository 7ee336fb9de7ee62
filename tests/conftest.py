"""What every test needs before anything heavy is imported."""

import atexit
import gc
import os
import shutil
import tempfile

gc.disable()  # imports make what lives as long as the session; see the end of collection below

# Nothing is looked up on a hub, and no cache outlives the session or is shared with the user's own.
_caches = tempfile.mkdtemp(prefix="ekfac_dist-tests-")
atexit.register(shutil.rmtree, _caches, ignore_errors=True)
os.environ.update(
    HF_HOME=_caches,
    HF_DATASETS_CACHE=os.path.join(_caches, "datasets"),
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers.refusals")

import torch  # noqa: E402 - only now that the caches are set

torch.set_num_threads(1)  # as in the workers; the matrices are too small to be shared out

from hypothesis import HealthCheck, settings  # noqa: E402

# A slow machine is no failure. In CI the same examples come each time; elsewhere new ones do.
settings.register_profile(
    "here",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("here")


def pytest_collection_finish():
    """Lets the collector look through what tests make alone, and not through what imports made."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def browser():
    """Chromium, for tests that are marked so."""
    from helpers.browser import ARGUMENTS, CHROMIUM

    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()
