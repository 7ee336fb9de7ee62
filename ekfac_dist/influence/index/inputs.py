"""What a run of `index` reads before the model: factors, data, and the index that grows."""

from dataclasses import dataclass, replace

from ekfac_dist.config import DataConfig, IndexConfig, Kept, ModelConfig
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.errors import DataError
from ekfac_dist.factors.comparison import require_fitted_task
from ekfac_dist.factors.factors import Factors
from ekfac_dist.factors.opening import load_factors
from ekfac_dist.influence.index.reader import GradientIndex
from ekfac_dist.influence.names import named_by
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.load.pretrained import load_tokenizer
from ekfac_dist.passes.sequences import load_with_examples
from ekfac_dist.runtime.processes import World


@dataclass(frozen=True)
class IndexInputs:
    """What a run reads before the model.

    Attributes:
        factors: The factors.
        kept: How gradients are kept.
        model: Source of the model.
        data: Source of the sequences.
        train: All sequences, those of the index before included.
        before: The index that sequences are added to; None: a new one is made.
    """

    factors: Factors
    kept: Kept
    model: ModelConfig
    data: DataConfig
    train: Sequences
    before: GradientIndex | None

    @property
    def num_before(self) -> int:
        """Sequences of the index before."""
        return 0 if self.before is None else len(self.before)


def read_inputs(config: IndexConfig, world: World, *, adds: bool) -> IndexInputs:
    """Reads factors and data."""
    store = str(config.factors)
    with world.agree():
        factors = load_factors(store)
        require_fitted_task(store, factors, CAUSAL_LM)
        fitted = factors.manifest["config"]
        before, data = None, fitted["data"]
        if adds:
            before = GradientIndex(str(config.output), factors)
            data = before.manifest["data"]["config"]
        kept = config.index.over(None if before is None else before.manifest["index"])
        model_config = config.model.over(fitted["model"])
        data_config = config.data.over(data)
        if before is not None:  # a longer source is read as the index's was
            own = replace(config.data, source=None).over(data)
            data_config = replace(own, source=config.data.source or own.source)
    with named_by(store, "model.name", model_config.name, config.model.name):
        tokenizer, tokenizer_print = world.main_first(lambda: load_tokenizer(model_config))
    with named_by(store, "data.source", data_config.source, config.data.source):
        train, _ = load_with_examples(data_config, tokenizer, tokenizer_print, world)
    if before is not None:
        with world.agree():
            _require_beginning(before, train)
    return IndexInputs(factors, kept, model_config, data_config, train, before)


def _require_beginning(before: GradientIndex, train: Sequences) -> None:
    """Refuses data that do not begin with the index's.

    Raises:
        DataError: If they do not.
    """
    entry = before.manifest["data"]
    num_rows = entry["num_rows"]
    same = train.counts.rows >= num_rows
    if not same or train.fingerprint_of_first(num_rows) != entry["fingerprint"]:
        raise DataError(
            f"The data ({train.counts.rows} rows) do not begin with the {num_rows} rows that the "
            f"index {before.path} was made of; sequences are added at the end. Give data that go "
            "on from those, read in the same way, or make another index."
        )
