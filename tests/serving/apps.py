"""Services of tiny models inside the test's process, and requests to them: whole, or message by message."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi")
import httpx
from fastapi import FastAPI

from adadiff.engine.engine import Engine
from adadiff.forward.options import ExecutionOptions
from adadiff.model import Model
from adadiff.serving.app import GENERATIONS, create_app
from adadiff.serving.served import ServedModel
from adadiff.serving.settings import Settings
from sampler.tiny import served

EXACT = ExecutionOptions(batch_invariant=True)
SECONDS = 180.0  # after which a test gives up


def run(work: Coroutine) -> Any:
    """To the end, or to a failure instead of a hang."""
    return asyncio.run(asyncio.wait_for(work, SECONDS))


def tiny(name: str = "tiny", model: Model | None = None, **options: Any) -> ServedModel:
    """Draws one class of three, 4x4, unless another model is given. Options of `Engine`."""
    return ServedModel(name, Engine(model or served(), **{"capacity": 4, "execution": EXACT, **options}))


@asynccontextmanager
async def client_of(*models: ServedModel, ready: bool = True, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """For the time of a test, with the application's lifespan around it. `client.app` is the application."""
    app = create_app(models or [tiny()], Settings(**settings))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            client.app = app
            while ready and (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.001)
            yield client


async def draw(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(GENERATIONS, json=body)


def pixels(picture: bytes | str) -> np.ndarray:
    """Of a PNG file, or of one in base 64."""
    data = base64.b64decode(picture, validate=True) if isinstance(picture, str) else picture
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def expected(image: torch.Tensor) -> np.ndarray:
    """Pixels uint8 [H, W] of float [1, H, W], from -1 to 1."""
    return ((image[0].double().clamp(-1, 1) + 1) * 127.5).round().numpy().astype(np.uint8)


class Exchange:
    """One request to an application without a server in between. hold(): the client reads nothing from then on."""

    def __init__(self, app: FastAPI, body: dict[str, Any] | bytes, headers: dict[str, str] | None = None):
        self._app, self.sent = app, []
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._chunks = [content]
        given = {"content-type": "application/json", **(headers or {})}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": GENERATIONS,
            "raw_path": GENERATIONS.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self._away, self._reads, self._news = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._reads.set()
        self.received = 0  # parts of the body that the application asked for
        self.task = asyncio.create_task(self._app(self._scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._chunks:
            self.received += 1
            return {"type": "http.request", "body": self._chunks.pop(0), "more_body": bool(self._chunks)}
        await self._away.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self._news.set()
        await self._reads.wait()

    def hold(self) -> None:
        self._reads.clear()

    def go_on(self) -> None:
        self._reads.set()

    def leave(self) -> None:
        self._away.set()

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return events(self.body.decode())

    async def until(self, count: int) -> None:
        """Waits until so many messages have been sent."""
        while len(self.sent) < count:
            self._news.clear()
            await self._news.wait()


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events: their names and data."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


async def settle(rounds: int = 20) -> None:
    """Lets the event loop do what it has to do."""
    for _ in range(rounds):
        await asyncio.sleep(0)
