"""Finished pieces of the work, saved as tensors so that a resumed run does not repeat them.

The pieces, each a safetensors file (see `blocks` for their names and `unfinished` for the files).
q counts the piece's query groups, P the pairs of a group and a sequence.

    scan       scores [q, N] and, if asked for, query_norms [q], module_scores [q, modules, N],
               layer_scores [q, layers, N], token_scores [q, positions]; query_losses [queries]
               and, if there are contrasts, against_losses [queries], NaN where a query is none;
               ranks [modules] at low rank; residuals [q, steps + 1] with refinement; with the
               first group norms, self_influence [N]
    details    the fields of `Details` of the listed pairs
    rescore    exact_rows, exact_columns, exact_scores [P] of all pairs that were scored again;
               query_losses and against_losses [queries]; the fields of `Details` of the listed
               ones, if asked for
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ekfac_dist.data.examples import Examples
from ekfac_dist.factors.layout import MANIFEST
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.index.reader import GradientIndex
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.results import ResultsWriter
from ekfac_dist.influence.scores import Details, InfluenceScores
from ekfac_dist.influence.unfinished import UnfinishedResults
from ekfac_dist.models.load.configuration import configuration
from ekfac_dist.runtime.files import file_sha256
from ekfac_dist.runtime.logs import log_on_main
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress
from ekfac_dist.runtime.software import software

# Fields of `InfluenceScores` whose first dimension is the query groups, and those without it.
_GROUP_FIELDS = ("scores", "query_norms", "module_scores", "layer_scores", "token_scores")
_SEQUENCE_FIELDS = ("norms", "self_influence")


class SavedBlocks:
    """Where finished pieces of the work are saved; this class saves nothing.

    Every worker calls each method, in the same order: in subclasses they are collectives.
    """

    finished: frozenset[str] = frozenset()  # pieces that were before this run was resumed

    def has(self, piece: str) -> bool:
        """Whether a piece was finished before this run was resumed."""
        return piece in self.finished

    def load(self, piece: str) -> dict[str, Tensor]:
        """The tensors of a saved piece, on the CPU of every worker.

        Raises:
            KeyError: If nothing is saved.
            OutputError: If the piece cannot be read.
        """
        raise KeyError(piece)

    def keep(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        """Saves the tensors of a finished piece.

        Raises:
            OutputError: If they cannot be written.
        """

    def require_disk_space(self, result_bytes: int, state_bytes: int) -> None:
        """Checks that the disk has space; see `UnfinishedResults.require_disk_space`."""


class BlocksOnDisk(SavedBlocks):
    """Saves pieces in the directory of the results that they will be part of.

    Args:
        world: The workers.
        directory: The directory of unfinished results, on worker 0; None on the others.
    """

    def __init__(self, world: World, directory: UnfinishedResults | None) -> None:
        self._directory = directory
        self._world = world
        self.finished = world.share(frozenset(() if directory is None else directory.pieces))

    def load(self, piece: str) -> dict[str, Tensor]:
        """The tensors of a saved piece, which worker 0 reads and sends to the others."""
        world = self._world
        read = world.on_main(lambda: self._main.read(piece)) or {}  # empty but on worker 0
        shapes = world.share([(name, tensor.shape, tensor.dtype) for name, tensor in read.items()])
        tensors = {}
        for name, shape, dtype in shapes:
            tensor = read[name] if read else torch.empty(shape, dtype=dtype)
            if world.size > 1 and tensor.numel():
                tensor = world.broadcast_(tensor.to(world.device)).cpu()
            tensors[name] = tensor
        return tensors

    def keep(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        """Saves the tensors of a finished piece, which worker 0 writes."""
        self._world.on_main(lambda: self._main.write(piece, tensors))

    def require_disk_space(self, result_bytes: int, state_bytes: int) -> None:
        """Checks the disk on worker 0."""
        self._world.on_main(lambda: self._main.require_disk_space(result_bytes, state_bytes))

    def finish(self, write: Callable[[ResultsWriter], None]) -> None:
        """Writes the results on worker 0, and removes the saved pieces.

        Args:
            write: Writes all results with the writer that it is given.

        Raises:
            OutputError: If the results cannot be written; the pieces stay in place.
        """

        def write_and_finish() -> None:
            write(self._main.writer())
            self._main.finish()

        self._world.on_main(write_and_finish)

    @property
    def _main(self) -> UnfinishedResults:
        assert self._directory is not None
        return self._directory


@contextmanager
def opened_results(
    output: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    world: World,
) -> Iterator[BlocksOnDisk]:
    """Opens the directory of results, new or to be resumed, for worker 0 to write.

    Args:
        output: The directory.
        config: The run's whole configuration.
        inputs: The run's other inputs; see `run_inputs`.
        world: The workers.

    Raises:
        OutputError: As `UnfinishedResults`.
        StoreError: As `UnfinishedResults`.
    """

    def opened() -> UnfinishedResults:
        directory = UnfinishedResults(output, config, inputs)
        num_bytes = sum(listed["bytes"] for listed in directory.pieces.values())
        with Progress("verifying", total=num_bytes, unit="bytes", enabled=True) as progress:
            lost = directory.drop_damaged(progress.update)
        for file in lost:
            log_on_main(
                world,
                f"damaged       {file} has changed since it was written; it is computed again",
            )
        return directory

    directory = world.on_main(opened)
    try:
        yield BlocksOnDisk(world, directory)
    finally:
        if directory is not None:
            directory.close()


def run_inputs(
    store: str,
    model: str,
    train: Examples,
    scored: Examples,
    queries: QuerySet,
    context: ScoringContext,
    index: GradientIndex | None = None,
) -> dict[str, Any]:
    """All inputs that results depend on besides the configuration, by name; a collective.

    A run is resumed only if they are the same; they are the same on every worker.

    Args:
        store: Directory of the factor store.
        model: Fingerprint of the whole model.
        train: The whole training set.
        scored: The sequences of it that are scored.
        queries: The queries.
        context: Model, damping, precision and workers.
        index: The gradient index that is scanned; None: the data are.
    """
    texts = [
        (q.prompt, q.completion, q.group, q.line, *(() if q.against is None else (q.against,)))
        for q in queries.texts or ()
    ]
    query_content = json.dumps([queries.sequences.fingerprint, texts])
    factors = context.world.on_main(lambda: file_sha256(Path(store) / MANIFEST))
    return {
        "factors": context.world.share(factors),
        **({} if index is None else {"index": index.fingerprint}),
        "model": model,
        "configuration of the model": configuration(context.model),
        "data": train.fingerprint,
        "candidates": hashlib.sha256(scored.indices.tobytes()).hexdigest(),
        "queries": hashlib.sha256(query_content.encode()).hexdigest(),
        "damping": dict(context.damping),
        "dtype": str(context.dtype),
        "software": software(),
    }


# -- from results to a piece's tensors, and back ---------------------------------------------------


def scan_tensors(
    result: InfluenceScores, groups: list[int], queries: list[int]
) -> dict[str, Tensor]:
    """The tensors of a scan's piece, from the results that the block's scan has filled in.

    Args:
        result: The results.
        groups: Indices of the block's query groups, consecutive.
        queries: Indices of their queries.
    """
    rows = slice(groups[0], groups[-1] + 1)
    tensors = losses_tensors(result, queries)
    for name in _GROUP_FIELDS:
        if (values := getattr(result, name)) is not None:
            tensors[name] = values[rows]
    for name in _SEQUENCE_FIELDS:  # only the first block's scan computes them
        if groups[0] == 0 and (values := getattr(result, name)) is not None:
            tensors[name] = values
    if result.refined is not None:
        tensors["residuals"] = result.refined.residuals[rows]
    if result.ranks:
        tensors["ranks"] = torch.tensor([result.ranks[name] for name in result.modules])
    return tensors


def put_scan(
    result: InfluenceScores, tensors: Mapping[str, Tensor], groups: list[int], queries: list[int]
) -> None:
    """Fills a block's scan into the results, from the tensors that `scan_tensors` gave."""
    put_losses(result, tensors, queries)
    for name in _GROUP_FIELDS:
        if name in tensors:
            put_rows(result, name, tensors[name], groups)
    for name in _SEQUENCE_FIELDS:
        if name in tensors:
            setattr(result, name, tensors[name])
    if result.refined is not None:
        result.refined.residuals[groups] = tensors["residuals"]
    if "ranks" in tensors:
        result.ranks = dict(zip(result.modules, tensors["ranks"].tolist(), strict=True))


