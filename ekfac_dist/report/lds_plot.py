"""The plot of an evaluation: LDS by damping for each method, with intervals and the noise ceiling.

     LDS │        ·  ·  ·  root of the ceiling
         │  ───────────── noise ceiling
         │  ▲ ●    ● ■    ● ■      one column for each damping; in it, methods in
         │ ┼────   ────   ────     the order of the legend
           none    0.1     10

An SVG, of elements with class names; their style is page/lds_plot.css.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from ekfac_dist.report.evaluation import LDS, ceiling_root, number_text
from ekfac_dist.report.evaluation_rows import Family, families_of, row_name
from ekfac_dist.report.html import page_file
from ekfac_dist.runtime.terminal import visible

NUM_COLOURS, NUM_SHAPES = 8, 7  # coprime, so that 56 methods differ in one of both
_LEFT, _RIGHT, _TOP, _HEIGHT, _BELOW = 44, 12, 18, 280, 46
_ENTRY_WIDTH, _ENTRY_HEIGHT, _NAME_LENGTH = 220, 20, 28


@dataclass(frozen=True)
class _Scale:
    """Where values are on the y axis.

    Attributes:
        low: Value at the lower end.
        high: Value at the upper end.
        step: Distance of two grid lines.
    """

    low: float
    high: float
    step: float

    def y(self, value: float) -> float:
        return _TOP + (self.high - value) / (self.high - self.low) * _HEIGHT

    def grid(self) -> list[float]:
        first, last = round(self.low / self.step), round(self.high / self.step)
        return [k * self.step for k in range(first, last + 1)]


def lds_plot(results: Mapping[str, Any], width: int, *, alone: bool = False) -> str:
    """The plot as an <svg> element.

    Args:
        results: The results of an evaluation with LDS.
        width: Width in CSS pixels.
        alone: Whether it is a file of its own, with its style inside, for light paper; otherwise
            the style is that of the page around it.
    """
    families = [family for family in families_of(results) if any("lds" in r for r in family.rows)]
    scale = _scale(results, families)
    columns = max(1, (width - _LEFT) // _ENTRY_WIDTH)
    legend_rows = -(-len(families) // columns)
    height = _TOP + _HEIGHT + _BELOW + legend_rows * _ENTRY_HEIGHT + 8
    svg = Element(
        "svg",
        {
            "class": "lds-plot",
            "width": str(width),
            "height": str(height),
            "viewBox": f"0 0 {width} {height}",
            "role": "img",
            "aria-label": "LDS of each method by damping, with 95 % intervals; the table has the "
            "same numbers",
        },
    )
    if alone:
        svg.set("xmlns", "http://www.w3.org/2000/svg")
        SubElement(svg, "style").text = _style_alone()
        _add(svg, "rect", "paper", width=width, height=height)
    right = width - _RIGHT
    for value in scale.grid():
        kind = "zero" if abs(value) < scale.step / 2 else "grid"
        _add(svg, "path", kind, d=f"M{_LEFT} {scale.y(value):.1f}H{right}")
        _text(svg, _LEFT - 6, scale.y(value) + 4, f"{value:.2g}".replace("-", "−"), "end")
    _text(svg, 4, 11, "LDS", "start")
    if results["ceiling"] is not None:
        _draw_ceiling(svg, results["ceiling"], scale, right)
    places = _draw_columns(svg, families, right)
    for number, family in enumerate(families):
        _draw_family(svg, family, number, places, scale)
        column, row = number % columns, number // columns
        x, y = _LEFT + column * _ENTRY_WIDTH, _TOP + _HEIGHT + _BELOW + row * _ENTRY_HEIGHT + 8
        group = SubElement(svg, "g", {"class": _classes(number)})
        _add(group, "path", "dot", d=_marker(number, x + 6, y))
        _text(svg, x + 18, y + 4, _shortened(family.name), "start", "name")
    return ElementTree.tostring(svg, encoding="unicode")


def _scale(results: Mapping[str, Any], families: Sequence[Family]) -> _Scale:
    estimates = [row["lds"] for family in families for row in family.rows if "lds" in row]
    values = [estimate[end] for estimate in estimates for end in ("low", "mean", "high")]
    if results["ceiling"] is not None:
        ceiling = results["ceiling"]
        values += [ceiling["low"], ceiling["high"], ceiling_root(ceiling)]
    low, high = min(0.0, *values), max(0.1, *values)
    steps = (step for step in (0.05, 0.1, 0.2) if (high - low) / step <= 9)
    step = next(steps, 0.5)
    return _Scale(step * math.floor(low / step), step * math.ceil(high / step), step)


def _draw_ceiling(svg: Element, ceiling: Mapping[str, float], scale: _Scale, right: int) -> None:
    top, bottom = scale.y(ceiling["high"]), scale.y(ceiling["low"])
    _add(svg, "rect", "band", x=_LEFT, y=top, width=right - _LEFT, height=bottom - top)
    for value, kind, name, shift in (
        (ceiling["mean"], "ceiling", "noise ceiling", 13),
        (ceiling_root(ceiling), "root", "root of the ceiling", -5),
    ):
        line = _add(svg, "path", kind, d=f"M{_LEFT} {scale.y(value):.1f}H{right}")
        SubElement(line, "title").text = f"{name}: {number_text(value)}"
        _text(svg, right, scale.y(value) + shift, f"{name} {number_text(value)}", "end")


def _draw_columns(
    svg: Element, families: Sequence[Family], right: int
) -> dict[tuple[float | None, int], float]:
    """Draws the columns' names; returns the x of each damping and number of a family in it."""
    members: dict[float | None, list[int]] = {}
    for number, family in enumerate(families):
        for row in family.rows:
            if "lds" in row:
                members.setdefault(row["damping"], []).append(number)
    dampings = sorted(members, key=lambda damping: (damping is not None, damping or 0))
    slot = (right - _LEFT) / sum(len(members[damping]) + 1 for damping in dampings)
    places, start, bottom = {}, float(_LEFT), _TOP + _HEIGHT
    for damping in dampings:
        width = (len(members[damping]) + 1) * slot
        if start > _LEFT:
            _add(svg, "path", "grid", d=f"M{start:.1f} {_TOP}V{bottom}")
        name = "none" if damping is None else f"{damping:g}"
        _text(svg, start + width / 2, bottom + 16, name, "middle", "name")
        for k, number in enumerate(members[damping]):
            places[damping, number] = start + (k + 1) * slot
        start += width
    middle = (_LEFT + right) / 2
    _text(svg, middle, bottom + 34, "damping, as a multiple of mean(Λ)", "middle")
    return places


