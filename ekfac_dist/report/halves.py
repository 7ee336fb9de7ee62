"""What half of the data would change, as `estimate` and `inspect` show it."""

from collections.abc import Mapping
from typing import Any

from ekfac_dist.curvature.damping import DEFAULT
from ekfac_dist.fit.halves import advice

HEADER = ("½ A", "½ S", "½ Λ", "½ scores")
LEGEND = (
    "½: what factors of half of the data are off, ‖X½ − X‖ / ‖X‖; and how scores from half of the",
    f"data correlate with those from all (damping {DEFAULT:g}), predicted. ?: not known.",
)
_FACTORS = {"input": "A", "output": "S", "lambda": "Λ"}
_NUM_LEAST = 3  # modules that are named


def cells(entry: Mapping[str, Any] | None, module: str) -> list[str]:
    """A module's cells under `HEADER`; none where nothing was measured.

    Args:
        entry: The manifest's entry `halves`; None: the store has none.
        module: The module's name.
    """
    if entry is None:
        return []
    of_module = entry["modules"][module]
    differences = [_percent(of_module[key]) for key in _FACTORS]
    return [*differences, _correlation(of_module["scores"])]


def lines(entry: Mapping[str, Any] | None) -> list[str]:
    """What half of the data would change, and whether more would.

    Args:
        entry: As of `cells`.
    """
    if entry is None:
        return ["halves        not measured: the factors were fitted by an earlier version"]
    of_modules = entry["modules"]
    most = {
        name: max((each[key] for each in of_modules.values() if each[key]), default=None)
        for key, name in _FACTORS.items()
    }
    off = ", ".join(f"{name} up to {_percent(value)}" for name, value in most.items() if value)
    if not off:
        return ["halves        not measured: a half of the data has no sequence"]
    found = [f"halves        factors of half of the sequences are off: {off}"]
    of_default = entry["scores"].get(str(DEFAULT))
    if of_default is None:
        return found
    found.append(
        f"scores        from half of the sequences would correlate with these at about "
        f"{_correlation(of_default['half'])} (damping {DEFAULT:g})"
    )
    by_module = {name: each["scores"] for name, each in of_modules.items()}
    least = sorted((name for name in by_module if by_module[name]), key=lambda n: by_module[n])
    named = ", ".join(f"{name} {_correlation(by_module[name])}" for name in least[:_NUM_LEAST])
    found.append(f"least         {named}")
    sentence = advice(entry)
    return found if sentence is None else [*found, f"more data     {sentence}"]


def draw(axis: Any, entry: Mapping[str, Any]) -> None:
    """Draws what factors of half of the data are off, module by module, on a matplotlib axis.

    Args:
        axis: The axis.
        entry: The manifest's entry `halves`.
    """
    of_modules = list(entry["modules"].values())
    drawn = {name: [each[key] for each in of_modules] for key, name in _FACTORS.items()}
    drawn["1 − correlation of scores"] = [
        None if each["scores"] is None else 1 - each["scores"] for each in of_modules
    ]
    for (name, values), marker in zip(drawn.items(), "os^x", strict=True):
        known = [(k, value) for k, value in enumerate(values) if value]
        if known:
            axis.plot(*zip(*known, strict=True), marker, markersize=3, label=name)
    axis.set(yscale="log", title="half of the data", xlabel="module", ylabel="‖X½ − X‖ / ‖X‖")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.2g} %"


def _correlation(value: float | None) -> str:
    """A correlation with as many digits as tell it from 1."""
    return "?" if value is None else f"{value:.4f}"
