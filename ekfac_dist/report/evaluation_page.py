"""The page and the plot of an evaluation; see `html` for what every page has in common."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ekfac_dist.errors import StoreError, UserError
from ekfac_dist.evaluate.results import PAGE, PLOT, RESULTS, read_results
from ekfac_dist.report.evaluation import LDS, columns_of, notes
from ekfac_dist.report.evaluation_rows import families_of, lines_of, row_name
from ekfac_dist.report.evaluation_words import found, measured
from ekfac_dist.report.html import page_text, require_jinja2, require_new_file, write_page
from ekfac_dist.report.lds_plot import lds_plot
from ekfac_dist.runtime.files import write_whole

STYLES = ("lds_plot.css", "evaluation.css")
SCRIPTS = ("plot.js", "evaluation.js")
# Widths of the plot: in the page on a wide and on a narrow screen, and in a file of its own.
_WIDE, _NARROW, _ALONE = 900, 340, 900


def write_evaluation_page(
    evaluation: str | Path, output: str | Path, note: str | None = None
) -> None:
    """Writes the page of an evaluation as a single HTML file.

    Args:
        evaluation: The output directory of an `evaluate` run.
        output: The file to write; it must not exist, and its directory must.
        note: What the page says about its texts; None: nothing.

    Raises:
        ConfigError: If jinja2 is not installed.
        OutputError: If the file exists, or cannot be written; or if there are no results.
        StoreError: If the results lack something.
    """
    require_new_file(Path(output))
    _write_page(Path(evaluation), Path(output), note)


def write_beside(evaluation: str | Path) -> list[str]:
    """Writes the plot and the page of an evaluation into its directory, in place of older ones.

    Returns:
        Lines that say where they are, or why one was not written.
    """
    path, lines = Path(evaluation), []
    writers = ((PLOT, "plot", _write_plot), (PAGE, "page", _write_page))
    for file, name, write in writers:
        try:
            written = write(path, path / file)
        except UserError as error:
            lines.append(f"{name:<14}not written: {error}")
        else:
            if written:
                lines.append(f"{name:<14}{path / file}")
    return lines


def _write_page(path: Path, output: Path, note: str | None = None) -> bool:
    require_jinja2()
    results = read_results(path)
    with _sound(path):
        content = _page(results, note)
    write_page(output, content)
    return True


def _write_plot(path: Path, output: Path) -> bool:
    """Writes the plot, if LDS was measured; otherwise an older one is removed."""
    results = read_results(path)
    with _sound(path):
        if not _has_lds(results):
            with suppress(OSError):
                output.unlink()
            return False
        content = lds_plot(results, _ALONE, alone=True)
    write_whole(output, [content.encode("utf-8"), b"\n"])
    return True


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Says of results that lack something that they do."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise StoreError(
            f"{path / RESULTS} lacks something, or holds something else: {type(error).__name__} "
            f"{error}. Run `evaluate` again; it uses what is there."
        ) from error


def _has_lds(results: Mapping[str, Any]) -> bool:
    return any("lds" in row for row in results["rows"])


def _page(results: Mapping[str, Any], note: str | None) -> str:
    from markupsafe import Markup

    if not results["rows"]:
        raise ValueError("there are no rows")
    columns, has_lds = columns_of(results), _has_lds(results)
    plots = {"wide": _WIDE, "narrow": _NARROW} if has_lds else {}
    return page_text(
        "evaluation.html.j2",
        STYLES,
        SCRIPTS,
        _island(results),
        settings={
            "Model": results["model"],
            "Data": results["data"],
            "Software": results["software"],
            "Configuration": results["config"],
        },
        model=results["config"]["model"]["name"],
        note=note,
        found=found(results),
        facts=measured(results),
        titles=[column.title for column in columns],
        notes=notes(results, columns),
        families=[(family, lines_of(results, family)) for family in families_of(results)],
        plots=[(name, Markup(lds_plot(results, width))) for name, width in plots.items()],
        seeds=_seeds(results),
        has_lds=has_lds,
    )


def _seeds(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of seeds."""
    columns = {
        "seed": "Seed",
        "steps": "Steps",
        "first_loss": "Loss, first epoch",
        "last_loss": "Loss, last epoch",
        "fit_seconds": "Fit, seconds",
        "models": "Retrained models",
        "bank_seconds": "Their training, seconds",
        "removal_models": "Removals",
        "removal_seconds": "Their training, seconds",
    }
    keys = [key for key in columns if all(key in seed for seed in results["seeds"])]
    cells = [[_seed_cell(key, seed[key]) for key in keys] for seed in results["seeds"]]
    return [columns[key] for key in keys], cells


def _seed_cell(key: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if key.endswith("_seconds") else f"{value:.3f}"


def _island(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script reads: the LDS of each query by row, and the queries' texts.

    Raises:
        ValueError: If a row has not as many values as there are queries.
    """
    queries = results["queries"]
    rows = [row for row in results["rows"] if "lds" in row]
    for row in rows:
        if len(row["lds"]["by_query"]) != len(queries):
            raise ValueError(
                f"row {row['key']} has {len(row['lds']['by_query'])} queries of {len(queries)}"
            )
    ordered = sorted(range(len(rows)), key=lambda k: -rows[k]["lds"]["mean"])
    plain = next((k for k in ordered if rows[k]["key"] == results.get("plain")), None)
    first = ordered[1:2] if plain is None else [plain]
    second = [k for k in ordered if k not in first]
    return {
        "rows": [
            {"name": row_name(row), "text": LDS.of(row), "by_query": row["lds"]["by_query"]}
            for row in rows
        ],
        # The rows that are compared at first: plain EK-FAC at its best damping, and the best other.
        "pair": [*first, *second, *ordered][:2],
        "queries": [{"group": query["group"], "members": query["members"]} for query in queries],
    }
