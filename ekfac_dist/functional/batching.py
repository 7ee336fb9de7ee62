"""The arguments of `func`, cut into batches of examples."""

import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ekfac_dist.errors import ConfigError


@dataclass(frozen=True)
class Cuts:
    """How arguments are cut into batches.

    Attributes:
        in_dims: The dimension of each argument that runs over examples; None: it is not cut.
        batch_size: Examples of a batch. If no argument is cut, those of the one call of `func`.
        max_iter: Most batches; None for all.
    """

    in_dims: tuple[int | None, ...]
    batch_size: int
    max_iter: int | None

    @classmethod
    def of(
        cls,
        num_arguments: int,
        in_dims: int | Sequence[int | None] | None,
        batch_size: int,
        max_iter: int | None,
        uncut: int | None,
    ) -> "Cuts":
        """Checks how arguments shall be cut.

        Args:
            num_arguments: How many `func` takes.
            in_dims: As given; None cuts each along its first dimension.
            batch_size: As given.
            max_iter: As given.
            uncut: Number of the argument that holds flat parameters, never cut unless `in_dims`
                says so.

        Raises:
            ConfigError: One of them cannot be meant.
        """
        _require_whole("batch_size", batch_size)
        if max_iter is not None:
            _require_whole("max_iter", max_iter)
            max_iter = int(max_iter)
        if in_dims is None:
            dims = tuple(None if number == uncut else 0 for number in range(num_arguments))
        elif isinstance(in_dims, int):
            dims = (in_dims,) * num_arguments
        else:
            dims = tuple(in_dims)
        if len(dims) != num_arguments:
            raise ConfigError(
                f"in_dims has {len(dims)} entries and x has {num_arguments}; give one for each, "
                "None for what is not cut."
            )
        if not all(
            dim is None or (isinstance(dim, int) and not isinstance(dim, bool)) for dim in dims
        ):
            raise ConfigError(f"in_dims is {in_dims!r}; its entries must be whole numbers or None.")
        return cls(dims, int(batch_size), max_iter)

    @property
    def cuts_nothing(self) -> bool:
        """Whether `func` is called once, with everything."""
        return all(dim is None for dim in self.in_dims)

    def batches(self, x: Sequence[Any]) -> "Batches":
        """Arguments as batches.

        Args:
            x: The arguments.

        Raises:
            ConfigError: They have no such dimension, or unequal or no examples.
        """
        if len(x) != len(self.in_dims):
            raise ConfigError(
                f"x has {len(x)} entries and func was fitted with {len(self.in_dims)}; give them "
                "all, as one tuple."
            )
        sizes = {
            f"x[{number}] of shape {list(tensor.shape)} along dimension {dim}": tensor.shape[dim]
            for number, (tensor, dim) in enumerate(zip(x, self.in_dims, strict=True))
            if dim is not None and _has_dimension(number, tensor, dim)
        }
        if len(set(sizes.values())) > 1:
            counts = "; ".join(f"{what} has {size}" for what, size in sizes.items())
            raise ConfigError(
                f"x is of unequal numbers of examples: {counts}. Each must have as many, or None "
                "in in_dims if it is not to be cut."
            )
        num_examples = next(iter(sizes.values()), self.batch_size)
        if num_examples == 0:
            raise ConfigError(f"x has no examples: {next(iter(sizes))} has 0.")
        if self.max_iter is not None:
            num_examples = min(num_examples, self.max_iter * self.batch_size)
        return Batches(tuple(x), self.in_dims, self.batch_size, num_examples)


@dataclass(frozen=True)
class Batches:
    """Arguments of `func`, batch by batch.

    Attributes:
        x: All arguments.
        in_dims: As for `Cuts`.
        batch_size: As for `Cuts`.
        num_examples: N, examples in all batches.
    """

    x: tuple[Any, ...]
    in_dims: tuple[int | None, ...]
    batch_size: int
    num_examples: int

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], int]]:
        """Yields (arguments, number of examples) of every batch."""
        for start in range(0, self.num_examples, self.batch_size):
            size = min(self.batch_size, self.num_examples - start)
            arguments = tuple(
                value if dim is None else value.narrow(dim, start, size)
                for value, dim in zip(self.x, self.in_dims, strict=True)
            )
            yield arguments, size


def _require_whole(what: str, number: Any) -> None:
    if not isinstance(number, numbers.Integral) or isinstance(number, bool) or number < 1:
        raise ConfigError(f"{what} is {number!r}; it must be a whole number of 1 or more.")


def _has_dimension(number: int, value: Any, dim: int) -> bool:
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"x[{number}] is a {type(value).__name__}; only tensors can be cut into batches. Make "
            "it one (torch.as_tensor), or give None for it in in_dims if func is to have it whole."
        )
    if not -value.ndim <= dim < value.ndim:
        raise ConfigError(
            f"x[{number}] has shape {list(value.shape)} and no dimension {dim} to cut along; "
            "give another in in_dims, or None."
        )
    return True
