"""Clients of a service, all in one separate process: python -m benchmarks.baselines.http_client HOST PORT

Reads requests as JSON from stdin and writes the answers to stdout. It uses asyncio without an HTTP library: on two
cores, clients take CPU time from the server that they measure, and some have to misbehave. Only the standard library is
imported, for a fast start.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATH = "/v1/images/generations"
GOOD, LEAVES, MALFORMED, SLOW = "good", "leaves", "malformed", "slow"
LEAD = 0.2  # seconds from the start to arrival time 0
LIMIT = 600.0  # seconds after which the run is aborted


@dataclass(frozen=True)
class Ask:
    """A request. arrival: seconds. kind: LEAVES closes its connection after `after` seconds without an answer, SLOW
    starts reading `after` seconds after sending."""

    arrival: float
    body: str
    kind: str = GOOD
    after: float = 0.0


@dataclass(frozen=True)
class Answer:
    """status: 0 if the connection ended without one. seconds: from the planned arrival, not from sending, to the last
    byte. whole: whether the body is complete; for a stream, with the end of each image."""

    kind: str
    status: int
    seconds: float
    whole: bool
    end: float


@dataclass(frozen=True)
class Run:
    """seconds: from the first arrival to the last answer of a well-behaved client. busy: CPU seconds of the clients."""

    answers: list[Answer]
    seconds: float
    busy: float


def clients(host: str, port: int, asks: Sequence[Ask], timeout: float = LIMIT) -> Run:
    """Runs the requests in another process. Raises RuntimeError with its stderr if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, host, str(port)],
        input=json.dumps([asdict(ask) for ask in asks]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return Run([Answer(**answer) for answer in found["answers"]], found["seconds"], found["busy"])


class Connection:
    """An HTTP connection that is kept alive between requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    @staticmethod
    async def open(host: str, port: int, slow: bool = False) -> "Connection":
        connection = Connection(*await asyncio.open_connection(host, port))
        if slow:  # replies stay in the system's buffers
            connection.writer.transport.pause_reading()
        return connection

    def send(self, body: str) -> None:
        data = body.encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        self.writer.write(f"{head}\r\n\r\n".encode() + data)

    async def read(self) -> tuple[int, bytes, bool]:
        """Status, body, and whether the connection stays open."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
        if "content-length" in fields:
            body = await self.reader.readexactly(int(fields["content-length"]))
        else:
            body = await self._chunks()
        return status, body, fields.get("connection") != "close"

    async def _chunks(self) -> bytes:
        parts = []
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            parts.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return b"".join(parts)

    def close(self) -> None:
        self.writer.transport.abort()


class Clients:
    def __init__(self, host: str, port: int):
        self._host, self._port = host, port
        self._idle: list[Connection] = []
        self._began = 0.0

    async def run(self, asks: Sequence[Ask]) -> Run:
        self._began = time.perf_counter() + LEAD
        answers = await asyncio.gather(*map(self._one, asks))
        for connection in self._idle:
            connection.close()
        last = max((answer.end for answer in answers if answer.kind == GOOD), default=0.0)
        return Run(list(answers), last - min(ask.arrival for ask in asks), time.process_time())

    @property
    def _now(self) -> float:
        return time.perf_counter() - self._began

    async def _one(self, ask: Ask) -> Answer:
        await asyncio.sleep(ask.arrival - self._now)
        status, whole = 0, False
        with suppress(OSError, asyncio.IncompleteReadError):  # visible in status and whole
            status, whole = await self._exchange(ask)
        end = self._now
        return Answer(ask.kind, status, end - ask.arrival, whole, end)

    def _idle_one(self) -> Connection | None:
        """An open connection: the service may have closed idle ones."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.reader.at_eof():
                return connection
            connection.close()
        return None

    async def _exchange(self, ask: Ask) -> tuple[int, bool]:
        slow = ask.kind == SLOW
        connection = None if slow else self._idle_one()
        if connection is None:
            connection = await Connection.open(self._host, self._port, slow)
        stays = False
        try:
            connection.send(ask.body)
            if ask.kind == LEAVES:
                await asyncio.wait_for(connection.read(), ask.after)
                return 0, False  # it was answered before it could leave
            if slow:
                await asyncio.sleep(ask.after)
                connection.writer.transport.resume_reading()
            status, body, stays = await connection.read()
            return status, complete(ask, body)
        except TimeoutError:
            return 0, False
        finally:
            if stays and not slow:
                self._idle.append(connection)
            else:
                connection.close()


def complete(ask: Ask, body: bytes) -> bool:
    """Whether an answer holds the requested number of images, or, for an invalid body, an error message."""
    if ask.kind == MALFORMED:
        return "message" in json.loads(body)["error"]
    n = json.loads(ask.body).get("n", 1)
    if ask.kind == SLOW:
        return body.count(b"event: image_generation.completed\n") == n
    return len(json.loads(body)["data"]) == n


def main() -> None:
    host, port = sys.argv[1:]
    asks = [Ask(**given) for given in json.load(sys.stdin)]
    json.dump(asdict(asyncio.run(Clients(host, int(port)).run(asks))), sys.stdout)


if __name__ == "__main__":
    main()
