"""Pages: each a single HTML file that loads nothing else, made of the files in `page`.

Text from data never becomes markup, and never reorders the text beside it. Jinja escapes what it
inserts, with unsafe characters made visible. Everything else is stored in script elements that
browsers do not execute, data islands, from which the page's script makes text nodes. The file's
content security policy allows its own style and script and nothing else.

Knows no results.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekfac_dist.errors import ConfigError, OutputError
from ekfac_dist.runtime.files import write_whole
from ekfac_dist.runtime.terminal import visible

if TYPE_CHECKING:
    from jinja2 import Environment

# Of every page; each script may use those before it.
_STYLES = ("colours.css", "base.css")
_SCRIPTS = ("base.js",)

Facts = list[tuple[str, str]]  # (name, value) as shown


def page_text(
    template: str,
    styles: Sequence[str],
    scripts: Sequence[str],
    island: Any,
    *,
    settings: Mapping[str, Mapping[str, Any]],
    **values: Any,
) -> str:
    """A page's HTML.

    Args:
        template: Name of its template, which extends base.html.j2.
        styles: Names of its style sheets, after those of every page.
        scripts: Names of its scripts, joined after those of every page.
        island: What its script reads, as types that JSON has.
        settings: Groups of nested fields, shown at its end.
        values: What its template inserts, beside these.

    Raises:
        ConfigError: If jinja2 is not installed.
        ValueError: If the island holds NaN or infinity.
    """
    require_jinja2()
    from markupsafe import Markup

    style, script = style_text(styles), script_text(scripts)
    return (
        environment()
        .get_template(template)
        .render(
            style=Markup(style),
            style_hash=_policy_hash(style),
            script=Markup(script),
            script_hash=_policy_hash(script),
            island=Markup(island_text(island)),
            settings=[(title, _entries(group)) for title, group in settings.items()],
            **values,
        )
    )


def style_text(styles: Sequence[str], read: Callable[[str], str] | None = None) -> str:
    """Style sheets of a page, after those of every page, as one.

    Args:
        styles: Their names.
        read: Gives a file's text by its name; None: `page_file`.
    """
    return "\n".join(map(read or page_file, (*_STYLES, *styles)))


def script_text(scripts: Sequence[str], read: Callable[[str], str] | None = None) -> str:
    """Scripts of a page, after those of every page, as one whose names stay within it.

    Args:
        scripts: Their names.
        read: Gives a file's text by its name; None: `page_file`.
    """
    files = map(read or page_file, (*_SCRIPTS, *scripts))
    return "\n".join(["(() => {", '"use strict";', *files, "})();"])


def environment(read: Callable[[str], str] | None = None) -> "Environment":
    """What templates are rendered by: all that they insert is escaped, and made visible.

    Args:
        read: Gives a template's text by its name; None: `page_file`.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_with_visible_characters,
        loader=FunctionLoader(read or page_file),
    )


def write_page(output: Path, content: str) -> None:
    """Writes a page; an existing file is replaced.

    Raises:
        OutputError: If it cannot be written.
    """
    # A lone surrogate can occur in JSON, but cannot be encoded in UTF-8.
    write_whole(output, [content.encode("utf-8", errors="xmlcharrefreplace")])


def island_text(value: Any) -> str:
    """JSON for a <script> element: ASCII only, without characters that are special in HTML.

    Raises:
        ValueError: If the value holds NaN or infinity.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def require_new_file(output: Path) -> None:
    """Refuses a file that exists, or whose directory is not there or cannot be written.

    Raises:
        OutputError: If that is so.
    """
    if os.path.lexists(output):
        raise OutputError(f"output {output} exists already; give another file, or remove it.")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise OutputError(
            f"output {output}: there is no folder {folder}. Make it, or give another."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"output {output}: folder {folder} cannot be written. Give another.")


def require_jinja2() -> None:
    """Refuses to make a page without jinja2.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "The report needs jinja2; install it with: pip install 'ekfac_dist[report]'."
        ) from error


def page_file(name: str) -> str:
    """The text of a file in `page`."""
    return (resources.files("ekfac_dist.report") / "page" / name).read_text(encoding="utf-8")


def _with_visible_characters(value: Any) -> Any:
    """A value that the template inserts; unsafe characters of a plain string are made visible."""
    from markupsafe import Markup

    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _policy_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _entries(group: Mapping[str, Any]) -> Facts:
    return [(name, _value_text(value)) for name, value in _flat(group).items()]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
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
