"""Previews while an image is drawn, clients that go away or read slowly, and lanes that are free at the next tick."""

from typing import Any

import numpy as np
import pytest
import torch

import adadiff
from adadiff.engine.engine import Engine
from adadiff.engine.handles import Handle
from adadiff.serving.app import create_app
from adadiff.serving.drawing import due_steps
from adadiff.serving.served import ServedModel
from adadiff.serving.settings import Settings
from sampler.tiny import alone, stepped
from serving.apps import Exchange, client_of, draw, events, expected, pixels, run, settle, tiny

PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"


def by_hand(capacity: int = 4, **options: Any) -> tuple[Engine, Any]:
    """An engine that makes a tick when a test says so, and the application over it."""
    engine = stepped(capacity, **options)
    return engine, create_app([ServedModel("tiny", engine)], Settings(write_seconds=0.2))


def previews_of(request: dict[str, Any]) -> list[torch.Tensor]:
    """What the image would become after each step, from an engine that draws nothing else."""
    seen: list[torch.Tensor] = []
    engine = stepped(2)
    handle = engine.submit(**request, on_step=lambda handle: seen.append(handle.predicted_x0()))
    while engine.step():
        continue
    assert handle.done()
    return seen


@pytest.mark.parametrize(
    ("steps", "previews", "due"),
    [
        (10, 0, set()),
        (10, 1, {5}),
        (10, 3, {2, 5, 7}),
        (5, 4, {1, 2, 3, 4}),
        (5, 64, {1, 2, 3, 4}),
        (1, 3, set()),
        (2, 1, {1}),
    ],
)
def test_previews_are_spread_evenly_and_none_is_the_image(steps: int, previews: int, due: set[int]) -> None:
    assert due_steps(steps, previews) == due


def test_previews_of_a_cascade_count_the_steps_that_its_images_take() -> None:
    """4 of the student, and, where 20 were asked, 5 of the teacher for the images that the oracle rates worst."""

    async def work() -> None:
        served = tiny("digits", adadiff.load("digits"))
        async with client_of(served, policies={"student": "cascade:digits_cascade"}) as client:
            body = {"class_label": 1, "num_inference_steps": 20, "n": 4, "seed": 3, "policy": "student"}
            reply = await draw(client, **body, stream=True, partial_images=64)
        found = events(reply.text)
        assert {len(data["adadiff"]["exit_layers"]) for kind, data in found if kind == COMPLETED} == {4, 9}
        previews = [data["adadiff"] for kind, data in found if kind == PARTIAL]
        assert previews
        assert all(0 < one["step"] < one["steps"] == 9 for one in previews)

    run(work())


