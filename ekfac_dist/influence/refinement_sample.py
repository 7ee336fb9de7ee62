"""The training sequences whose Gauss–Newton matrix refines query gradients.

They follow from a seed and the number of training sequences alone: not from workers, batches, or
which sequences are scored. Only arithmetic, and the sequences themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ekfac_dist.config import RefineConfig
from ekfac_dist.data.batch_plan import worker_batches
from ekfac_dist.data.examples import Examples
from ekfac_dist.errors import ConfigError
from ekfac_dist.runtime.processes import World


@dataclass(frozen=True)
class RefinementSample:
    """The sequences of every product with G.

    Attributes:
        sequences: All sequences that are drawn.
        steps: Indices into them of each product's; of one entry if all products have the same.
        num_training: How many sequences they were drawn from.
        step_tokens: Token budget of a batch, padding included.
    """

    sequences: Examples
    steps: Sequence[np.ndarray]
    num_training: int
    step_tokens: int

    @classmethod
    def draw(
        cls, train: Examples, settings: RefineConfig, step_tokens: int = 1
    ) -> "RefinementSample":
        """Draws the sequences.

        Args:
            train: The training set.
            settings: How query gradients are refined.
            step_tokens: Token budget of a batch, padding included.

        Raises:
            ConfigError: If it has fewer sequences than are asked for.
        """
        name, number = settings.drawn
        if number is None:
            number = min(settings.default_drawn, len(train))
        if number > len(train):
            raise ConfigError(
                f"refine.{name} is {number}, but the training data has {len(train)} sequences; "
                f"give {len(train)} or fewer."
            )
        num_draws = 1 if settings.method == "cg" else settings.num_iterations + 1
        draws = [_drawn(len(train), number, settings.seed, step) for step in range(num_draws)]
        distinct = np.unique(np.concatenate(draws))
        steps = [np.searchsorted(distinct, indices) for indices in draws]
        return cls(train.take(distinct), steps, len(train), step_tokens)

    def of_product(self, number: int) -> np.ndarray:
        """Indices into `sequences` of those of a product, counted from 0, ascending."""
        return self.steps[min(number, len(self.steps) - 1)]

    def own_batches(self, world: World, number: int) -> list[list[int]]:
        """This worker's batches of a product: indices into `sequences`."""
        chosen = self.of_product(number)
        batches = worker_batches(
            self.sequences.num_positions[chosen],
            self.step_tokens,
            world.size,
            world.rank,
            self.sequences.equal_above,
        )
        return [chosen[batch].tolist() for batch in batches]

    def over(self, sequences: Examples) -> "RefinementSample":
        """The same draws of the same sequences, which may be batched in another way."""
        return replace(self, sequences=sequences)


def _drawn(num_training: int, number: int, seed: int, step: int) -> np.ndarray:
    """Indices of distinct training sequences, ascending: of one seed and step always the same."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
    return np.sort(generator.choice(num_training, number, replace=False))
