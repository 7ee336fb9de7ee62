import pytest

from ekfac_dist.demo.corpus import corpus_rows


@pytest.fixture(scope="session")
def library_rows():
    """The rows of the running Python's own library."""
    return corpus_rows()
