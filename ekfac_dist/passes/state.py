"""How far a worker is with a pass, and whether that is saved."""

from collections.abc import Sequence

from ekfac_dist.runtime import preemption


class PassState:
    """How far this worker is with a pass.

    Args:
        batches: Its share.
        stored: What is stored, in words, when SIGTERM ends the pass.

    Attributes:
        batches: What it still has to do, as numbers of sequences.
        loss: Σ −log p(label) so far.
        num_labels: Labels so far.
        seconds: What earlier starts of the run took for what is taken up.
        is_resumed: Whether anything of the pass, of any worker, was there already.
    """

    is_resumed = False

    def __init__(
        self, batches: Sequence[Sequence[int]], stored: str = "what is done is stored"
    ) -> None:
        self.batches = batches
        self._stored = stored
        self.loss, self.num_labels, self.seconds = 0.0, 0, 0.0

    def after_step(self) -> None:
        """Counts a step that is in the sums."""

    def is_due(self) -> bool:
        """Whether it is time to save, after this step."""
        return False

    def save(self, loss: float, num_labels: int, *, ends: bool) -> None:
        """Saves the sums as they are.

        Args:
            loss: Σ −log p(label) so far.
            num_labels: Labels so far.
            ends: Whether the run ends here, for SIGTERM has come to a worker.

        Raises:
            Preempted: It ends.
            OutputError: They cannot be saved; what was saved before is still there.
        """
        if ends:
            raise preemption.ended(self._stored)

    def leave(self, loss: float, num_labels: int) -> None:
        """Saves the sums if they are not, for the run ends."""

    def complete(self) -> tuple[float, int]:
        """Adds what others than this start of the run have summed; its loss and labels."""
        return 0.0, 0
