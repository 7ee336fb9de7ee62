"""What every pass of a run computes with: model, task, sequences, workers, precision."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ekfac_dist.data.batches import Batch
from ekfac_dist.data.examples import Examples
from ekfac_dist.models.capture.checkpointing import LayerCheckpointing
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.observers import Observer
from ekfac_dist.models.capture.saved_tensors import SavedTensors
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.modules import TrackedModule
from ekfac_dist.models.sharding import is_sharded
from ekfac_dist.passes.owners import Owners
from ekfac_dist.passes.row_order import RowOrder
from ekfac_dist.runtime.prefetch import prefetch
from ekfac_dist.runtime.processes import World


@dataclass(frozen=True)
class PassContext:
    """What every pass of a run computes with.

    Attributes:
        model: The prepared model, on the worker's device.
        sequences: All sequences of the run, of all workers.
        own_batches: This worker's batches, each a list of indices into `sequences`.
        world: The workers.
        dtype: Precision of the running sums, float32 or float64.
        show_progress: Whether worker 0 shows progress.
        called: What errors call a sequence, by its index in the source.
        wider: What an error advises against a running sum that overflows.
        task: What the model is asked, and what its loss is.
        owners: Who owns which factors; None: every worker holds all that a pass sums.
        checkpoints: Whether layers keep their inputs alone, and are computed again in the backward.
        row_order: In which order a step shows the rows of modules; needed where they travel.
    """

    model: nn.Module
    sequences: Examples
    own_batches: Sequence[Sequence[int]]
    world: World
    dtype: torch.dtype
    show_progress: bool
    called: Callable[[int], str] = "sequence {} of the data".format
    wider: str = "Use factors.accumulate: float64"
    task: Task = CAUSAL_LM
    owners: Owners | None = None
    checkpoints: bool = False
    row_order: RowOrder | None = None

    @property
    def exchanges_rows(self) -> bool:
        """Whether captured rows travel to the owners of factors."""
        return self.owners is not None and self.owners.shard > 1

    @property
    def summed_over(self) -> World:
        """The workers whose running sums are added up at the end of a pass."""
        return self.owners.same_place if self.owners is not None else self.world

    def owns(self, module: TrackedModule) -> bool:
        """Whether this worker holds a module's running sums."""
        return self.owners is None or self.owners.owns(module)

    @property
    def runs_in_step(self) -> bool:
        """Whether a step is a collective, of a sharded model or of rows: all do as many."""
        return is_sharded(self.model) or self.exchanges_rows

    def capture(
        self,
        modules: Sequence[TrackedModule],
        observer: Observer,
        dtype: torch.dtype | None,
        device: torch.device | None = None,
        saved: SavedTensors | None = None,
    ) -> Capture:
        """How a pass runs a batch.

        Args:
            modules: The tracked modules of the pass.
            observer: What is done with inputs and output-gradients.
            dtype: What those are converted to; None: the model's own.
            device: Where they are moved to; None: nowhere.
            saved: Where to note what checkpointed layers keep; None: nowhere.
        """
        checkpointing = LayerCheckpointing(self.model, modules, saved) if self.checkpoints else None
        return Capture(self.model, modules, observer, dtype, self.task, device, checkpointing)

    def noted_row_order(self, modules: Sequence[TrackedModule]) -> RowOrder | None:
        """The order of some modules' rows, from a step of a short sequence; a collective.

        Args:
            modules: The modules.

        Returns:
            None if no rows travel.
        """
        if not self.exchanges_rows:
            return None
        batch = self.shortest_batch()
        order = RowOrder(batch.num_positions)
        with self.capture(modules, order, None) as capture:
            capture.run(batch, LabelRule("data", 0, 0))
        # Which experts the sequence reached may differ between workers, in the last bits.
        return self.world.share(order)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some sequences as a batch on the worker's device."""
        return self.sequences.batch(indices).to(self.world.device)

    def shortest_batch(self) -> Batch:
        """The shortest sequence as a batch of its own."""
        return self.batch([int(self.sequences.num_positions.argmin())])

    def prefetched(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Batch]]:
        """Batches with their sequences' indices, collated by a thread while the device computes.

        They are sent to the device by the caller's thread, on the stream that the model uses.
        """
        collated = prefetch(self.sequences.batch, batches)
        for indices, batch in zip(batches, collated, strict=True):
            yield indices, batch.to(self.world.device)
