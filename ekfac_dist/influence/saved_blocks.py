"""What finished blocks of queries came to, kept as tensors so that nothing of it is done again.

The pieces of the second block are scan-2, its scores of all sequences; and details-2, of what is
listed for its rows, or rescore-2-1, rescore-2-2, …: exact scores, with details, a part of its rows
each.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ekfac_dist.data.examples import Examples
from ekfac_dist.factors.layout import MANIFEST
from ekfac_dist.influence.context import ScoringContext
from ekfac_dist.influence.queries import QuerySet
from ekfac_dist.influence.results import ResultsWriter
from ekfac_dist.influence.scores import Details, InfluenceScores
from ekfac_dist.influence.unfinished import UnfinishedResults
from ekfac_dist.models.load.configuration import configuration
from ekfac_dist.runtime.files import file_sha256
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.progress import Progress
from ekfac_dist.runtime.software import software

# Fields of scores with a row for each row of queries, and those that are of the sequences alone.
_OF_ROWS = ("scores", "query_norms", "module_scores", "layer_scores", "token_scores")
_OF_SEQUENCES = ("norms", "self_influence")


class SavedBlocks:
    """Where finished pieces of the work are kept; this kind keeps nothing.

    Every worker calls each method, in the same order.
    """

    def has(self, piece: str) -> bool:
        """Whether an earlier start of this run has finished a piece."""
        return False

    def load(self, piece: str) -> dict[str, Tensor]:
        """What a piece that is there came to, on the CPU of every worker."""
        raise KeyError(piece)

    def keep(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps what a piece came to.

        Raises:
            OutputError: It cannot be written.
        """

    def require_disk_space(self, result_bytes: int, state_bytes: int) -> None:
        """Refuses work that the disk has no room for; see `UnfinishedResults`."""


