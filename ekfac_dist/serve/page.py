"""The service's page for people: `/` and its assets.

It is made of the report's components, which get the service's answers from scripts of its own. It
loads nothing but its assets, which hold no data and need no token; what it asks for carries the
token.
"""

from importlib import resources

from fastapi import FastAPI, Request, Response

from ekfac_dist.report.html import environment, page_file, require_jinja2, script_text, style_text
from ekfac_dist.report.page import COMPONENTS
from ekfac_dist.report.page import STYLES as REPORT_STYLES
from ekfac_dist.report.page_data import FEW_OF_POSITIONS, FEW_TOKENS
from ekfac_dist.report.spread import CARRIED
from ekfac_dist.serve.security import PAGE_POLICY

STYLES = (*REPORT_STYLES, "service.css")
SCRIPTS = (
    *COMPONENTS,
    "client.js",
    "answers.js",
    "marking.js",
    "form.js",
    "asking.js",
    "service.js",
)
LENGTHS = (1, 4, 8, 16, 32, 64, 128, 256)  # tokens for which the model can go on


def page_routes(app: FastAPI) -> None:
    """Adds the page, `/`, and its assets; none of them needs the service's token.

    Args:
        app: The service; see `docs/service.md` for what the page asks it for.

    Raises:
        ConfigError: If jinja2 is not installed.
    """
    require_jinja2()
    texts = {
        "/": (page_html(), "text/html"),
        "/static/page.css": (style_text(STYLES, service_file), "text/css"),
        "/static/page.js": (script_text(SCRIPTS, service_file), "text/javascript"),
    }

    def asset(request: Request) -> Response:
        content, media_type = texts[request.scope["route"].path]
        return Response(
            content, media_type=media_type, headers={"Content-Security-Policy": PAGE_POLICY}
        )

    for path in texts:
        app.add_api_route(path, asset, methods=["GET"], include_in_schema=False)


def page_html() -> str:
    """The page, which loads `static/page.css` and `static/page.js`."""
    template = environment(service_file).get_template("service.html.j2")
    return template.render(
        carried=CARRIED,
        few_tokens=FEW_TOKENS,
        few_of_positions=FEW_OF_POSITIONS,
        lengths=LENGTHS,
    )


def service_file(name: str) -> str:
    """The text of a file in `page`, or of one of the report's."""
    own = resources.files("ekfac_dist.serve") / "page" / name
    return own.read_text(encoding="utf-8") if own.is_file() else page_file(name)
