"""The table and the plot of `fit.py`, from its runs.

`results` is {row: {side: [report, …]}} throughout: of each run what `peer_sides.run` returns.
"""

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


def markdown(results):
    """A table in markdown: median runs, and ours over each peer's.

    Passes, where compared, are the two over the data, without the decomposition between them.
    """
    on_device = any(
        "device_peak_bytes" in r[0] for sides in results.values() for r in sides.values()
    )
    header = ["work", "side", "whole, s", *(f"{name}, s" for name in PASSES)]
    header.append("peak on the GPU, GB" if on_device else "peak, GB")
    header += ["ours / its time", "/ its passes", "/ its peak"]
    lines = [header, ["---", "---"] + ["---:"] * (len(header) - 2)]
    for row, sides in results.items():
        medians = {side: median_run(runs) for side, runs in sides.items()}
        for side, run in medians.items():
            cells = [row, side, f"{run['whole_seconds']:.2f}"]
            cells += [f"{run['passes'][name]:.2f}" for name in PASSES]
            cells.append(f"{peak_bytes(run) / 1e9:.2f}")
            measures = (whole_seconds, seconds_of_passes, peak_bytes)
            if side == "ours":
                cells += [""] * len(measures)
            else:
                ours = medians["ours"]
                cells += [f"{measure(ours) / measure(run):.2f}" for measure in measures]
            lines.append(cells)
    return _joined(lines)


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
        said = f" {run['whole_seconds']:.1f} s, {peak_bytes(run) / 1e9:.1f} GB"
        axes.text(run["whole_seconds"], at, said, va="center", color=TEXT, fontsize=9)
    names = [side if side != "ours" else "ekfac_dist" for _, side, _ in bars]
    axes.set_yticks(places, names, color=TEXT, fontsize=9)
    for row in results:
        first = next(at for at, (name, _, _) in zip(places, bars, strict=True) if name == row)
        axes.text(0, first - 0.6, row, color=TEXT, fontsize=10, weight="bold", va="bottom")
    axes.set_xlim(0, 1.2 * max(run["whole_seconds"] for _, _, run in bars))
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
