"""What a fit starts from, what it did, and the manifest of its store."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ekfac_dist.data.batch_plan import padded_sizes, plan_batches
from ekfac_dist.data.examples import Examples
from ekfac_dist.data.sequences import Sequences
from ekfac_dist.fit.halves import Halves
from ekfac_dist.fit.settings import FitSettings
from ekfac_dist.models.capture.tasks import Task
from ekfac_dist.models.find.discovery import Discovery
from ekfac_dist.models.load.configuration import attention_implementation, configuration
from ekfac_dist.models.load.fingerprints import Fingerprints
from ekfac_dist.models.sharding import class_of
from ekfac_dist.runtime.software import software


@dataclass
class FitSummary:
    """What a fit did, for its closing table.

    Attributes:
        seconds: Time of each stage: covariance, eigenbasis, refit.
        losses: Mean −log p(label) of each pass, in nats per label.
        num_labels: Labels of one pass.
        sequences: All sequences of the run.
        discovery: The tracked modules.
        workers: W.
        num_groups: Number of groups of modules, one pair of passes each.
        peak_bytes: The largest peak memory of any worker, by place ("host", "device").
        halves: What half of the data changes.
    """

    sequences: Examples
    discovery: Discovery
    workers: int
    num_groups: int
    seconds: dict[str, float] = field(
        default_factory=lambda: {"covariance": 0.0, "eigenbasis": 0.0, "refit": 0.0}
    )
    losses: dict[str, float] = field(default_factory=dict)
    num_labels: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    halves: Halves = field(default_factory=Halves)


@dataclass
class FitInputs:
    """What a fit starts from, once everything is loaded and checked.

    Attributes:
        settings: The settings of the fit.
        model: The prepared model, on the worker's device.
        sequences: All sequences.
        discovery: The tracked modules.
        fingerprints: Fingerprints of the model's weights.
        task: What the model is asked, and what its loss is.
        task_fingerprint: SHA-256 of the task's code and attributes; None for a built-in task.
        step_tokens: Largest number of positions of a batch, padding included.
    """

    settings: FitSettings
    model: nn.Module
    sequences: Examples
    discovery: Discovery
    fingerprints: Fingerprints
    task: Task
    task_fingerprint: str | None
    step_tokens: int


def steps_line(inputs: FitInputs) -> str:
    """Number and size of the batches, and the share of padding, in one line."""
    lengths = inputs.sequences.num_positions
    batches = plan_batches(lengths, inputs.step_tokens, inputs.sequences.equal_above)
    line = f"{len(batches)} batches of at most {inputs.step_tokens} positions"
    if isinstance(inputs.sequences, Sequences) and inputs.sequences.packed:
        return f"{line}, sequences packed, no padding"
    return f"{line}, {1 - lengths.sum() / sum(padded_sizes(lengths, batches)):.1%} padding"


def coverage_line(discovery: Discovery) -> str:
    """The tracked share of the MLPs' and of all parameters, in one line."""
    coverage = discovery.coverage
    of_mlp = coverage.tracked_mlp_parameters / max(1, coverage.mlp_parameters)
    of_all = coverage.tracked_parameters / max(1, coverage.model_parameters)
    return (
        f"{len(discovery.modules)} modules, {len(discovery.factors)} factors; "
        f"{coverage.tracked_parameters} parameters: {of_mlp:.1%} of the MLP's, {of_all:.1%} of all"
    )


def store_manifest(inputs: FitInputs, summary: FitSummary) -> dict[str, Any]:
    """Every entry of the manifest except format, complete and files."""
    fitted, coverage = inputs.settings.factors, summary.discovery.coverage
    return {
        "model": _model_entry(inputs),
        "data": _data_entry(inputs, summary),
        "fisher": {
            "labels": fitted.labels,
            "seed": fitted.seed,
            "refit": fitted.refit,
            "task": inputs.task.name,
            "task_fingerprint": inputs.task_fingerprint,
        },
        "modules": {module.name: module.as_dict() for module in summary.discovery.modules},
        "coverage": {
            "mlp_parameters": coverage.mlp_parameters,
            "tracked_parameters": coverage.tracked_parameters,
            "tracked_mlp_parameters": coverage.tracked_mlp_parameters,
            "model_parameters": coverage.model_parameters,
            "skipped": coverage.skipped,
        },
        "passes": _passes_entry(inputs, summary),
        "halves": summary.halves.entry(summary.discovery.modules),
        "software": software(),
        "config": inputs.settings.recorded,
    }


def _model_entry(inputs: FitInputs) -> dict[str, Any]:
    origin = inputs.settings.recorded["model"]
    return {
        "name": origin["name"],
        "revision": origin["revision"],
        "class": class_of(inputs.model).__name__,
        "dtype": str(next(inputs.model.parameters()).dtype).removeprefix("torch."),
        "fingerprint": inputs.fingerprints.tracked,
        "narrower_fingerprints": inputs.fingerprints.narrower,
        "whole": inputs.fingerprints.whole,
        "untracked": inputs.fingerprints.untracked,
        "configuration": configuration(inputs.model),
        "attention": attention_implementation(inputs.model),
    }


def _data_entry(inputs: FitInputs, summary: FitSummary) -> dict[str, Any]:
    origin, sequences = inputs.settings.recorded["data"], inputs.sequences
    counts = sequences.counts
    return {
        "source": origin["source"],
        "split": origin["split"],
        "fingerprint": sequences.fingerprint,
        "num_sequences": len(sequences),
        "num_positions": int(sequences.num_positions.sum()),
        "num_labels": summary.num_labels,
        "max_tokens": origin["max_tokens"],
        "num_rows": counts.rows,
        "num_unlabelled": counts.unlabelled,
        "num_truncated": counts.truncated,
        "num_tokens_cut": counts.tokens_cut,
        "num_split_tokens": counts.split,
        "num_documents": counts.documents,
    }


def _passes_entry(inputs: FitInputs, summary: FitSummary) -> dict[str, Any]:
    return {
        name: {
            "num_sequences": len(inputs.sequences),
            "num_positions": int(inputs.sequences.num_positions.sum()),
            "seconds": round(seconds, 3),
            "workers": summary.workers,
            **({"loss": summary.losses[name]} if name in summary.losses else {}),
        }
        for name, seconds in summary.seconds.items()
        if name != "refit" or inputs.settings.factors.refit != "none"
    }
