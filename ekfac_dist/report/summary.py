"""What `estimate` and `plan` print: workers, modules, the plan, and the summary of a run."""

from collections import Counter
from collections.abc import Sequence

from ekfac_dist.factors.reader import StoreReader
from ekfac_dist.fit.disk_space import STATE_BYTES_PER_SECOND
from ekfac_dist.fit.manifest import FitSummary, coverage_line
from ekfac_dist.fit.plan import Plan
from ekfac_dist.influence.index.layout import DTYPES, TIME_OVER_REFIT, bytes_per_sequence
from ekfac_dist.models.find.discovery import Discovery
from ekfac_dist.report import halves
from ekfac_dist.report.tables import table
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.progress import clock
from ekfac_dist.runtime.terminal import visible


def opening_lines(workers: Sequence[tuple[str, str, int]], backend: str) -> list[str]:
    """Lines that list the workers that were really started, by host and device.

    Args:
        workers: Host, device and number of threads of each worker.
        backend: Name of the process group's backend.
    """
    number = len(workers)
    lines = [f"workers       {number}, backend {backend}"]
    for (host, device, threads), num_equal in Counter(workers).items():
        count = f"{num_equal} × " if num_equal > 1 else ""
        lines.append(f"  on {host}: {count}{device}, {threads} thread{'s' * (threads > 1)}")
    return lines


def modules_table(discovery: Discovery) -> str:
    """Table of the tracked modules with sizes and shared inputs, and the modules left out.

    Args:
        discovery: The modules found in the model.
    """
    rows, input_notes = [], []
    for module in discovery.modules:
        size = f"{module.num_outputs} × {module.num_inputs}{' + 1' if module.bias else ''}"
        rows.append([module.name, module.kind, size, f"{module.num_parameters:,}"])
        leader = module.input.removesuffix(".input")
        input_notes.append("" if module.leads else f"input shared with {leader}")
    lines = [
        table(["module", "kind", "outputs × inputs", "parameters"], rows, input_notes),
        "",
        f"coverage      {coverage_line(discovery)}",
    ]
    skipped = discovery.coverage.skipped.items()
    lines += [visible(f"not tracked   {name}: {why}") for name, why in skipped]
    return "\n".join(lines)


def plan_table(plan: Plan) -> str:
    """The memory, disk space and time that a run would need, and whether it fits.

    Args:
        plan: The plan.
    """
    return "\n".join(
        [
            *_plan_lines(plan),
            "",
            _memory_table(plan),
            "",
            _disk_table(plan),
            "",
            _time_table(plan),
            "",
            _index_line(plan),
            "",
            _verdict(plan),
        ]
    )


def _plan_lines(plan: Plan) -> list[str]:
    """Model, modules, workers, partitions and data of a planned run."""
    num_workers = f"{plan.workers} workers, " if plan.workers > 1 else ""
    coverage = plan.discovery.coverage
    return [
        f"model         {visible(plan.model)}, {coverage.model_parameters:,} parameters",
        f"tracked       {coverage_line(plan.discovery)}",
        *(visible(f"not tracked   {name}: {why}") for name, why in coverage.skipped.items()),
        f"workers       {num_workers}{as_text(plan.free_bytes)} of memory each ({plan.device})",
        f"partitions    {len(plan.groups)}, a pair of passes each"
        + (", the fewest that fit" if plan.is_chosen and plan.fits else ""),
        *(
            [f"factors       each copy of them is shared out among {plan.shard} workers"]
            if plan.shard > 1
            else []
        ),
        *(
            f"decomposed    factors of size {', '.join(map(str, sizes))} on the {place}"
            for place, sizes in plan.decomposed.items()
        ),
        *(
            ["layers        are repeated in the backward (model.gradient_checkpointing)"]
            if plan.checkpoints
            else []
        ),
        f"data          {plan.num_sequences:,} sequences of {plan.num_tokens} tokens, in steps of "
        f"{plan.step_tokens}",
    ]


def _memory_table(plan: Plan) -> str:
    memory = plan.memory
    parts = {
        "program": memory.process,
        "weights": memory.weights,
        "step: activations, logits, rows": memory.step,
        **({"rows on their way to owners": memory.exchange} if memory.exchange else {}),
        "covariance sums": memory.covariance,
        "eigenvectors": memory.bases,
        "sums of the refit": memory.spectra,
        "sums over half of the sequences": max(memory.halves.values()),
        f"workspace of a decomposition{'' if memory.on_cpu else ', beside the program alone'}": (
            memory.workspace
        ),
        "kept by the allocator": memory.retained,
    }
    if any(memory.second_levels.values()):
        place = "" if memory.on_cpu else ", in the host's memory"
        parts[f"second level of sums{place}"] = max(memory.second_levels.values())
    rows = [[name, as_text(size)] for name, size in parts.items()]
    rows += [[f"at once, {stage}", as_text(size)] for stage, size in memory.passes.items()]
    if memory.host:
        rows.append(["in the host's memory, at most", as_text(memory.host)])
    return table(["memory of a worker", "bytes"], rows)


