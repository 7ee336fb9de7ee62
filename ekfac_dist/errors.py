"""Every error that a user can cause or mend, each raised with one whole sentence.

A message says what was wrong, what was given and what would do. The command line prints it without
a traceback and exits with the error's status. Anything that is not a `UserError` is a defect of
this package and keeps its traceback.
"""

MENDABLE = 2
DEFECT = 1


class UserError(Exception):
    """A fault that the user can mend; its text is a sentence meant for them.

    Attributes:
        status: The exit status of a program that it ends.
    """

    status = MENDABLE


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
        status: The cause's; 1 for a defect or a worker that was lost.
    """

    def __init__(self, message: str, *, status: int = DEFECT) -> None:
        super().__init__(message)
        self.status = status


class Preempted(UserError):
    """A run that SIGTERM ended, after what it had done was stored; it can go on."""

    status = 128 + 15


def status_of(error: BaseException) -> int:
    """The exit status of a program that an error ends."""
    return error.status if isinstance(error, UserError) else DEFECT


def first_line(error: BaseException) -> str:
    """The first line of another library's error, without its full stop, to be quoted in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
