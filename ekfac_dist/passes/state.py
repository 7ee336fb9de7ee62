"""How far a worker is with a pass; this kind of state is not saved."""

from collections.abc import Sequence

from ekfac_dist.runtime import preemption


class PassState:
    """A worker's place in a pass, kept in memory alone.

    Args:
        batches: Its batches, each a list of indices of sequences.
        stored: What the error says is stored, if SIGTERM ends the pass.

    Attributes:
        batches: The batches that are left.
        loss: Σ −log p(label) so far, in nats.
        num_labels: Labels so far.
        seconds: What earlier starts of the run took for what is resumed here.
        is_resumed: Whether any worker resumed something of the pass.
        is_always_due: Whether the running sums are saved after every step, on every worker.
    """

    is_resumed = is_always_due = False

    def __init__(
        self, batches: Sequence[Sequence[int]], stored: str = "what is done is stored"
    ) -> None:
        self.batches = batches
        self._stored = stored
        self.loss, self.num_labels, self.seconds = 0.0, 0, 0.0

    def after_step(self) -> None:
        """Counts a step whose batch is in the running sums."""

    def is_due(self) -> bool:
        """Whether it is time to save the running sums, after this step."""
        return False

    def save(self, loss: float, num_labels: int, *, ends: bool) -> None:
        """Saves the running sums.

        Args:
            loss: Σ −log p(label) so far.
            num_labels: Labels so far.
            ends: Whether the run ends here, because SIGTERM has come to a worker.

        Raises:
            Preempted: If the run ends.
            OutputError: If the sums cannot be saved; those saved before are still there.
        """
        if ends:
            raise preemption.ended(self._stored)

    def leave(self, loss: float, num_labels: int) -> None:
        """Saves the running sums, unless they are saved already, because the run ends."""

    def complete(self) -> tuple[float, int]:
        """Adds the sums of earlier starts of the run; their loss and number of labels."""
        return 0.0, 0