def test_a_stream_has_previews_and_then_the_image() -> None:
    request = {"seed": 3, "steps": 5, "class_labels": 1, "policy": "exit:0.4"}

    async def work() -> None:
        engine, app = by_hand()
        body = {"seed": 3, "num_inference_steps": 5, "class_label": 1, "policy": "exit:0.4"}
        client = Exchange(app, {**body, "stream": True, "partial_images": 2, "n": 2})
        await client.until(1)
        for _ in range(6):
            engine.step()
            await settle()
        await client.task
        headers = dict(client.sent[0]["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert b"content-length" not in headers
        kinds = [kind for kind, _ in client.events]
        assert kinds == [PARTIAL] * 4 + [COMPLETED] * 2
        assert all(kind == data["type"] for kind, data in client.events)
        for index in range(2):
            own = [data for _, data in client.events if data["adadiff"]["index"] == index]
            wanted = previews_of({**request, "seed": 3 + index})
            assert [data["adadiff"].get("step") for data in own] == [1, 3, None]
            assert [data["partial_image_index"] for data in own[:-1]] == [0, 1]
            for data, step in zip(own, (1, 3), strict=False):
                np.testing.assert_array_equal(pixels(data["b64_json"]), expected(wanted[step - 1]))
            image, layers = alone({**request, "seed": 3 + index})
            np.testing.assert_array_equal(pixels(own[-1]["b64_json"]), expected(image))
            assert own[-1]["adadiff"]["exit_layers"] == layers[:, 0].tolist()
            assert own[1]["adadiff"]["exit_layers"] == layers[:2, 0].tolist(), "that of the last step comes later"
        assert engine.report.running == 0

    run(work())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("admitted", [True, False])
def test_a_client_that_goes_away_frees_its_lanes_at_the_next_tick(stream: bool, admitted: bool) -> None:
    async def work() -> None:
        engine, app = by_hand(capacity=2)
        first = engine.submit(seed=1, steps=50) if not admitted else None
        body = {"n": 2, "num_inference_steps": 50, "stream": stream, "seed": 1}
        client = Exchange(app, body | ({"partial_images": 3} if stream else {}))
        await settle()
        engine.step()
        assert engine.report.running == 2
        assert engine.report.waiting == (0 if admitted else 1)
        client.leave()
        await client.task
        engine.step()
        assert (engine.report.waiting, engine.report.running) == (0, 0 if admitted else 1)
        assert engine.report.cancelled == 2
        page = app.state.service.metrics.page().decode()
        assert 'adadiff_requests_failed_total{reason="client_gone"} 1.0' in page
        assert first is None or not first.done()

    run(work())


def test_a_client_that_goes_away_before_its_body_has_come_is_no_error() -> None:
    async def work() -> None:
        engine, app = by_hand()
        client = Exchange(app, b"")
        client._chunks = []
        client.leave()
        await client.task
        assert client.status == 499
        assert engine.report.waiting == 0

    run(work())


def test_a_slow_reader_gets_the_newest_preview_alone_and_holds_nobody_up() -> None:
    async def work() -> None:
        engine, app = by_hand()
        app.state.service.settings.__dict__["write_seconds"] = 60.0
        body = {"num_inference_steps": 30, "seed": 1, "stream": True, "partial_images": 64}
        slow = Exchange(app, body)
        await slow.until(1)
        engine.step()
        await slow.until(2)  # the preview of step 1 is on its way
        slow.hold()
        engine.step()
        await slow.until(3)  # that of step 2 is stuck in a full buffer
        quick = Exchange(app, {"num_inference_steps": 4, "seed": 2})
        await settle()
        for _ in range(20):
            engine.step()
            await settle(3)
        await quick.task
        assert quick.status == 200
        (drawing,) = app.state.service._drawings
        assert len(drawing.mailbox._newest) == 1, "one preview is kept, whatever the number of steps"
        assert len(slow.sent) == 3
        slow.go_on()
        await slow.until(4)
        for _ in range(9):
            engine.step()
            await settle()
        await slow.task
        steps = [data["adadiff"].get("step") for _, data in slow.events]
        assert steps[:3] == [1, 2, 22], "those in between were never sent"
        assert steps[-1] is None
        assert slow.events[-1][0] == COMPLETED

    run(work())


def test_a_reader_that_reads_nothing_is_left_after_a_while() -> None:
    async def work() -> None:
        engine, app = by_hand()
        stuck = Exchange(app, {"num_inference_steps": 30, "stream": True, "partial_images": 20})
        await stuck.until(1)
        stuck.hold()
        engine.step()
        await stuck.task
        engine.step()
        assert engine.report.running == 0
        assert engine.report.cancelled == 1

    run(work())


def test_an_image_that_fails_ends_a_stream_with_an_error_and_the_others_of_the_request(monkeypatch: Any) -> None:
    async def work() -> None:
        engine, app = by_hand(capacity=5)
        submit = engine.submit

        def breaks(handle: Handle) -> None:
            raise RuntimeError("a secret")

        def broken(params: Any, on_step: Any = None) -> Handle:
            return submit(params, on_step=breaks if int(params.seed) == 6 else on_step)

        monkeypatch.setattr(engine, "submit", broken)
        client = Exchange(app, {"num_inference_steps": 30, "stream": True, "n": 3, "seed": 5})
        plain = Exchange(app, {"num_inference_steps": 30, "n": 2, "seed": 5})
        await settle()
        engine.step()
        await client.task
        await plain.task
        ((kind, data),) = client.events
        assert kind == data["type"] == "error"
        assert (data["error"]["type"], data["error"]["code"]) == ("server_error", "drawing_failed")
        assert plain.status == 500
        assert b"secret" not in client.body + plain.body
        engine.step()
        assert (engine.report.failed, engine.report.cancelled, engine.report.running) == (2, 3, 0)

    run(work())


def test_openais_client_reads_a_reply_and_a_stream() -> None:
    openai = pytest.importorskip("openai")

    async def work() -> None:
        async with client_of(steps=4, api_keys=("a-key-of-tests",)) as web:
            options = {"base_url": "http://service/v1", "http_client": web, "max_retries": 0}
            client = openai.AsyncOpenAI(api_key="a-key-of-tests", **options)
            more = {"class_label": 2, "seed": 9, "num_inference_steps": 4}
            reply = await client.images.generate(prompt="", model="tiny", n=2, size="4x4", extra_body=more)
            assert len(reply.data) == 2
            assert reply.adadiff["seed"] == 9
            image, _ = alone({"seed": 10, "steps": 4, "class_labels": 2})
            np.testing.assert_array_equal(pixels(reply.data[1].b64_json), expected(image))
            stream = await client.images.generate(prompt="", stream=True, partial_images=3, extra_body=more)
            found = [event async for event in stream]
            assert [event.type for event in found][-1] == COMPLETED
            assert {event.type for event in found[:-1]} <= {PARTIAL}
            assert found[-1].b64_json == reply.data[0].b64_json
            assert [model.id async for model in await client.models.list()] == ["tiny"]
            with pytest.raises(openai.BadRequestError) as refused:
                await client.images.generate(prompt="a cat")
            assert refused.value.param == "prompt"
            with pytest.raises(openai.AuthenticationError):
                await openai.AsyncOpenAI(api_key="another-key", **options).images.generate(prompt="")
            with pytest.raises(openai.NotFoundError):
                await client.images.generate(prompt="", model="dall-e-3")

    run(work())


def test_events_are_whole_and_one_by_one() -> None:
    async def work() -> None:
        async with client_of(steps=3) as client:
            text = (await draw(client, stream=True, partial_images=2)).text
            assert text.endswith("\n\n")
            assert len(events(text)) == text.count("\nevent: ") + 1

    run(work())
