"""A request's body as JSON, within limits of size, depth and time."""

import asyncio
import json
import re
from collections import Counter
from typing import Any

from starlette.requests import ClientDisconnect, Request

from .errors import ServiceError, invalid, shown
from .settings import Settings

# Strings are matched as a whole, so that brackets in them do not count. An unterminated string extends to the end of
# the text, which keeps the search linear.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_CLOSE = {"Connection": "close"}  # the rest of the body is not read


class ClientGone(Exception):
    """The client has disconnected."""


async def read_json(request: Request, settings: Settings) -> dict[str, Any]:
    """The JSON object in a body. Raises ServiceError for anything else and beyond the limits, ClientGone if the client
    disconnects."""
    check_content_type(request.headers.get("content-type"))
    data = await _read(request, settings)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8", code="invalid_json") from None
    if depth(text, settings.max_depth) > settings.max_depth:
        raise invalid(f"the body has arrays or objects nested deeper than {settings.max_depth}", code="too_deep")
    try:
        body = json.loads(text, object_pairs_hook=_without_duplicates)
    except ServiceError:
        raise
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError, too
        raise invalid(f"the body is not JSON: {' '.join(str(error).split())[:200]}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise invalid(f"the body must be a JSON object, got {shown(body)}", code="invalid_json")
    return body


def check_content_type(given: str | None) -> None:
    """ServiceError for anything but JSON. This also makes browsers send a CORS preflight for pages of other sites."""
    kind, _, settings = (given or "").partition(";")
    charset = re.search(r"charset\s*=\s*\"?([\w-]+)", settings, re.IGNORECASE)
    if kind.strip().lower() != "application/json" or (charset and charset[1].lower() not in ("utf-8", "utf8")):
        message = f"the body must be JSON in UTF-8, with Content-Type: application/json; got {shown(given)}"
        raise ServiceError(415, message, "unsupported_content_type", headers=_CLOSE)


async def _read(request: Request, settings: Settings) -> bytes:
    too_large = ServiceError(
        413, f"the body has more than {settings.max_body:,} bytes", "body_too_large", headers=_CLOSE
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > settings.max_body:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > settings.max_body:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        message = f"the body did not arrive within {settings.body_seconds:g} seconds"
        raise ServiceError(408, message, "body_too_slow", headers=_CLOSE) from None
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(chunks)


def depth(text: str, enough: int) -> int:
    """Nesting depth of arrays and objects in JSON text; counting stops above `enough`."""
    now = deepest = 0
    for token in _TOKEN.finditer(text):
        if (char := token[0]) in "[{":
            now += 1
            deepest = max(deepest, now)
            if deepest > enough:
                break
        elif char in "]}":
            now -= 1
    return deepest


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise invalid(f"field {shown(twice)} is given twice", twice[:64], "duplicate_field")
    return found
