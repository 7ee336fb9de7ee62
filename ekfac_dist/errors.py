"""Every error that a user can cause or fix.

A message is a whole sentence that says what was wrong, what was given and what would work. The
command line prints it without a traceback and exits with the error's status. Anything that is not a
`UserError` is a defect of this package and keeps its traceback.
"""

# Exit statuses of a program: for a fault that the user can fix, and for a defect.
MENDABLE = 2
DEFECT = 1


class UserError(Exception):
    """A fault that the user can fix; its message is a sentence meant for them.

    Attributes:
        status: The exit status of a program that ends with it.
    """

    status = MENDABLE


class ConfigError(UserError, ValueError):
    """A configuration or argument with an impossible value."""


class ModelError(UserError):
    """A model that cannot be loaded, or whose MLP modules cannot be tracked."""


class DataError(UserError):
    """Data that cannot be read, or that has no usable sequence."""


class OutputError(UserError):
    """An output path that cannot be written, or that holds something else."""


class StoreError(UserError):
    """A directory of factors or results that is missing, incomplete, damaged or does not fit."""


class NonFiniteError(UserError):
    """NaN or infinity in an activation, a gradient, a loss or a factor."""


class DecompositionError(UserError):
    """A factor that no attempt could decompose to the required accuracy."""


class OutOfMemory(UserError):
    """Memory of a device or of a host that ran out."""


class LaunchError(UserError):
    """Workers that were not started as the launcher's settings say, or not with equal settings."""


class PeerError(UserError):
    """Another worker failed, and this one ends with it.

    Args:
        message: Which worker failed, and why where that is known.
        status: The exit status of the failed worker; 1 for a defect or a lost worker.
    """

    def __init__(self, message: str, *, status: int = DEFECT) -> None:
        super().__init__(message)
        self.status = status


class Preempted(UserError):
    """A run that SIGTERM ended after its progress was stored, so that it can be resumed."""

    status = 128 + 15


def status_of(error: BaseException) -> int:
    """The exit status of a program that ends with an error."""
    return error.status if isinstance(error, UserError) else DEFECT


def first_line(error: BaseException) -> str:
    """First line of another library's error without its full stop, for quoting in a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
