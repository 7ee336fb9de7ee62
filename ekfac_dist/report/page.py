"""The report: a page that shows a `query` run's results; see `html`.

The texts and lists are its island; token scores are a second one, of base64.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ekfac_dist.curvature.damping import SCALES
from ekfac_dist.errors import StoreError
from ekfac_dist.influence.results import Results, ResultsReader
from ekfac_dist.report.answers import low_rank_gradients, rescored
from ekfac_dist.report.html import Facts, page_text, require_jinja2, require_new_file, write_page
from ekfac_dist.report.page_data import FEW_OF_POSITIONS, FEW_TOKENS, page_data

NORMALIZE_NAMES = {
    "none": "none",
    "cosine": "cosine",
    "relatif_l": "RelatIF, ℓ",
    "relatif_theta": "RelatIF, θ",
}
STYLES = ("page.css",)
# What shows one query's lists and the chosen sequence, of whatever `useData` gives it.
COMPONENTS = (
    "plot.js",
    "data.js",
    "query.js",
    "ranking.js",
    "sequence.js",
    "layers.js",
    "spread.js",
    "work.js",
)
SCRIPTS = (*COMPONENTS, "islands.js", "page.js")


def write_report(results: str | Path, output: str | Path, note: str | None = None) -> None:
    """Writes the report of a run's results as a single HTML file.

    Args:
        results: The output directory of a `query` run.
        output: The file to write; it must not exist, and its directory must.
        note: What the page says about its texts, such as where they come from; None: nothing.

    Raises:
        ConfigError: If jinja2 is not installed.
        OutputError: If the file exists, or cannot be written.
        StoreError: If the results are missing, incomplete, changed or inconsistent.
    """
    require_jinja2()
    output = Path(output)
    require_new_file(output)
    reader = ResultsReader(results)
    try:
        content = report_text(reader, note)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StoreError(
            f"{results}: a file lacks something, or holds something else: "
            f"{type(error).__name__} {error}. Run `query` again."
        ) from error
    write_page(output, content)


def report_text(results: Results, note: str | None = None) -> str:
    """The report of results as HTML that loads nothing else.

    Args:
        results: The results.
        note: As of `write_report`.

    Raises:
        ConfigError: If jinja2 is not installed.
        StoreError: As of `page_data`.
    """
    require_jinja2()
    from markupsafe import Markup

    manifest, data = results.manifest, page_data(results)
    return page_text(
        "page.html.j2",
        STYLES,
        SCRIPTS,
        data.json(),
        settings=_settings(manifest),
        manifest=manifest,
        data=data,
        note=note,
        facts=_facts(manifest),
        differs=manifest["model"].get("differs", []),
        not_compared=manifest["model"].get("not_compared", []),
        convergence=(manifest.get("refine") or {}).get("convergence"),
        few_tokens=FEW_TOKENS,
        few_of_positions=FEW_OF_POSITIONS,
        arrays=Markup(data.arrays),
    )


def _facts(manifest: Mapping[str, Any]) -> Facts:
    """What the scores mean, in a few words each, for the top of the page."""
    factors, damping, scan = manifest["factors"], manifest["damping"], manifest["scan"]
    labels = {"sampled": f"labels sampled, seed {factors['seed']}", "data": "the data's labels"}
    value = f"{damping['value']:g}"
    normalize, size = manifest["scores"]["normalize"], manifest["scores"]["training_size"]
    refine = manifest.get("refine")  # not in results of earlier versions
    strength = f"λ = {value}"
    if damping["kind"] == "relative":
        strength += f" × {SCALES[damping.get('scale', 'mean')]}"
    if damping["modules"]:
        strength += f"; other for {', '.join(damping['modules'])}"
    return [
        ("Fisher", f"{factors['fisher']} ({labels.get(factors['labels'], factors['labels'])})"),
        ("Damping", strength),
        ("Normalisation", NORMALIZE_NAMES.get(normalize, normalize)),
        ("Gradients", _gradients_text(scan)),
        *([] if refine is None else [("Refined", refine["solved"])]),
        *([] if manifest["per_token"] == "none" else [("Tokens", _tokens_text(manifest))]),
        *([] if size is None else [("Training size", f"{size:,}")]),
    ]


def _tokens_text(manifest: Mapping[str, Any]) -> str:
    if manifest.get("tokens") == "outputs":
        return "shaded by what the loss of predicting each does"
    return "shaded by what reading each adds"


def _gradients_text(scan: Mapping[str, Any]) -> str:
    low_rank = low_rank_gradients(scan)
    if low_rank is None:
        return "exact"
    if not scan["rescored"]:
        return f"{low_rank}, approximate"
    return f"{low_rank}; scored again exactly: {rescored(scan)}"


def _settings(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """All entries of the manifest, in groups."""
    damping, scan = manifest["damping"], manifest["scan"]
    per_query = ("spearman", "spearman_top", "overlap")  # shown beside each query instead
    run = ("top_k", "bottom_k", "per_token", "tokens", "workers", "seconds")
    groups = {
        "Model": manifest["model"],
        "Factors": {k: v for k, v in manifest["factors"].items() if not isinstance(v, dict)},
        "Data": manifest["data"],
        "Scores": manifest["scores"],
        "Refinement": {k: v for k, v in (manifest.get("refine") or {}).items() if k != "residuals"},
        "Scan": {name: value for name, value in scan.items() if name not in per_query},
        "Damping": {
            **{name: damping[name] for name in ("kind", "scale", "value") if name in damping},
            **damping["modules"],
        },
        "λ of each module": damping["absolute"],
        "Run": {name: manifest[name] for name in run if name != "tokens" or name in manifest},
        "Software": manifest["software"],
        "Configuration": manifest["config"],
    }
    return {title: group for title, group in groups.items() if group}
