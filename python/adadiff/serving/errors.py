"""Errors in the format of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import Response

MOST_MESSAGE = 500  # characters; messages quote what a client sent
MOST_SHOWN = 60

INVALID, LIMITED, SERVER = "invalid_request_error", "rate_limit_error", "server_error"


@dataclass(eq=False)
class ServiceError(Exception):
    """An error that becomes a response. param: the invalid field of the body. code: for programs; also the `reason` in
    metrics."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kind = LIMITED if self.status == 429 else INVALID if self.status < 500 else SERVER
        error = {"message": self.message[:MOST_MESSAGE], "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ServiceError:
    return ServiceError(400, message, code, param)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response in ASCII, because clients' text may hold lone surrogates, which UTF-8 cannot encode."""
    content = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return Response(content, status, headers, media_type="application/json")


def shown(value: object) -> str:
    """A client's value as quoted in messages: short, printable ASCII."""
    text = ascii(value) if not isinstance(value, str) else ascii(value[: MOST_SHOWN + 1])
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."
