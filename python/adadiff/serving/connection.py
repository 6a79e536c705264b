"""uvicorn's HTTP/1.1 protocol with a limit on the time that a request may take to begin.

uvicorn closes connections on which nothing at all comes after a reply, and no others. One that has sent nothing yet, or
sends a byte now and then, would keep its socket for good (an attack known as slowloris).
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from .logs import log
from .service import Service

REASON = "head_too_slow"


class Connection(H11Protocol):
    """Closed where request line and headers are not complete `head_seconds` after it was opened, or after the first
    byte that follows a reply: more bytes give no more time. Its application is one of `create_app`."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._between_requests():
            self._begin()
        else:
            self._end()

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
            self._service.metrics.failed(REASON)
            log("connection closed", reason=REASON, client=self.client[0] if self.client else None)
            self.transport.close()

    @property
    def _service(self) -> Service:
        return self.config.app.state.service  # type: ignore[union-attr]
