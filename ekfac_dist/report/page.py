"""The report: one HTML file that shows a `query` run's results, without a network.

Text from data never becomes markup, nor reorders what stands beside it. Jinja escapes what it
places, with unsafe characters made visible; everything else lies in two islands that no browser
executes, one of JSON and one of base64, and the page's script makes text nodes of it. The file's
content security policy allows its own style and script and no other thing.
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

# One script, in the order in which its parts need each other.
SCRIPTS = ("base.js", "data.js", "ranking.js", "sequence.js", "layers.js", "spread.js", "page.js")

Facts = list[tuple[str, str]]


def write_report(results: str | Path, output: str | Path) -> None:
    """Writes the page of a run's results: one HTML file that needs nothing beside it.

    Args:
        results: The output directory of a `query` run.
        output: The file to write; it must not exist, its folder must.

    Raises:
        ConfigError: jinja2 is not installed.
        OutputError: The file exists, or cannot be written.
        StoreError: The results are missing, incomplete or changed, or do not fit each other.
    """
    template = _template()
    output = Path(output)
    _check_output(output)
    reader = ResultsReader(results)
    try:
        content = _page(template, reader.manifest, page_data(reader))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise StoreError(
            f"{results}: a file lacks something, or holds something else: "
            f"{type(error).__name__} {error}. Run `query` again."
        ) from error
    # A lone half of a surrogate pair can stand in JSON; in UTF-8 it cannot.
    write_whole(output, [content.encode("utf-8", errors="xmlcharrefreplace")])


def island(value: Any) -> str:
    """JSON that can stand in a <script>: pure ASCII, without a character that HTML reads."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _check_output(output: Path) -> None:
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
        finalize=_visible,
    )
    return environment.from_string(_part("page.html.j2"))


def _visible(value: Any) -> Any:
    """What the template places: text without characters that act on what stands beside it."""
    from markupsafe import Markup

    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _part(name: str) -> str:
    return (resources.files("ekfac_dist.report") / "page" / name).read_text(encoding="utf-8")


def _page(template: "Template", manifest: Mapping[str, Any], data: PageData) -> str:
    from markupsafe import Markup

    style = _part("page.css")
    script = "\n".join(["(() => {", '"use strict";', *map(_part, SCRIPTS), "})();"])
    return template.render(
        manifest=manifest,
        data=data,
        facts=_facts(manifest),
        settings=_settings(manifest),
        differs=manifest["model"].get("differs", []),
        not_compared=manifest["model"].get("not_compared", []),
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
    """What a score means, in a few words each; shown at the top."""
    factors, damping, scan = manifest["factors"], manifest["damping"], manifest["scan"]
    labels = {"sampled": f"labels sampled, seed {factors['seed']}", "data": "the data's labels"}
    value = f"{damping['value']:g}"
    normalize, size = manifest["scores"]["normalize"], manifest["scores"]["training_size"]
    strength = f"λ = {value} × mean Λ" if damping["kind"] == "relative" else f"λ = {value}"
    if damping["modules"]:
        strength += f"; other for {', '.join(damping['modules'])}"
    return [
        ("Fisher", f"{factors['fisher']} ({labels.get(factors['labels'], factors['labels'])})"),
        ("Damping", strength),
        ("Normalisation", NORMALIZE_NAMES.get(normalize, normalize)),
        ("Gradients", _scan(scan)),
        *([] if size is None else [("Training size", f"{size:,}")]),
    ]


def _scan(scan: Mapping[str, Any]) -> str:
    if scan["rank"] is None:
        return "exact"
    if not scan["rescored"]:
        return f"of rank {scan['rank']}, approximate"
    return f"of rank {scan['rank']}; scored again exactly: {rescored(scan)}"


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, Facts]]:
    """Everything that the manifest says, in groups."""
    damping, scan = manifest["damping"], manifest["scan"]
    with_queries = ("spearman", "spearman_top", "overlap")  # which stand beside each query
    run = ("top_k", "bottom_k", "per_token", "workers", "seconds")
    groups = {
        "Model": manifest["model"],
        "Factors": {k: v for k, v in manifest["factors"].items() if not isinstance(v, dict)},
        "Data": manifest["data"],
        "Scores": manifest["scores"],
        "Scan": {name: value for name, value in scan.items() if name not in with_queries},
        "Damping": {"kind": damping["kind"], "value": damping["value"], **damping["modules"]},
        "λ of each module": damping["absolute"],
        "Run": {name: manifest[name] for name in run},
        "Software": manifest["software"],
        "Configuration": manifest["config"],
    }
    return [
        (title, [(name, _plain(value)) for name, value in _flat(group).items()])
        for title, group in groups.items()
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


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
