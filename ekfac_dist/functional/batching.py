"""The arguments of `func`, cut into batches of examples."""

import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ekfac_dist.errors import ConfigError


@dataclass(frozen=True)
class Batching:
    """How the arguments of `func` are cut into batches.

    Attributes:
        in_dims: Each argument's dimension over examples; None for an argument that is not cut.
        batch_size: Examples in a batch. If no argument is cut, the examples in the single call.
        max_iter: Largest number of batches; None for all.
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
    ) -> "Batching":
        """Checks and completes the user's settings.

        Args:
            num_arguments: Number of arguments of `func`.
            in_dims: Dimension of each argument, or one for all; None for the first of each.
            batch_size: As for the class.
            max_iter: As for the class.
            uncut: Index of the argument with the flat parameters, which is cut only if `in_dims`
                says so; None if there is none.

        Raises:
            ConfigError: If a number is not a whole number of 1 or more, or `in_dims` does not have
                one integer or None for each argument.
        """
        _require_positive_integer("batch_size", batch_size)
        if max_iter is not None:
            _require_positive_integer("max_iter", max_iter)
            max_iter = int(max_iter)
        if in_dims is None:
            dims = tuple(None if index == uncut else 0 for index in range(num_arguments))
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

    def batches(self, x: Sequence[Any]) -> "Batches":
        """Cuts arguments into batches.

        Args:
            x: The arguments of `func`.

        Raises:
            ConfigError: If there are too many or too few of them, one cannot be cut along its
                dimension, or they have unequal numbers of examples, or none.
        """
        if len(x) != len(self.in_dims):
            raise ConfigError(
                f"x has {len(x)} entries and func was fitted with {len(self.in_dims)}; give them "
                "all, as one tuple."
            )
        sizes = {
            f"x[{index}] of shape {list(tensor.shape)} along dimension {dim}": tensor.shape[dim]
            for index, (tensor, dim) in enumerate(zip(x, self.in_dims, strict=True))
            if dim is not None and _require_dimension(index, tensor, dim)
        }
        if len(set(sizes.values())) > 1:
            counts = "; ".join(f"{argument} has {size}" for argument, size in sizes.items())
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
    """The arguments of `func`, batch by batch.

    Attributes:
        x: All arguments.
        in_dims: As for `Batching`.
        batch_size: As for `Batching`.
        num_examples: N, the number of examples in all batches together.
    """

    x: tuple[Any, ...]
    in_dims: tuple[int | None, ...]
    batch_size: int
    num_examples: int

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], int]]:
        """Yields (arguments, number of examples) of each batch."""
        for start in range(0, self.num_examples, self.batch_size):
            size = min(self.batch_size, self.num_examples - start)
            arguments = tuple(
                value if dim is None else value.narrow(dim, start, size)
                for value, dim in zip(self.x, self.in_dims, strict=True)
            )
            yield arguments, size


def _require_positive_integer(name: str, number: Any) -> None:
    if not isinstance(number, numbers.Integral) or isinstance(number, bool) or number < 1:
        raise ConfigError(f"{name} is {number!r}; it must be a whole number of 1 or more.")


def _require_dimension(index: int, value: Any, dim: int) -> bool:
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"x[{index}] is a {type(value).__name__}; only tensors can be cut into batches. Make "
            "it one (torch.as_tensor), or give None for it in in_dims if func is to have it whole."
        )
    if not -value.ndim <= dim < value.ndim:
        raise ConfigError(
            f"x[{index}] has shape {list(value.shape)} and no dimension {dim} to cut along; "
            "give another in in_dims, or None."
        )
    return True
