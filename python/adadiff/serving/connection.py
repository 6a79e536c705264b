"""uvicorn's HTTP/1.1 protocol with limits on the time and the size of a request's head.

uvicorn closes only connections that stay silent after a reply. A client that sends nothing at first, or a byte now and
then, could keep its socket forever (an attack known as slowloris). httptools, the faster of uvicorn's parsers, accepts
heads of any length.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .logs import log
from .service import Service

REASON, TOO_LONG = "head_too_slow", "head_too_long"
HEAD_BYTES = 2**16


class Connection(HttpToolsProtocol):
    """Closes a connection if request line and headers are incomplete `head_seconds` after it was opened, or after the
    first byte that follows a reply. Further bytes do not extend the time. A head of more than HEAD_BYTES is answered
    with 400. For applications made by `create_app`."""

    _deadline: asyncio.TimerHandle | None = None
    _head = 0  # bytes of the incomplete head
    _in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._between_requests():
            self._head = 0
            self._end()
            return
        self._begin()
        if self._in_body:  # the rest of a refused body
            return
        self._head += len(data)
        if self._head > HEAD_BYTES and not self.transport.is_closing():
            self._close(TOO_LONG)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_body = True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head, self._in_body = 0, False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _begin(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._service.settings.head_seconds, self._give_up)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self._between_requests() and not self.transport.is_closing():
            self._close(REASON)

    def _close(self, reason: str) -> None:
        self._service.metrics.failed(reason)
        log("connection closed", reason=reason, client=self.client[0] if self.client else None)
        if reason == TOO_LONG:
            self.send_400_response("Request line and headers are too long.")  # closes, too
        else:
            self.transport.close()

    @property
    def _service(self) -> Service:
        return self.config.app.state.service  # type: ignore[union-attr]