def _draw_family(
    svg: Element,
    family: Family,
    number: int,
    places: Mapping[tuple[float | None, int], float],
    scale: _Scale,
) -> None:
    rows = [row for row in family.rows if "lds" in row]
    group = SubElement(svg, "g", {"class": _classes(number)})
    points = [(places[r["damping"], number], scale.y(r["lds"]["mean"])) for r in rows]
    if len(points) > 1:
        _add(group, "path", "line", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points))
    for row, (x, y) in zip(rows, points, strict=True):
        mark = SubElement(group, "g")
        SubElement(mark, "title").text = visible(f"{row_name(row)}: LDS {LDS.of(row)}")
        low, high = scale.y(row["lds"]["low"]), scale.y(row["lds"]["high"])
        _add(mark, "path", "interval", d=f"M{x:.1f} {low:.1f}V{high:.1f}")
        kind = "dot best" if row["key"] == family.best else "dot"
        _add(mark, "path", kind, d=_marker(number, x, y))


def _marker(number: int, x: float, y: float, r: float = 4.5) -> str:
    """A path around a point; its shape is the family's."""
    shape = number % NUM_SHAPES
    if shape == 0:
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"
    plus: list[tuple[float, float]] = [(-2, -6), (2, -6), (2, -2), (6, -2), (6, 2), (2, 2)]
    plus += [(-dx, -dy) for dx, dy in plus]
    corners: dict[int, list[tuple[float, float]]] = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -r - 1), (r + 1, r), (-r - 1, r)],
        3: [(0, -r - 2), (r + 2, 0), (0, r + 2), (-r - 2, 0)],
        4: [(0, r + 1), (r + 1, -r), (-r - 1, -r)],
        5: plus,
        6: [((dx - dy) / 2**0.5, (dx + dy) / 2**0.5) for dx, dy in plus],
    }
    return "M" + "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in corners[shape]) + "Z"


def _classes(number: int) -> str:
    return f"method colour-{number % NUM_COLOURS}"


def _add(parent: Element, tag: str, kind: str, **attributes: object) -> Element:
    return SubElement(
        parent, tag, {"class": kind, **{name: _number(v) for name, v in attributes.items()}}
    )


def _text(parent: Element, x: float, y: float, text: str, anchor: str, kind: str = "") -> None:
    attributes = {"x": _number(x), "y": _number(y), "text-anchor": anchor}
    if kind:
        attributes["class"] = kind
    SubElement(parent, "text", attributes).text = visible(text)


def _number(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def _style_alone() -> str:
    """The style with the values of its variables in their place, which not every viewer knows."""
    light = page_file("colours.css").partition("@media")[0]
    values = {name: " ".join(v.split()) for name, v in re.findall(r"--(\w+): ([^;]+);", light)}
    style = page_file("lds_plot.css").partition("@media")[0]
    return re.sub(r"var\(--(\w+)\)", lambda match: values[match[1]], style)
