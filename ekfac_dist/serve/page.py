"""The page for people, at `/`."""

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from ekfac_dist.serve.security import PAGE_POLICY

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ekfac-dist</title></head>
<body><h1>ekfac-dist</h1>
<p>Questions go to <a href="/docs">this service's operations</a>.</p></body></html>
"""


def page_routes(app: FastAPI) -> None:
    """Adds the page and its files to an application."""

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(_PAGE, headers={"content-security-policy": PAGE_POLICY})