class BlocksOnDisk(SavedBlocks):
    """Keeps pieces beside the results that they will be part of.

    Args:
        world: The workers.
        directory: The directory, on worker 0; None on others.
    """

    def __init__(self, world: World, directory: UnfinishedResults | None) -> None:
        self._directory = directory
        self._world = world
        self._found = world.share(frozenset(() if directory is None else directory.pieces))

    def has(self, piece: str) -> bool:
        """Whether an earlier start of this run has finished a piece."""
        return piece in self._found

    def load(self, piece: str) -> dict[str, Tensor]:
        """Reads it on worker 0 and sends it to the others."""
        world = self._world
        own = world.on_main(lambda: self._main.read(piece)) or {}
        shapes = world.share([(name, held.shape, held.dtype) for name, held in own.items()])
        tensors = {}
        for name, shape, dtype in shapes:
            tensor = own[name] if own else torch.empty(shape, dtype=dtype)
            if world.size > 1 and tensor.numel():
                tensor = world.broadcast_(tensor.to(world.device)).cpu()
            tensors[name] = tensor
        return tensors

    def keep(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        """Has worker 0 write it."""
        self._world.on_main(lambda: self._main.write(piece, tensors))

    def require_disk_space(self, result_bytes: int, state_bytes: int) -> None:
        """Has worker 0 look."""
        self._world.on_main(lambda: self._main.require_disk_space(result_bytes, state_bytes))

    def finish(self, write: Callable[[ResultsWriter], None]) -> None:
        """Has worker 0 write the results, and removes what was kept for them.

        Raises:
            OutputError: They cannot be written; what was kept is still there.
        """

        def finished() -> None:
            write(self._main.writer())
            self._main.finish()

        self._world.on_main(finished)

    @property
    def _main(self) -> UnfinishedResults:
        assert self._directory is not None
        return self._directory


@contextmanager
def opened_results(
    output: str,
    config: Mapping[str, Any],
    begins: Mapping[str, Any],
    world: World,
    tell: Callable[[str], None],
) -> Iterator[BlocksOnDisk]:
    """The directory of results that worker 0 writes, with what an earlier start of the run left.

    Args:
        output: The directory.
        config: The run's whole configuration.
        begins: What the run begins with; see `beginning`.
        world: The workers.
        tell: Takes a line of text for people.

    Raises:
        OutputError: As `UnfinishedResults`.
        StoreError: As `UnfinishedResults`.
    """

    def opened() -> UnfinishedResults:
        directory = UnfinishedResults(output, config, begins)
        sizes = sum(listed["bytes"] for listed in directory.pieces.values())
        with Progress("verifying", total=sizes, unit="bytes", enabled=True) as progress:
            lost = directory.drop_damaged(progress.update)
        for file in lost:
            tell(f"damaged       {file} has changed since it was written; it is computed again")
        return directory

    directory = world.on_main(opened)
    try:
        yield BlocksOnDisk(world, directory)
    finally:
        if directory is not None:
            directory.close()


def beginning(
    store: str,
    model: str,
    train: Examples,
    scored: Examples,
    queries: QuerySet,
    context: ScoringContext,
) -> dict[str, Any]:
    """What a run begins with, by which it is known again; the same on every worker.

    Args:
        store: The factor store.
        model: The whole model's fingerprint.
        train: The whole training set.
        scored: What is scored of it.
        queries: The queries.
        context: Damping, precision and workers.
    """
    texts = [(q.prompt, q.completion, q.group, q.line) for q in queries.texts or ()]
    asked = json.dumps([queries.sequences.fingerprint, texts])
    factors = context.world.on_main(lambda: file_sha256(Path(store) / MANIFEST))
    return {
        "factors": context.world.share(factors),
        "model": model,
        "configuration of the model": configuration(context.model),
        "data": train.fingerprint,
        "candidates": hashlib.sha256(scored.indices.tobytes()).hexdigest(),
        "queries": hashlib.sha256(asked.encode()).hexdigest(),
        "damping": dict(context.damping),
        "dtype": str(context.dtype),
        "software": software(),
    }


# -- from results to tensors, and back -------------------------------------------------------------


def scan_tensors(result: InfluenceScores, rows: list[int], queries: list[int]) -> dict[str, Tensor]:
    """What the scan of a block has put into the results.

    Args:
        result: The results so far.
        rows: The block's rows, one after the other.
        queries: Numbers of their queries.
    """
    some = slice(rows[0], rows[-1] + 1)
    tensors = {"query_losses": losses_tensor(result, queries)}
    for name in _OF_ROWS:
        if (whole := getattr(result, name)) is not None:
            tensors[name] = whole[some]
    for name in _OF_SEQUENCES:  # the first block's scan sums them for all
        if rows[0] == 0 and (whole := getattr(result, name)) is not None:
            tensors[name] = whole
    if result.ranks:
        tensors["ranks"] = torch.tensor([result.ranks[name] for name in result.modules])
    return tensors


def put_scan(
    result: InfluenceScores, tensors: Mapping[str, Tensor], rows: list[int], queries: list[int]
) -> None:
    """Puts the same into the results."""
    put_losses(result, tensors, queries)
    for name in _OF_ROWS:
        if name in tensors:
            put_rows(result, name, tensors[name], rows)
    for name in _OF_SEQUENCES:
        if name in tensors:
            setattr(result, name, tensors[name])
    if "ranks" in tensors:
        result.ranks = dict(zip(result.modules, tensors["ranks"].tolist(), strict=True))


def put_rows(result: InfluenceScores, name: str, values: Tensor, rows: list[int]) -> None:
    """Puts a block's rows into a field of the results, which is made for all with the first."""
    whole = getattr(result, name)
    if whole is None:
        whole = values.new_zeros(len(result.scores), *values.shape[1:])
        setattr(result, name, whole)
    whole[rows] = values


def losses_tensor(result: InfluenceScores, queries: list[int]) -> Tensor:
    """−log p of some queries, float64."""
    return torch.tensor([result.query_losses[n] for n in queries], dtype=torch.float64)


def put_losses(result: InfluenceScores, tensors: Mapping[str, Tensor], queries: list[int]) -> None:
    """Puts the same into the results."""
    for number, loss in zip(queries, tensors["query_losses"].tolist(), strict=True):
        result.query_losses[number] = loss


def details_tensors(details: Details) -> dict[str, Tensor]:
    """Details as tensors, by their fields' names."""
    return {name: torch.as_tensor(value) for name, value in vars(details).items()}


def details_of(tensors: Mapping[str, Tensor]) -> Details:
    """Details from the same."""
    arrays = {name: tensors[name].numpy() for name in ("rows", "columns", "offsets")}
    return Details(
        **arrays,
        layer_token_scores=tensors["layer_token_scores"],
        module_scores=tensors["module_scores"],
    )
