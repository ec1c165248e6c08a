"""The page at `/`: a playground, in three files that a browser takes as they are."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from jaxserve.server.openapi import Operation, describes

FILES = Path(__file__).parent.parent / "static"
# The page loads nothing and talks to nobody but this server, and nobody may show it within another page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser asks each time whether a file is still the same
}


class _Files(StaticFiles):
    def file_response(self, *arguments: object, **keywords: object) -> Response:
        response = super().file_response(*arguments, **keywords)  # type: ignore[arg-type]
        response.headers.update(_HEADERS)
        return response


@describes(Operation(summary="The playground", answers="text/html"))
async def index(request: Request) -> Response:
    return FileResponse(FILES / "index.html", headers=_HEADERS)


ROUTES = [
    Route("/", index, methods=["GET"]),
    Mount("/static", _Files(directory=FILES)),
]