def put_rows(result: InfluenceScores, name: str, values: Tensor, groups: list[int]) -> None:
    """Fills the rows of some query groups into a field of the results.

    Args:
        result: The results; a field that is None becomes zeros for all groups first.
        name: The field.
        values: The rows [q, …].
        groups: Indices of the query groups.
    """
    field = getattr(result, name)
    if field is None:
        field = values.new_zeros(len(result.scores), *values.shape[1:])
        setattr(result, name, field)
    field[groups] = values


def losses_tensors(result: InfluenceScores, queries: list[int]) -> dict[str, Tensor]:
    """−log p of some queries, and of what they are against if any is a contrast, float64."""
    own = [result.query_losses[query] for query in queries]
    others = [result.against_losses[query] for query in queries]
    tensors = {"query_losses": torch.tensor(own, dtype=torch.float64)}
    if any(loss is not None for loss in others):
        numbers = [math.nan if loss is None else loss for loss in others]
        tensors["against_losses"] = torch.tensor(numbers, dtype=torch.float64)
    return tensors


def put_losses(result: InfluenceScores, tensors: Mapping[str, Tensor], queries: list[int]) -> None:
    """Fills −log p of some queries into the results, from the tensors of `losses_tensors`."""
    for query, loss in zip(queries, tensors["query_losses"].tolist(), strict=True):
        result.query_losses[query] = loss
    if "against_losses" in tensors:
        for query, loss in zip(queries, tensors["against_losses"].tolist(), strict=True):
            result.against_losses[query] = None if math.isnan(loss) else loss


def details_tensors(details: Details) -> dict[str, Tensor]:
    """The fields of details as tensors, by name."""
    return {name: torch.as_tensor(value) for name, value in vars(details).items()}


def details_of(tensors: Mapping[str, Tensor]) -> Details:
    """Details from the tensors that `details_tensors` gave."""
    arrays = {name: tensors[name].numpy() for name in ("rows", "columns", "offsets")}
    return Details(
        **arrays,
        layer_token_scores=tensors["layer_token_scores"],
        module_scores=tensors["module_scores"],
    )
