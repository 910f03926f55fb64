"""The pages that the server itself serves: what they may load is decided by hashes, computed at start-up."""

import base64
import hashlib
import html
import importlib.resources
import re
from collections.abc import Iterable, Sequence

import msgspec
from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from omniserve.base.serving import ServerOptions

_ORIGIN = re.compile(r"https?://[\w.-]+(:\d{1,5})?|https?://\[[\da-fA-F:]+\](:\d{1,5})?", re.ASCII)
_DOCS = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>omniserve: endpoints</title>
<h1>omniserve: endpoints</h1>
<table><tr><th>method</th><th>path</th><th>what it is</th></tr>ROWS</table>
<p>Bodies and answers are described in <a href="openapi.json">openapi.json</a>.</p>
</html>
"""


def add_pages(app: FastAPI, options: ServerOptions) -> None:
    """Add the schema, the list of endpoints and, unless `--no-ui`, the web page."""

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(msgspec.json.encode(app.openapi()), media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        text = _DOCS.replace("ROWS", "".join(_row(*row) for row in _listed(app)))
        return HTMLResponse(text, headers=page_headers(text))

    if not options.ui:
        return
    page = web_page()
    headers = page_headers(page, peers(options))

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=headers)


def web_page() -> str:
    """Return the web page: one file that needs no other."""
    return importlib.resources.files("omniserve.server").joinpath("static/index.html").read_text("utf-8")


def peers(options: ServerOptions) -> tuple[str, ...]:
    """Return the origins among `--allowed-origins`: servers whose pages may call this one, and that its page may."""
    return tuple(origin for origin in options.allowed_origins if _ORIGIN.fullmatch(origin))


def page_headers(text: str, connect: Iterable[str] = ()) -> dict[str, str]:
    """Return the headers of a page that may load nothing but what stands in it, and call this server and `connect`."""
    reachable = " ".join(("'self'", *connect))
    policy = (
        f"default-src 'none'; script-src {_hashes('script', text)}; style-src {_hashes('style', text)}; "
        f"connect-src {reachable}; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def _hashes(tag: str, text: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in found]
    return " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"


def _listed(app: FastAPI) -> Sequence[tuple[str, str, str]]:
    rows = [("GET, HEAD", "/metrics", "Prometheus' text format.")]
    for path, methods in app.openapi()["paths"].items():
        rows += [(method.upper(), path, about.get("description", "")) for method, about in methods.items()]
    return sorted(rows, key=lambda row: row[1])


def _row(method: str, path: str, about: str) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in (method, path, about)) + "</tr>"
