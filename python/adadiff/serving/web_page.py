"""The web page at /: the files in page/, served unchanged, with a content security policy that limits the browser to
them and to this service."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
PAGE = "page.html"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No inline code, nothing from other sites, no embedding in frames, and text never becomes markup.
CONTENT_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # may be cached, but is revalidated; with the ETag, that transfers no body
}


@dataclass(frozen=True)
class File:
    content: bytes
    kind: str
    tag: str  # ETag

    @staticmethod
    def read(path: Path) -> "File":
        content = path.read_bytes()
        return File(content, KINDS[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def answer(self, known: str | None) -> Response:
        """The response: 304 if `known`, the header If-None-Match, contains the file's ETag."""
        headers = {**HEADERS, "ETag": self.tag}
        tags = {tag.strip().removeprefix("W/") for tag in (known or "").split(",")}
        if self.tag in tags or "*" in tags:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers | {"Content-Type": self.kind})


def files() -> dict[str, File]:
    """Files of the page by name, read once. Names in requests are only looked up here, never opened."""
    return {path.name: File.read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS}


def add_page(app: FastAPI) -> None:
    """Adds the routes / and /page/NAME. They need no API key; the page asks for the key that the API needs."""
    known = files()

    async def page(request: Request) -> Response:
        return known[PAGE].answer(request.headers.get("if-none-match"))

    async def part(name: str, request: Request) -> Response:
        if name not in known:
            raise HTTPException(404)
        return known[name].answer(request.headers.get("if-none-match"))

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/page/{name}", part, methods=["GET", "HEAD"], include_in_schema=False)
