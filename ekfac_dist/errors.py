"""Every error that a user can cause or mend, each raised with one whole sentence.

A message says what was wrong, what was given and what would do. The command line prints it without
a traceback and exits with status 2. Anything that is not a `UserError` is a defect of this package
and keeps its traceback.
"""


class UserError(Exception):
    """A fault that the user can mend; its text is a sentence meant for them."""

    mendable = True


class ConfigError(UserError, ValueError):
    """A configuration or argument that cannot be what was meant."""


class ModelError(UserError):
    """A model that cannot be loaded, or whose MLP modules cannot be tracked."""


class DataError(UserError):
    """Data that cannot be read, or that holds nothing to learn from."""


class OutputError(UserError):
    """An output path that cannot be written, or that holds something else."""


class StoreError(UserError):
    """A factor store that is missing, incomplete, damaged or of another model."""


class NonFiniteError(UserError):
    """NaN or infinity in an activation, a gradient or a factor."""


class DecompositionError(UserError):
    """A factor that no attempt could decompose to the required accuracy."""


class LaunchError(UserError):
    """Workers that were not started as the launcher's settings say."""


class PeerError(UserError):
    """Another worker failed, and this one ends with it.

    Args:
        message: Which worker, and the cause where it is known.
        mendable: Whether the cause is one that the user can mend; not so for a defect or a worker
            that was lost.
    """

    def __init__(self, message: str, *, mendable: bool = False) -> None:
        super().__init__(message)
        self.mendable = mendable


def first_line(error: BaseException) -> str:
    """The first line of another library's error, without its full stop, to be quoted in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
