"""Start and end of the service: socket, uvicorn's server, and signals.

The first SIGTERM or Ctrl-C drains: new requests are refused, those in flight are finished. The second one, or
`drain_timeout`, aborts: requests in flight are cancelled, and their clients get an error. The third ends at once.
"""

import asyncio
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .connection import Connection
from .logs import log
from .service import Service

KEEP_ALIVE = 65  # seconds; longer than the 60 of load balancers, which must not send on a connection that closes
ABORT_SECONDS = 10.0  # for sending errors to clients after an abort
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address. It does not listen before `run`, so clients are refused until then rather than
    kept waiting. Raises OSError, which names the address, if it cannot be bound."""
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        if os.name == "posix":  # on Windows, the option would let two servers share an address
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """URL of the socket, with the actual port."""
    host, port, *_ = bound.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, bound: socket.socket, drain_timeout: float) -> bool:
    """Serves until a signal. Returns whether all accepted requests were finished. Main thread only."""
    service: Service = app.state.service
    server = _Server(_config(app, drain_timeout), service, drain_timeout)
    server.run(sockets=[bound])
    log("stopped", aborted=service.aborted or None)
    return not (service.aborted or server.force_exit)


def _config(app: FastAPI, drain_timeout: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=Connection,
        lifespan="on",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(drain_timeout + ABORT_SECONDS) + 1,
    )


class _Server(uvicorn.Server):
    """uvicorn's server with its own signal handling: uvicorn would re-raise the signal at the end, and abort only on
    Ctrl-C."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_timeout: float):
        super().__init__(config)
        self._service, self._drain_timeout, self._signals = service, drain_timeout, 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal handler, which interrupts the main thread anywhere, so it leaves the work to the event loop."""
        self._signals += 1
        self.should_exit = True
        if self._loop is None or self._signals > 2:
            self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._end, self._signals == 1)

    def _end(self, drain: bool) -> None:
        service = self._service
        if drain:
            log("draining", timeout=self._drain_timeout)
            service.drain()
            asyncio.get_running_loop().call_later(self._drain_timeout, service.abort)
        else:
            service.abort()
