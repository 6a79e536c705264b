"""`adadiff serve` as people run it: a process, a socket, clients, and signals. And what it refuses beforehand."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn")
import httpx
import uvicorn

import adadiff
from adadiff.cli import parser
from adadiff.commands import serve
from adadiff.sampling.sampler import sample
from adadiff.serving import lifecycle
from adadiff.serving.app import create_app
from adadiff.serving.served import ServedModel
from adadiff.serving.settings import Settings
from sampler import shell
from sampler.shell import error_line, run
from sampler.tiny import stepped
from serving.apps import Exchange, expected, pixels, settle
from serving.apps import run as run_async

tiny = shell.tiny
SECONDS = 180  # after which a test gives up
KEY = "a-key-of-tests"


class Server:
    """A process of its own on a free port of the loopback; `lines` is its log."""

    def __init__(self, *arguments: str, key: str | None = None):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment.pop(serve.KEY_VARIABLE, None)
        if key is not None:
            environment[serve.KEY_VARIABLE] = key
        self.process = subprocess.Popen(
            [sys.executable, "-m", "adadiff", "serve", *arguments, "--port", "0", "--log-format", "json"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.lines: list[dict[str, Any]] = []
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._news:
                self.lines.append(json.loads(line) if line.startswith("{") else {"event": line})
                self._news.notify_all()

    def wait_for(self, event: str) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            return next((line for line in self.lines if line["event"] == event), None)

        with self._news:
            assert self._news.wait_for(found, SECONDS), (event, self.lines)
            return found()

    @property
    def reasons(self) -> list[str]:
        """Of failures in the log."""
        return [line["reason"] for line in list(self.lines) if "reason" in line]

    def end(self) -> int:
        return self.process.wait(SECONDS)


@pytest.fixture
def server(tiny: str) -> Iterator[Server]:
    made = Server(f"tiny={tiny}", "--steps", "3", "--max-steps", "1000", key=KEY)
    yield made
    made.process.kill()
    made.process.wait()


def test_a_server_draws_cancels_and_drains(server: Server, tiny: str) -> None:
    """One process for all, since it takes seconds to start."""
    openai = pytest.importorskip("openai")
    address = server.wait_for("serving")["address"]
    assert address.startswith("http://127.0.0.1:")
    server.wait_for("model is ready")
    headers = {"Authorization": f"Bearer {KEY}"}
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    reply = client.images.generate(prompt="", n=2, extra_body={"class_label": 3, "seed": 5})
    model = adadiff.load(tiny)
    for i, image in enumerate(reply.data):
        alone, _ = sample(model, 1, seed=5 + i, class_labels=3, steps=3)
        # other batch-mates round differently, by at most one level
        difference = pixels(image.b64_json).astype(int) - expected(alone[0]).astype(int)
        assert np.abs(difference).max() <= 1
    with httpx.Client(base_url=address, headers=headers, timeout=SECONDS) as web:
        url, many = "/v1/images/generations", {"num_inference_steps": 1000, "n": 3}

        def running() -> float:
            page = web.get("/metrics").text
            (value,) = (
                line.split()[-1] for line in page.splitlines() if line.startswith("adadiff_num_requests_running")
            )
            return float(value)

        with web.stream("POST", url, json={**many, "stream": True, "partial_images": 60}) as stream:
            lines = stream.iter_lines()  # which closes the connection when it is dropped
            assert next(lines) == "event: image_generation.partial_image"
            assert running() == 3
        with pytest.raises(httpx.ReadTimeout):
            web.post(url, json=many, timeout=0.3)
        until = time.monotonic() + SECONDS
        while (running() or len(server.reasons) < 2) and time.monotonic() < until:
            time.sleep(0.01)
        assert running() == 0
        assert server.reasons == ["client_gone"] * 2
        with web.stream("POST", url, json={"num_inference_steps": 100, "stream": True, "partial_images": 60}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            assert [line for line in lines if line.startswith("event:")][-1] == "event: image_generation.completed"
    assert server.end() == 0
    server.wait_for("stopped")
    assert not [line for line in server.lines if line.get("level") in ("warning", "error")]


def test_signals_drain_then_abort_then_end_at_once() -> None:
    async def work() -> None:
        engine = stepped(2)
        app = create_app([ServedModel("tiny", engine)], Settings())
        service = app.state.service
        busy = Exchange(app, {"num_inference_steps": 20})
        await settle()
        server = lifecycle._Server(uvicorn.Config(app), service, drain_timeout=SECONDS)
        server._loop = asyncio.get_running_loop()
        server.handle_exit(signal.SIGTERM, None)
        await settle()
        assert (server.should_exit, service.draining, service.aborted, busy.task.done()) == (True, True, False, False)
        server.handle_exit(signal.SIGTERM, None)
        await busy.task
        assert (busy.status, service.aborted, server.force_exit) == (503, True, False)
        server.handle_exit(signal.SIGTERM, None)
        assert server.force_exit

    run_async(work())


def test_a_drain_ends_with_its_timeout() -> None:
    async def work() -> None:
        app = create_app([ServedModel("tiny", stepped(2))], Settings())
        busy = Exchange(app, {"num_inference_steps": 20})
        await settle()
        server = lifecycle._Server(uvicorn.Config(app), app.state.service, drain_timeout=0.01)
        server._loop = asyncio.get_running_loop()
        server.handle_exit(signal.SIGINT, None)
        await busy.task
        assert (busy.status, app.state.service.aborted) == (503, True)

    run_async(work())


def test_an_address_is_taken_once_and_refuses_until_somebody_serves() -> None:
    with lifecycle.bind("127.0.0.1", 0) as first:
        host, port = first.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=SECONDS)
        first.listen()
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: Address already in use"):
            lifecycle.bind(host, port)


def test_options_become_settings(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key-here\n\nsecond-key-here\n")
    options = shell_options(f"digits --policy a=exit:0.2 --policy default=full --api-key-file {file} --max-images 3")
    settings = serve.settings_of(options, {serve.KEY_VARIABLE: "third-key-here"})
    assert dict(settings.policies) == {"a": "exit:0.2", "default": "full"}
    assert set(settings.api_keys) == {"first-key-here", "second-key-here", "third-key-here"}
    assert (settings.max_images, settings.steps, settings.max_body) == (3, 50, 65536)
    assert serve.settings_of(shell_options("digits"), {}).api_keys == ()
    assert serve.settings_of(shell_options("digits --max-steps 20"), {}).steps == 20, "the default gives way"
    assert serve.names_of(["digits", "b=runs/x.safetensors", "runs/y.safetensors"]) == {
        "digits": "digits",
        "b": "runs/x.safetensors",
        "y": "runs/y.safetensors",
    }
    assert [shell_options(f"digits --capacity {text}").capacity for text in ("8", "2GiB")] == [8, "2GiB"]


def shell_options(line: str) -> Any:
    return parser().parse_args(["serve", *line.split()])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nothing.safetensors", "no model 'nothing.safetensors'"),
        ("digits digits", "two models are called 'digits'"),
        ("digits --policy exit:0.1", "--policy takes NAME=SPELLING"),
        ("digits --policy a=full --policy a=full", "--policy takes NAME=SPELLING, each name once"),
        ("digits --policy a=exit:budget=0.5", "policy a=exit:budget=0.5 fits none of digits"),
        ("digits --policy a=cascad:x", "policy a=cascad:x"),
        ("digits --steps 30 --max-steps 20", "steps must be at most max_steps, 20, got 30"),
        ("digits --capacity 0", "capacity must be"),
        ("digits --capacity much", "capacity is a number of lanes or bytes"),
        ("digits --queue 0", "queue must be"),
        ("digits --drain-timeout 0", "--drain-timeout must be above 0"),
        ("digits --drain-timeout nan", "--drain-timeout must be above 0"),
        ("digits --port 99999", "--port must lie in 0..65535, got 99999"),
        ("digits --host no.such.host.invalid", "cannot listen on no.such.host.invalid"),
        ("digits --text-encoder x", "none of the models takes text"),
        ("x/y=digits", "a model's name has letters"),
        ("digits --device nowhere", "cannot use device 'nowhere'"),
        ("digits --shallow-model x=digits", "--shallow-model takes NAME=FILE, each of the models digits once"),
        ("digits canvases --shallow-model canvases_shallow", "--shallow-model takes NAME=FILE"),
        ("digits --t-switch 500", "--t-switch is where a shallow model hands over"),
        ("digits --shallow-model canvases_shallow", "the shallow model must draw the same samples"),
        ("canvases --shallow-model canvases_shallow --t-switch 2000", "t_switch must be a number in 0..1000"),
    ],
)
def test_what_cannot_be_served_is_refused(
    line: str, words: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adadiff.serving.logs.configure", lambda *_: None)
    monkeypatch.setattr("adadiff.serving.lifecycle.run", lambda *_: pytest.fail("it serves"))
    port = "" if "--port" in line else " --port 0"
    assert run(f"serve {line}{port}") == 2
    assert words in error_line(capsys.readouterr().err)


def test_a_key_file_has_keys(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "keys").write_text("\n")
    assert run(f"serve digits --api-key-file {tmp_path}/keys") == 2
    assert "holds no key" in error_line(capsys.readouterr().err)
    assert run(f"serve digits --api-key-file {tmp_path}/none") == 2


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "httptools", "prometheus_client"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert run("serve digits") == 2
    assert f"needs {name}: pip install 'adadiff_kernels[serve]'" in error_line(capsys.readouterr().err)
