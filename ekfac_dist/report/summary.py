"""What `estimate` says: who works, at the start, and what it took, at the end."""

from collections import Counter
from collections.abc import Sequence

from ekfac_dist.models.discovery import Discovery
from ekfac_dist.report.tables import table
from ekfac_dist.runtime.memory import as_text
from ekfac_dist.runtime.store import StoreReader
from ekfac_dist.stages.record import Summary, coverage_line


def opening_lines(workers: Sequence[tuple[str, str, int]], backend: str) -> list[str]:
    """The workers that there really are.

    Args:
        workers: Host, device and number of threads of each.
        backend: Name of the process group's backend.
    """
    number = len(workers)
    lines = [f"workers       {number}, backend {backend}"]
    for (host, device, threads), times in Counter(workers).items():
        count = f"{times} × " if times > 1 else ""
        lines.append(f"  on {host}: {count}{device}, {threads} thread{'s' * (threads > 1)}")
    return lines


def modules_table(discovery: Discovery) -> str:
    """Every tracked module with its size and what it shares an input with, and what is left out.

    Args:
        discovery: What is tracked.
    """
    rows, shared = [], []
    for module in discovery.modules:
        size = f"{module.num_outputs} × {module.num_inputs}{' + 1' if module.bias else ''}"
        rows.append([module.name, module.kind, size, f"{module.num_parameters:,}"])
        leader = module.input.removesuffix(".input")
        shared.append("" if module.leads else f"input shared with {leader}")
    lines = [
        table(["module", "kind", "outputs × inputs", "parameters"], rows, shared),
        "",
        f"coverage      {coverage_line(discovery)}",
    ]
    lines += [f"not tracked   {name}: {why}" for name, why in discovery.coverage.skipped.items()]
    return "\n".join(lines)


def closing_table(summary: Summary, output: str) -> str:
    """What each stage took, and what came of it.

    Args:
        summary: The run.
        output: The store's directory.
    """
    tokens = int(summary.sequences.num_positions.sum())
    rows = []
    stages = [stage for stage, seconds in summary.seconds.items() if seconds]
    for stage in stages:
        seconds = summary.seconds[stage]
        passes = stage in summary.losses
        rate = f"{tokens * summary.num_groups / max(seconds, 1e-9):,.0f}" if passes else ""
        loss = f"{summary.losses[stage]:.4f}" if passes else ""
        rows.append([stage, f"{seconds:.1f}", rate, loss])
    whole = sum(summary.seconds.values())
    rows.append(["all", f"{whole:.1f}", "", ""])
    size = StoreReader(output).total_bytes()
    peaks = ", ".join(f"{as_text(peak)} ({place})" for place, peak in summary.peak_bytes.items())
    return "\n".join(
        [
            "",
            table(["stage", "seconds", "tokens/s", "loss (nats/label)"], rows),
            "",
            f"peak memory   {peaks}, the most of any worker",
            f"store         {as_text(size)} in {output}",
            f"coverage      {coverage_line(summary.discovery)}",
        ]
    )
