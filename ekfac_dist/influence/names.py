"""Errors about a model or data that a manifest names, rather than the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ekfac_dist.errors import DataError, ModelError


@contextmanager
def named_by(store: str, field: str, name: str | None, given: str | None) -> Iterator[None]:
    """Adds to errors about a name that was not given that it comes from the factors' manifest.

    Args:
        store: Directory of the factor store.
        field: The configuration field that overrides the name.
        name: The name of the model or the source of the data, as in the manifest.
        given: The field's value in this run's configuration; None: the manifest's name is used.
    """
    try:
        yield
    except (DataError, ModelError) as error:
        if given is None and not Path(str(name)).exists():
            error.args = (
                f"{error} It is what the factors in {store} were fitted with, perhaps in another "
                f"directory; give --{field}.",
            )
        raise
