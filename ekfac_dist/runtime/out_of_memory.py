"""Memory that runs out, of a device or of the host, as a sentence that says what would do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ekfac_dist.errors import OutOfMemory, first_line

# How libraries say it that have no error of their own for it: the CPU's allocator, NCCL, cuBLAS.
_SAID = re.compile(
    r"DefaultCPUAllocator: .*|CUDA (failure|error)\b.*out of memory'?|CUBLAS_STATUS_ALLOC_FAILED.*",
    re.IGNORECASE,
)
_SENTENCES = 3  # of torch's own message, the first of which say how much was asked for and is free

_ADVICE = (
    "Give a smaller batch_tokens, or have layers computed again with gradient_checkpointing; for a "
    "fit also more partitions, or more workers that share out the factors (shard); for a query a "
    "smaller query_memory_gb."
)


def shortage(error: BaseException) -> OutOfMemory | None:
    """The error for the user if another error means that memory ran out; else None.

    Args:
        error: Any error.
    """
    if isinstance(error, OutOfMemory):
        return error
    message = first_line(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        said = _SAID.search(str(error)) if isinstance(error, RuntimeError) else None
        if said is None:
            return None
        message = said[0]
    message = ". ".join(message.split(". ")[:_SENTENCES]).rstrip(".")
    return OutOfMemory(f"Memory ran out ({message}). {_ADVICE}")


@contextmanager
def saying_what_would_do() -> Iterator[None]:
    """Context in which memory that runs out becomes an `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        for_user = shortage(error)
        if for_user is None:
            raise
        raise for_user from error
