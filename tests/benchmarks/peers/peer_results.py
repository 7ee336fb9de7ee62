"""The tables and the plot of `fit.py`, from its runs.

`results` is {row: {side: [report, …]}} throughout, a report for each round: what `peer_sides.run`
returns, and `batch`, the size of the side's batch in words.
"""

import statistics
from datetime import datetime

import matplotlib
from matplotlib.figure import Figure

PASSES = ("covariance", "eigenbasis", "refit")
REST = "start, load, store"
# Read on white and on black.
COLOURS = {"covariance": "#3d7fc4", "eigenbasis": "#e0922f", "refit": "#3f9c6b", REST: "#8c8c8c"}
TEXT = "#808080"


def median_run(runs):
    """The run whose whole time is the median; of an even number, the faster of the middle two."""
    return sorted(runs, key=whole_seconds)[(len(runs) - 1) // 2]


def whole_seconds(run):
    """Of the command."""
    return run["whole_seconds"]


def seconds_of_passes(run):
    """Of the two passes over the data."""
    return run["passes"]["covariance"] + run["passes"]["refit"]


def peak_bytes(run):
    """What is compared: a GPU's memory where there is one, all processes' memory otherwise."""
    return run.get("device_peak_bytes", run["all_peak_bytes"])


def ratios(one, other, measure):
    """Of one side's runs to another's, each within its round.

    Args:
        one: Runs of a side, a round each.
        other: Those of another, of the same rounds.
        measure: A function of a run.
    """
    return [measure(a) / measure(b) for a, b in zip(one, other, strict=True)]


def spread(values, digits):
    """The median and, of several, the range: 1.50 (1.42–1.61)."""
    said = f"{statistics.median(values):.{digits}f}"
    if len(values) > 1:
        said += f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
    return said


def markdown(results):
    """A table in markdown: median runs by pass, and ours over each peer's within a round.

    Passes, where compared, are the two over the data, without the decomposition between them.
    """
    on_device = any(
        "device_peak_bytes" in r[0] for sides in results.values() for r in sides.values()
    )
    header = ["work", "side", "batch", "whole, s", *(f"{name}, s" for name in PASSES)]
    header.append("peak on the GPU, GB" if on_device else "peak, GB")
    header += ["ours / its time", "/ its passes", "/ its peak"]
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3)]
    for row, sides in results.items():
        for side, runs in sides.items():
            run = median_run(runs)
            cells = [row, side, run["batch"], f"{run['whole_seconds']:.2f}"]
            cells += [f"{run['passes'][name]:.2f}" for name in PASSES]
            cells.append(f"{peak_bytes(run) / 1e9:.2f}")
            for measure in (whole_seconds, seconds_of_passes, peak_bytes):
                found = ratios(sides["ours"], runs, measure)
                cells.append("" if side == "ours" else f"{statistics.median(found):.2f}")
            lines.append(cells)
    return _joined(lines)


def readme_table(rows):
    """The table of docs/comparison.md: for each kind of work a line, for each side a column.

    A cell has the median seconds of the whole command with their range over rounds, the peak of the
    run with that median, the size of the batch, and for a peer its seconds over ours of the same
    round. The fastest is in bold.

    Args:
        rows: {row: {"work": in words, "results": {side: [report, …]}, "cannot": sides that are not
            able to do it}}.
    """
    sides = list(dict.fromkeys(side for row in rows.values() for side in row["results"]))
    header = ["work", *(_named(side, rows) for side in sides)]
    lines = [header, ["---"] * len(header)]
    for row in rows.values():
        medians = {side: median_run(runs) for side, runs in row["results"].items()}
        fastest = min(medians, key=lambda side: whole_seconds(medians[side]))
        lines.append([row["work"]])
        for side in sides:
            if side in medians:
                lines[-1].append(_cell(row["results"], side, side == fastest))
            else:
                lines[-1].append("cannot" if side in row["cannot"] else "–")
    return _joined(lines)


def _named(side, rows):
    """A side with the version that ran."""
    if side == "ours":
        return "ekfac_dist"
    runs = next(row["results"][side] for row in rows.values() if side in row["results"])
    return f"{side} {runs[0]['versions'][side]}"


def _cell(results, side, fastest):
    runs = results[side]
    run = median_run(runs)
    median, *of_rounds = spread([whole_seconds(each) for each in runs], 1).split(" ", 1)
    said = " ".join([f"**{median} s**" if fastest else f"{median} s", *of_rounds])
    said += f", {peak_bytes(run) / 1e9:.2f} GB; {run['batch']}"
    if side != "ours":
        said += f"; {spread(ratios(runs, results['ours'], whole_seconds), 2)} × our time"
    return said


