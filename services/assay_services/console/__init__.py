"""The page for operators, at `/console`: plain files, no build step; it asks the same routes as any other caller."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, RedirectResponse

_FOLDER = Path(__file__).parent
_KINDS = {"index.html": "text/html", "console.css": "text/css", "console.js": "text/javascript"}
# Nothing from elsewhere, nothing inline, and no other page may frame it: it can move aliases.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PATHS = ("/", "/console", "/console/console.css", "/console/console.js")


def console_routes() -> APIRouter:
    """Files that hold nothing of the deployment, so they need no key; what the page asks for does."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def root() -> RedirectResponse:
        return RedirectResponse("/console")

    def file(name: str) -> FileResponse:
        return FileResponse(_FOLDER / name, media_type=_KINDS[name], headers=_HEADERS)

    @routes.get("/console")
    def page() -> FileResponse:
        return file("index.html")

    @routes.get("/console/console.css")
    def style() -> FileResponse:
        return file("console.css")

    @routes.get("/console/console.js")
    def script() -> FileResponse:
        return file("console.js")

    return routes
