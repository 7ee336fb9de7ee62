"""The report: a single HTML file that shows a `query` run's results and loads nothing else.

Text from data never becomes markup, and never reorders the text beside it. Jinja escapes what it
inserts, with unsafe characters made visible. Everything else is stored in two script elements that
browsers do not execute, data islands of JSON and of base64, from which the page's script makes text
nodes. The file's content security policy allows its own style and script and nothing else.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekfac_dist.errors import ConfigError, OutputError, StoreError
from ekfac_dist.influence.answer import NORMALIZE_NAMES
from ekfac_dist.influence.results import ResultsReader
from ekfac_dist.report.answers import rescored
from ekfac_dist.report.page_data import FEW_OF_POSITIONS, FEW_TOKENS, PageData, page_data
from ekfac_dist.runtime.files import write_whole
from ekfac_dist.runtime.terminal import visible

if TYPE_CHECKING:
    from jinja2 import Template

# Files that are joined into the page's script; each may use those before it.
SCRIPTS = ("base.js", "data.js", "ranking.js", "sequence.js", "layers.js", "spread.js", "page.js")

Facts = list[tuple[str, str]]  # (name, value) as shown


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
    template = _template()
    output = Path(output)
    _require_new_file(output)
    reader = ResultsReader(results)
    try:
        content = _page(template, reader.manifest, page_data(reader), note)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StoreError(
            f"{results}: a file lacks something, or holds something else: "
            f"{type(error).__name__} {error}. Run `query` again."
        ) from error
    # A lone surrogate can occur in JSON, but cannot be encoded in UTF-8.
    write_whole(output, [content.encode("utf-8", errors="xmlcharrefreplace")])


def island(value: Any) -> str:
    """JSON for a <script> element: ASCII only, without characters that are special in HTML."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _require_new_file(output: Path) -> None:
    if os.path.lexists(output):
        raise OutputError(f"output {output} exists already; give another file, or remove it.")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise OutputError(
            f"output {output}: there is no folder {folder}. Make it, or give another."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"output {output}: folder {folder} cannot be written. Give another.")


def _template() -> "Template":
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ConfigError(
            "The report needs jinja2; install it with: pip install 'ekfac_dist[report]'."
        ) from error
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_with_visible_characters,
    )
    return environment.from_string(_page_file("page.html.j2"))


def _with_visible_characters(value: Any) -> Any:
    """A value that the template inserts; unsafe characters of a plain string are made visible."""
    from markupsafe import Markup

    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _page_file(name: str) -> str:
    return (resources.files("ekfac_dist.report") / "page" / name).read_text(encoding="utf-8")


def _page(
    template: "Template", manifest: Mapping[str, Any], data: PageData, note: str | None
) -> str:
    from markupsafe import Markup

    style = _page_file("page.css")
    script = "\n".join(["(() => {", '"use strict";', *map(_page_file, SCRIPTS), "})();"])
    return template.render(
        manifest=manifest,
        data=data,
        note=note,
        facts=_facts(manifest),
        settings=_settings(manifest),
        differs=manifest["model"].get("differs", []),
        not_compared=manifest["model"].get("not_compared", []),
        convergence=(manifest.get("refine") or {}).get("convergence"),
        few_tokens=FEW_TOKENS,
        few_of_positions=FEW_OF_POSITIONS,
        style=Markup(style),
        style_hash=_policy_hash(style),
        script=Markup(script),
        script_hash=_policy_hash(script),
        island=Markup(island(data.json())),
        arrays=Markup(data.arrays),
    )


def _policy_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _facts(manifest: Mapping[str, Any]) -> Facts:
    """What the scores mean, in a few words each, for the top of the page."""
    factors, damping, scan = manifest["factors"], manifest["damping"], manifest["scan"]
    labels = {"sampled": f"labels sampled, seed {factors['seed']}", "data": "the data's labels"}
    value = f"{damping['value']:g}"
    normalize, size = manifest["scores"]["normalize"], manifest["scores"]["training_size"]
    refine = manifest.get("refine")  # not in results of earlier versions
    strength = f"λ = {value} × mean Λ" if damping["kind"] == "relative" else f"λ = {value}"
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
    if scan["rank"] is None:
        return "exact"
    if not scan["rescored"]:
        return f"of rank {scan['rank']}, approximate"
    return f"of rank {scan['rank']}; scored again exactly: {rescored(scan)}"


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, Facts]]:
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
        "Damping": {"kind": damping["kind"], "value": damping["value"], **damping["modules"]},
        "λ of each module": damping["absolute"],
        "Run": {name: manifest[name] for name in run if name != "tokens" or name in manifest},
        "Software": manifest["software"],
        "Configuration": manifest["config"],
    }
    return [
        (title, [(name, _value_text(value)) for name, value in _flat(group).items()])
        for title, group in groups.items()
        if group
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _value_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