def circumstances(machine, rows):
    """What has to be known to read the table, as one sentence after another.

    Args:
        machine: As `fit.py` finds it.
        rows: {row: {"results", "gemm_flops", "started"}}, of which "gemm_flops" is {dtype: rates
            before and after} and "started" an ISO date with its time.
    """
    days = sorted({row["started"][:10] for row in rows.values()})
    days = [f"{day:%-d %B %Y}" for day in map(datetime.fromisoformat, days)]
    rounds = sorted({len(runs) for row in rows.values() for runs in row["results"].values()})
    rates = {}
    for row in rows.values():
        for dtype, measured in row["gemm_flops"].items():
            rates.setdefault(dtype, []).extend(measured)
    gemm = [
        f"{min(found) / 1e9:,.0f}–{max(found) / 1e9:,.0f} GFLOP/s in {dtype}"
        for dtype, found in rates.items()
    ]
    versions = {}
    for row in rows.values():
        for side, runs in row["results"].items():
            versions[side] = runs[0]["versions"]
    said = [f"{name} {version}" for name, version in versions.pop("ours").items()]
    own = [
        f"{side} {of[side]} with torch {of['torch']} and transformers {of['transformers']}"
        for side, of in versions.items()
    ]
    where = f"{machine['processor']}, {machine['threads']} threads"
    if machine["device"]:
        where = f"{machine['device']}; {where}"
    return (
        f"{where}, {', '.join(days)}. Medians of {' or '.join(map(str, rounds))} rounds in turns "
        f"(and their range); ratios are within a round. Square products before and after each "
        f"row: {', '.join(gemm)}. {', '.join(said)}; {'; '.join(own)}."
    )


def shares_of_gemm(results, least_seconds):
    """A table in markdown: how much of each pass the device's GEMM rate would take.

    Args:
        results: Of the runs.
        least_seconds: {row: {pass: seconds of its least operations at the GEMM rate}}.
    """
    passes = list(next(iter(least_seconds.values())))
    lines = [["share of the GEMM rate", "side", *passes], ["---", "---", *["---:"] * len(passes)]]
    for row, sides in results.items():
        for side, runs in sides.items():
            seconds = median_run(runs)["passes"]
            shares = [f"{least_seconds[row][name] / seconds[name]:.0%}" for name in passes]
            lines.append([row, side, *shares])
    return _joined(lines)


def _joined(lines):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(results, path, title):
    """Draws whole times, stacked by pass, as an SVG that reads on light and dark grounds."""
    bars = [(row, side, median_run(runs)) for row, s in results.items() for side, runs in s.items()]
    places, place = [], 0.0
    for number, (row, _, _) in enumerate(bars):
        place += 1.0 if number and bars[number - 1][0] == row else 1.9
        places.append(place)
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "peers"})
    figure = Figure(figsize=(8, 0.7 + 0.3 * place), layout="constrained")
    axes = figure.add_subplot()
    lefts = [0.0] * len(bars)
    for part in (*PASSES, REST):
        widths = []
        for _, _, run in bars:
            known = run["passes"]
            rest = max(0.0, run["whole_seconds"] - sum(known.values()))
            widths.append(rest if part == REST else known[part])
        axes.barh(places, widths, left=lefts, height=0.8, color=COLOURS[part], label=part)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for at, (_, _, run) in zip(places, bars, strict=True):
        said = f" {run['whole_seconds']:.1f} s, {peak_bytes(run) / 1e9:.1f} GB; {run['batch']}"
        axes.text(run["whole_seconds"], at, said, va="center", color=TEXT, fontsize=9)
    names = [side if side != "ours" else "ekfac_dist" for _, side, _ in bars]
    axes.set_yticks(places, names, color=TEXT, fontsize=9)
    for row in results:
        first = next(at for at, (name, _, _) in zip(places, bars, strict=True) if name == row)
        axes.text(0, first - 0.6, row, color=TEXT, fontsize=10, weight="bold", va="bottom")
    axes.set_xlim(0, 1.6 * max(run["whole_seconds"] for _, _, run in bars))
    axes.set_ylim(place + 0.6, 0.7)
    axes.set_xlabel("seconds, whole command", color=TEXT, fontsize=9)
    axes.set_title(title, color=TEXT, fontsize=10, loc="left")
    axes.tick_params(colors=TEXT, length=0)
    axes.spines[:].set_visible(False)
    legend = axes.legend(
        ncols=len(COLOURS), loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False
    )
    for word in legend.get_texts():
        word.set_color(TEXT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
