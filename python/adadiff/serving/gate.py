"""Middleware for every request: its id, the API key, the state of the service, unexpected errors, and the log."""

import hashlib
import hmac
import logging
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ServiceError
from .logs import log
from .service import Service

GUARDED = "/v1/"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RANDOM = random.Random()  # not the operating system's: a system call would hand the GIL to the engine's thread
GONE = 499  # nginx's status for a client that disconnected; only in logs and metrics


@dataclass
class Passing:
    """Record of one request for its line in the log. fields: added by its handler."""

    id: str
    began: float = field(default_factory=time.perf_counter)
    status: int = 0  # of the reply, once it has begun
    reason: str | None = None  # of a failure
    error: BaseException | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def passing(scope: Scope) -> Passing:
    return scope["adadiff.passing"]


def request_id(given: str | None) -> str:
    """The client's id if it is safe in headers and logs; otherwise a new one."""
    return given if given is not None and _ID.fullmatch(given) else f"{_RANDOM.getrandbits(128):032x}"


class Gate:
    """ASGI middleware. Every exception is handled: an unexpected one is logged, and the client gets status 500."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        self._keys = [_digest(key) for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = scope["adadiff.passing"] = Passing(request_id(headers.get("x-request-id")))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        try:
            self._check(scope["path"], headers)
            await self.app(scope, receive, answer)
        except ServiceError as error:
            record.reason, record.error = error.code, error if error.status == 500 else None
            await error.response()(scope, receive, answer)
        except Exception as error:
            record.reason, record.error = "internal_error", error
            if not record.status:  # else the server closes the connection, as the reply is incomplete
                message = f"an error of the service; its log says more, request {record.id}"
                await ServiceError(500, message, record.reason).response()(scope, receive, answer)
        finally:
            self._record(scope, record)

    def _check(self, path: str, headers: Headers) -> None:
        """For paths under GUARDED: ServiceError without a valid key, or while the service is stopping."""
        if not path.startswith(GUARDED):
            return
        if self._keys and not self._knows(headers.get("authorization")):
            message = "give one of the service's keys, as in Authorization: Bearer KEY"
            raise ServiceError(
                401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer", "Connection": "close"}
            )
        if self.service.draining:
            message = "the service is stopping; try another, or later"
            raise ServiceError(503, message, "draining", headers={"Retry-After": "1", "Connection": "close"})

    def _knows(self, given: str | None) -> bool:
        """Whether the header holds one of the keys. Takes constant time: all keys are compared, by digest."""
        scheme, _, key = (given or "").partition(" ")
        digest = _digest(key.strip())
        known = [hmac.compare_digest(digest, key_digest) for key_digest in self._keys]
        return scheme.lower() == "bearer" and any(known)

    def _record(self, scope: Scope, record: Passing) -> None:
        service, route = self.service, scope.get("route")
        path = getattr(route, "path", "other")
        service.metrics.http(path, record.status)
        if record.reason is not None:
            service.metrics.failed(record.reason)
        if record.status in (200, 304) and path in service.quiet:
            return
        client = scope.get("client")
        level = logging.ERROR if record.error is not None else logging.INFO
        log(
            *("request", level, record.error),
            id=record.id,
            client=None if client is None else client[0],
            method=scope["method"],
            path=scope["path"][:200],
            status=record.status,
            reason=record.reason,
            seconds=round(time.perf_counter() - record.began, 6),
            **record.fields,
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