def _disk_table(plan: Plan) -> str:
    disk = plan.disk
    sizes = {"store": disk.store, "sums that do not stay": disk.sums, "saved states": disk.states}
    rows = [[name, as_text(size)] for name, size in sizes.items() if size]
    rows.append(["the most at a time", as_text(disk.peak)])
    lines = [table(["disk", "bytes"], rows)]
    if disk.states:
        lines.append(
            f"SIGTERM writes {as_text(disk.state)} of states: give all workers "
            f"{disk.grace_seconds} s for it (GRACE_SECONDS) where the disk takes "
            f"{as_text(STATE_BYTES_PER_SECOND)} a second."
        )
    return "\n".join(lines)


def _time_table(plan: Plan) -> str:
    work = plan.operations.by_stage
    seconds = plan.seconds
    rows = [
        [stage, f"{operations / 1e12:,.1f}", "" if seconds is None else clock(seconds[stage])]
        for stage, operations in work.items()
    ]
    if seconds is None or plan.rates is None:
        note = "Give the workers' speed, --gpu or --gflops, for the time."
    else:
        rates = plan.rates
        note = (
            f"{clock(sum(seconds.values()))} in all, if a worker reaches, in GFLOP/s, "
            f"{rates.model / 1e9:,.0f} in the model, {rates.outer_products / 1e9:,.0f} in "
            f"covariances, {rates.float32 / 1e9:,.0f} in the refit and "
            f"{rates.decompositions / 1e9:,.0f} in decompositions."
        )
    return f"{table(['stage', '10¹² operations', 'time'], rows)}\n{note}"


def _index_line(plan: Plan) -> str:
    """What a gradient index of the planned data would take."""
    kept, modules = plan.kept, plan.discovery.modules
    each = bytes_per_sequence(modules, kept.rank, DTYPES[kept.dtype])
    seconds = plan.seconds
    time = "somewhat more than the refit takes"
    if seconds is not None:
        time = f"about {clock(TIME_OVER_REFIT * seconds['refit'])}"
    return (
        f"A gradient index (`index`) of {plan.num_sequences:,} sequences, of rank {kept.rank} in "
        f"{kept.dtype}, takes {as_text(each * plan.num_sequences)} on the disk, {as_text(each)} a "
        f"sequence, and {time}."
    )


def _verdict(plan: Plan) -> str:
    needed, free = as_text(plan.memory.peak), as_text(plan.free_bytes)
    if not plan.fits:
        more = "" if plan.is_chosen else "more partitions, "
        if plan.least_workers is not None:
            more += f"{plan.least_workers} workers, "
        return (
            f"It does not fit: a worker needs {needed} and has {free}. Use {more}smaller "
            "batch_tokens, a narrower model.dtype, or larger devices."
        )
    if plan.fits_on_disk is False:
        return (
            f"It fits the workers, but not the disk: {as_text(plan.disk.peak)} are needed, and "
            f"{as_text(plan.free_disk_bytes or 0)} are free."
        )
    return f"It fits: a worker needs {needed} and has {free}."


def closing_table(summary: FitSummary, output: str) -> str:
    """The time, speed and loss of each stage, peak memory, and the store that was written.

    Args:
        summary: Measurements of the run.
        output: The store's directory.
    """
    num_tokens = int(summary.sequences.num_positions.sum())
    rows = []
    stages = [stage for stage, seconds in summary.seconds.items() if seconds]
    for stage in stages:
        seconds = summary.seconds[stage]
        is_pass = stage in summary.losses
        rate = f"{num_tokens * summary.num_groups / max(seconds, 1e-9):,.0f}" if is_pass else ""
        loss = f"{summary.losses[stage]:.4f}" if is_pass else ""
        rows.append([stage, f"{seconds:.1f}", rate, loss])
    total_seconds = sum(summary.seconds.values())
    rows.append(["all", f"{total_seconds:.1f}", "", ""])
    store = StoreReader(output)
    peaks = ", ".join(f"{as_text(peak)} ({place})" for place, peak in summary.peak_bytes.items())
    return "\n".join(
        [
            "",
            table(["stage", "seconds", "tokens/s", "loss (nats/label)"], rows),
            "",
            f"peak memory   {peaks}, the most of any worker",
            f"store         {as_text(store.total_bytes())} in {output}",
            f"coverage      {coverage_line(summary.discovery)}",
            *map(visible, halves.lines(store.manifest.get("halves"))),
        ]
    )
