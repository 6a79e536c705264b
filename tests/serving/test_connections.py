"""Connections to a real socket on which no whole request comes: each is closed, and a request under way is not."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("uvicorn")

from adadiff.engine.engine import Engine
from adadiff.serving import lifecycle
from adadiff.serving.app import GENERATIONS, create_app
from adadiff.serving.connection import HEAD_BYTES, REASON, TOO_LONG
from adadiff.serving.served import ServedModel
from adadiff.serving.settings import Settings
from sampler.tiny import stepped
from serving.apps import SECONDS, run

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = 1.5  # far more than a busy machine takes from a connection to the request on it
PAUSE = 0.02  # between two bytes of a slow client
MANY = 3000  # bytes, so a minute: a server that closes nothing fails

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Web:
    """A server on the loopback, with an engine that makes a step when a test says so."""

    def __init__(self, engine: Engine, port: int, metrics: object):
        self.engine, self._port, self._metrics = engine, port, metrics

    async def open(self) -> Ends:
        return await asyncio.open_connection("127.0.0.1", self._port)

    def closed(self, reason: str) -> int:
        """Connections that were."""
        return int(self._metrics.registry.get_sample_value("adadiff_requests_failed_total", {"reason": reason}) or 0)

    @property
    def too_slow(self) -> int:
        return self.closed(REASON)


@asynccontextmanager
async def web() -> AsyncIterator[Web]:
    engine = stepped(2)
    app = create_app([ServedModel("tiny", engine)], Settings(head_seconds=HEAD, body_seconds=SECONDS))
    with lifecycle.bind("127.0.0.1", 0) as bound:
        server = lifecycle._Server(lifecycle._config(app, 1.0), app.state.service, 1.0)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:
            await asyncio.sleep(0.001)
        yield Web(engine, bound.getsockname()[1], app.state.service.metrics)
        server.should_exit = True
        await serving


async def trickle(ends: Ends, data: bytes) -> int:
    """A byte now and then, until the server closes or `data` is at its end. Returns how many were sent."""
    reader, writer = ends
    sent = 0
    closed = asyncio.create_task(reader.read())
    while not closed.done() and sent < len(data):
        writer.write(data[sent : sent + 1])
        sent += 1
        await asyncio.wait([closed], timeout=PAUSE)
    if not closed.done():
        closed.cancel()
    return sent


async def reply(ends: Ends) -> bytes:
    """Status line of the next reply; its body is read, too."""
    head = await ends[0].readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    await ends[0].readexactly(int(length.split(b":")[1]))
    return head.partition(b"\r\n")[0]


def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    async def work() -> None:
        async with web() as service:
            silent = await service.open()
            assert await silent[0].read() == b"", "closed without a word"
            slow = await service.open()
            endless = b"GET /health HTTP/1.1\r\nX: " + b"a" * MANY
            assert await trickle(slow, endless) < MANY
            assert service.too_slow == 2

    run(work())


def test_a_head_that_does_not_end_is_refused() -> None:
    """As fast as it comes; the rest of a refused body, which is longer, is no head, and the next request is served."""
    long = b"a" * 2 * HEAD_BYTES
    refused = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(long)

    async def work() -> None:
        async with web() as service:
            ends = await service.open()
            ends[1].write((b"GET /health HTTP/1.1\r\nX: " + long)[: HEAD_BYTES + 1])
            assert b"400" in await reply(ends)
            assert await ends[0].read() == b""
            assert service.closed(TOO_LONG) == 1
            ends = await service.open()
            ends[1].write(refused)
            assert b"404" in await reply(ends)
            ends[1].write(long + HEALTH)
            assert b"200" in await reply(ends)
            assert service.closed(TOO_LONG) == 1

    run(work())


def test_bytes_after_a_reply_are_not_a_request() -> None:
    """The head of a second request, and the rest of a body that was refused."""
    half = b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n"

    async def work() -> None:
        async with web() as service:
            for first, status in ((HEALTH, b"200"), (half, b"404")):
                ends = await service.open()
                ends[1].write(first)
                assert status in await reply(ends)
                assert await trickle(ends, b"GET / HTTP/1.1\r\nX: " + b"a" * MANY) < MANY
            assert service.too_slow == 2

    run(work())


def test_whole_requests_are_served_for_as_long_as_they_take() -> None:
    """One is under way while the time of heads runs out, as another connection shows; a connection serves several."""

    async def work() -> None:
        async with web() as service:
            busy = await service.open()
            body = json.dumps({"num_inference_steps": 2}).encode()
            head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
            busy[1].write(request[:-1])
            silent = await service.open()
            await silent[0].read()
            kept = await service.open()
            for _ in range(3):
                kept[1].write(HEALTH)
                assert b"200" in await reply(kept)
            busy[1].write(request[-1:])
            while service.engine.step() or not service.engine.report.finished >= 2:  # the other one warms up
                await asyncio.sleep(0.001)
            assert b"200" in await reply(busy)
            assert service.too_slow == 1

    run(work())
