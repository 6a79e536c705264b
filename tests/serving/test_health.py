"""Health, readiness and metrics through the life of a service: cold, warm, busy, draining, dead."""

import asyncio
import re
from typing import Any

import pytest

from adadiff.serving.app import create_app
from adadiff.serving.metrics import Metrics
from adadiff.serving.served import ServedModel
from adadiff.serving.settings import Settings
from sampler.tiny import stepped
from serving.apps import Exchange, client_of, draw, run, settle, tiny


def values(page: str) -> dict[str, float]:
    """Every sample of a page of metrics, by its name and labels."""
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def states(client: Any) -> tuple[int, int, str]:
    health, ready = await client.get("/health"), await client.get("/ready")
    return health.status_code, ready.status_code, ready.json()["status"]


def test_a_service_is_ready_once_every_model_has_drawn_an_image() -> None:
    async def work() -> None:
        engine = stepped(2)
        async with client_of(tiny("quick"), ServedModel("slow", engine), ready=False) as client:
            while (await client.get("/ready")).json()["models"]["quick"] != "ready":
                await asyncio.sleep(0.001)
            assert await states(client) == (200, 503, "warming")
            assert (await client.get("/ready")).json()["models"] == {"quick": "ready", "slow": "warming"}
            engine.step()
            await settle()
            assert await states(client) == (200, 200, "ready")
            assert (await client.head("/ready")).status_code == 200
            assert (await client.head("/health")).content == b""

    run(work())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_told_and_the_other_models_go_on(monkeypatch: Any) -> None:
    async def work() -> None:
        dies, lives = tiny("dies"), tiny("lives")
        async with client_of(dies, lives, steps=1) as client:
            monkeypatch.setattr(dies.engine, "_admit", lambda: 1 / 0)
            lost = await draw(client, model="dies")
            assert (lost.status_code, lost.json()["error"]["code"]) == (500, "drawing_failed")
            while dies.engine.alive:
                await asyncio.sleep(0.001)
            assert await states(client) == (503, 503, "dead")
            refused = await draw(client, model="dies")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_closed")
            assert (await draw(client, model="lives")).status_code == 200
            found = values((await client.get("/metrics")).text)
            assert found['adadiff_engine_up{model="dies"}'] == 0
            assert found['adadiff_engine_up{model="lives"}'] == 1

    run(work())


def test_a_model_that_cannot_draw_is_never_ready() -> None:
    async def work() -> None:
        def broken(*args: object, **options: object) -> None:
            raise RuntimeError("no kernel for this device")

        async with client_of(tiny(forward=broken), ready=False) as client:
            while not client.app.state.service.models["tiny"].engine.report.failed:
                await asyncio.sleep(0.001)
            await settle()
            assert await states(client) == (200, 503, "warming")

    run(work())


def test_a_draining_service_finishes_what_it_has() -> None:
    async def work() -> None:
        engine = stepped(2)
        app = create_app([ServedModel("tiny", engine)], Settings())
        busy = Exchange(app, {"num_inference_steps": 2})
        await settle()
        app.state.service.drain()
        late = Exchange(app, {})
        await late.task
        assert (late.status, b'"code":"draining"' in late.body) == (503, True)
        while engine.step():
            await settle()
        await busy.task
        assert busy.status == 200
        assert not app.state.service.aborted

    run(work())


@pytest.mark.parametrize("stream", [True, False])
def test_an_aborted_service_tells_its_clients(stream: bool) -> None:
    async def work() -> None:
        engine = stepped(2)
        app = create_app([ServedModel("tiny", engine)], Settings())
        busy = Exchange(app, {"num_inference_steps": 20, "stream": stream})
        await settle()
        engine.step()
        app.state.service.abort()
        await busy.task
        assert busy.status == (200 if stream else 503)
        assert b'"code":"aborted"' in busy.body
        engine.step()
        assert engine.report.running == 0
        assert app.state.service.aborted

    run(work())


def test_an_ended_application_has_ended_its_engines() -> None:
    async def work() -> None:
        model = tiny()
        async with client_of(model):
            assert model.engine.alive
        assert not model.engine.alive

    run(work())


def test_metrics_count_what_was_drawn() -> None:
    async def work() -> None:
        engine = stepped(2)
        app = create_app([ServedModel("tiny", engine)], Settings())
        page = app.state.service.metrics.page
        three = Exchange(app, {"n": 3, "num_inference_steps": 4, "policy": "exit:depth=2"})
        await settle()
        assert values(page().decode())['adadiff_num_requests_waiting{model="tiny"}'] == 3
        engine.step()
        found = values(page().decode())
        running, waiting = 'adadiff_num_requests_running{model="tiny"}', 'adadiff_num_requests_waiting{model="tiny"}'
        assert (found[running], found[waiting]) == (2, 1)
        while engine.step():
            await settle()
        await three.task
        full = Exchange(app, {"num_inference_steps": 1})
        await settle()
        while engine.step():
            await settle()
        await full.task
        found = values(page().decode())
        assert (found[running], found[waiting]) == (0, 0)
        wanted = {
            "image_count_total": 4,
            "e2e_request_latency_s_count": 2,
            "request_queue_wait_s_count": 4,
            "denoise_step_latency_s_count": 4,
            "num_inference_steps_sum": 13,
            "share_left_out_count": 4,
            "exit_layer_count": 13,
            "exit_layer_sum": 3 * 4 * 2 + 5,
            "blocks_total": 3 * 4 * 2 + 5,
            "blocks_full_total": 13 * 5,
        }
        assert {name: found[f'adadiff_{name}{{model="tiny"}}'] for name in wanted} == wanted
        assert found['adadiff_share_left_out_sum{model="tiny"}'] == pytest.approx(3 * 0.6)
        buckets = [found[f'adadiff_exit_layer_bucket{{le="{k}.0",model="tiny"}}'] for k in range(1, 6)]
        assert buckets == [0, 12, 12, 12, 13]
        assert found['adadiff_share_left_out_bucket{le="0.5",model="tiny"}'] == 1
        assert found['adadiff_http_requests_total{path="/v1/images/generations",status="200"}'] == 2

    run(work())


def test_metrics_have_the_names_that_dashboards_ask_for() -> None:
    page = Metrics({"tiny": tiny()}).page().decode()
    named = set(re.findall(r"^# TYPE adadiff_(\S+)", page, flags=re.MULTILINE))
    assert {
        *("num_requests_running", "num_requests_waiting", "e2e_request_latency_s", "request_queue_wait_s"),
        *("num_inference_steps", "image_count_total", "denoise_step_latency_s", "requests_failed_total"),
        *("exit_layer", "share_left_out"),
    } <= named


def test_a_refused_client_waits_as_long_as_requests_waited_lately() -> None:
    metrics = Metrics({"tiny": tiny()})
    assert metrics.retry_after() == 1
    metrics._waits.extend([4.0, 8.0])
    assert metrics.retry_after() == 6
    metrics._waits.extend([1e6] * 64)
    assert metrics.retry_after() == 60
