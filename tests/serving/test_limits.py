"""Limits, keys, request ids and logs: what keeps a service up, and tells what it does."""

import asyncio
import io
import json
import logging
from typing import Any

import pytest

from adadiff.cli import parser
from adadiff.serving.app import create_app
from adadiff.serving.logs import LOG, JsonFormatter, TextFormatter, configure
from adadiff.serving.opening import opened
from adadiff.serving.served import ServedModel
from adadiff.serving.settings import Settings
from sampler.tiny import stepped
from serving.apps import Exchange, client_of, draw, run, settle, tiny

KEY = "a-key-of-tests"
URL = "/v1/images/generations"


def test_a_body_beyond_the_limit_is_not_read_to_its_end() -> None:
    async def work() -> None:
        app = create_app([tiny()], Settings(max_body=1000))
        client = Exchange(app, b"a" * 400)
        client._chunks = [b"a" * 400] * 100
        await client.task
        assert client.status == 413
        assert client.received == 3
        assert dict(client.sent[0]["headers"])[b"connection"] == b"close"
        said = Exchange(app, b"{}", {"content-length": "1001"})
        await said.task
        assert (said.status, said.received) == (413, 0)

    run(work())


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def work() -> None:
        client = Exchange(create_app([tiny()], Settings(body_seconds=0.05)), b"")
        client._chunks = []
        await client.task
        assert client.status == 408
        assert json.loads(client.body)["error"]["code"] == "body_too_slow"

    run(work())


def test_a_full_queue_takes_all_images_of_a_request_or_none() -> None:
    async def work() -> None:
        engine = stepped(1, queue=3)
        app = create_app([ServedModel("tiny", engine)], Settings())
        first = Exchange(app, {"n": 2, "num_inference_steps": 2})
        await settle()
        second = Exchange(app, {"n": 2, "num_inference_steps": 2})
        await second.task
        assert second.status == 429
        error = json.loads(second.body)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert error["message"] == "too many requests: 3 images wait already, the most that the queue holds"
        assert 1 <= int(dict(second.sent[0]["headers"])[b"retry-after"]) <= 60
        assert engine.report.waiting == 2, "the one that found room was taken back"
        third = Exchange(app, {"num_inference_steps": 2})
        await settle()
        assert engine.report.waiting == 3
        while engine.step():
            await settle(3)
        await asyncio.gather(first.task, third.task)
        assert (first.status, third.status) == (200, 200)

    run(work())


def test_requests_bring_one_of_the_keys() -> None:
    async def work() -> None:
        async with client_of(api_keys=("another-key", KEY), steps=1) as client:
            for given in (None, "", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x"):
                reply = await client.post(URL, json={}, headers={} if given is None else {"Authorization": given})
                assert reply.status_code == 401, given
                assert reply.json()["error"]["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"
                assert KEY not in reply.text
            for given in (f"Bearer {KEY}", "bearer another-key"):
                assert (await client.post(URL, json={}, headers={"Authorization": given})).status_code == 200
            assert (await client.get("/v1/models")).status_code == 401
            for path in ("/health", "/ready", "/metrics"):
                assert (await client.get(path)).status_code == 200
            assert client.app.state.service.models["tiny"].engine.report.finished == 3, "two, and one to warm up"

    run(work())


def test_request_ids_are_kept_where_they_are_harmless() -> None:
    async def work() -> None:
        async with client_of(steps=1) as client:
            kept = await client.get("/health", headers={"X-Request-Id": "client-1.b_C"})
            assert kept.headers["x-request-id"] == "client-1.b_C"
            made = set()
            for given in (b"", b"a b", b"a\tb", b"<b>", b"x" * 129, "é".encode(), b"-x"):
                reply = await client.get("/health", headers={b"X-Request-Id": given})
                made.add(reply.headers["x-request-id"])
            assert len(made) == 7
            assert all(len(one) == 32 and one.isalnum() for one in made)

    run(work())


@pytest.fixture
def log_of() -> Any:
    """Makes logs go to a stream for the time of a test."""
    names = ("adadiff", "uvicorn", "py.warnings")
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names}

    def to(form: Any) -> io.StringIO:
        stream = io.StringIO()
        configure(form, stream)
        return stream

    yield to
    logging.captureWarnings(False)
    for name, (handlers, propagate) in before.items():
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate


def test_the_log_has_a_line_for_each_request(log_of: Any) -> None:
    async def work() -> None:
        stream = log_of("json")
        async with client_of(steps=2, policies={"quick": "exit:depth=1"}) as client:
            await client.post(URL, json={"seed": 5, "policy": "quick"}, headers={"X-Request-Id": "one"})
            await client.post(URL, json={"n": 0}, headers={"X-Request-Id": "two"})
            await client.get('/nothing%0a"x', headers={"X-Request-Id": "three"})
            for path in ("/health", "/ready", "/metrics"):
                await client.get(path)
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        found = {line["id"]: line for line in lines if line["event"] == "request" and line["path"] != "/ready"}
        assert list(found) == ["one", "two", "three"], "health checks that succeed are not logged"
        one = {
            name: found["one"][name] for name in ("status", "model", "images", "steps", "policy", "seed", "left_out")
        }
        assert one == {
            "status": 200,
            "model": "tiny",
            "images": 1,
            "steps": 2,
            "policy": "quick",
            "seed": 5,
            "left_out": 0.8,
        }
        assert (found["two"]["status"], found["two"]["reason"]) == (400, "invalid_value")
        assert found["three"]["path"] == '/nothing\n"x'

    run(work())


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_line_of_the_log_is_one_line(formatter: logging.Formatter) -> None:
    fields = {"path": '/a\nb "\x1b[31m', "empty": "", "seconds": 0.123456, "n": 3}
    record = LOG.makeRecord(LOG.name, 20, "", 0, "request", (), None, extra={"fields": fields})
    line = formatter.format(record)
    assert line.isprintable()
    assert line.isascii()
    if isinstance(formatter, TextFormatter):
        assert line.endswith(r"""info request path='/a\nb "\x1b[31m' empty='' seconds=0.1235 n=3""")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_images": 0}, "max_images must be"),
        ({"max_steps": 1001}, "max_steps must be at most"),
        ({"max_steps": 20}, "steps must be at most max_steps, 20, got 50"),
        ({"max_body": 10}, "max_body"),
        ({"body_seconds": float("nan")}, "body_seconds"),
        ({"policies": {"a b": "full"}}, "a policy's name has letters"),
        ({"policies": {"x": "exit:9"}}, "policy x=exit:9"),
        ({"policies": {"x": "os:path:y=1"}}, "policy x="),
        ({"api_keys": ("short",)}, "an API key must have 8 or more"),
        ({"api_keys": ("with a space",)}, "an API key"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


def test_models_of_one_name_and_presets_that_fit_none_are_refused() -> None:
    one, two = ServedModel("a", stepped(1)), ServedModel("a", stepped(1))
    with pytest.raises(ValueError, match="different names"):
        create_app([one, two])
    with pytest.raises(ValueError, match="different names"):
        create_app([])
    with pytest.raises(ValueError, match=r"policy best=exit:budget=0\.5 fits none of a"):
        create_app([one], Settings(policies={"best": "exit:budget=0.5"}))
    with pytest.raises(ValueError, match="a model's name"):
        ServedModel("a/b", stepped(1))
    with pytest.raises(ValueError, match="3 classes, got 1 names"):
        ServedModel("a", stepped(1), class_names=("x",))


def test_keys_are_not_shown() -> None:
    assert KEY not in repr(Settings(api_keys=(KEY,)))


def test_refusals_draw_nothing_and_count() -> None:
    async def work() -> None:
        async with client_of(steps=1) as client:
            await draw(client, n=0)
            await draw(client, x=1)
            await draw(client, x=1)
            page = (await client.get("/metrics")).text
        assert 'adadiff_requests_failed_total{reason="unknown_field"} 2.0' in page
        assert 'adadiff_requests_failed_total{reason="invalid_value"} 1.0' in page
        assert 'adadiff_image_count_total{model="tiny"} 0.0' in page

    run(work())


def test_engines_of_a_service_admit_as_the_operator_says() -> None:
    for line, admission in (("serve digits", "arrival"), ("serve digits --admission work", "work")):
        options = parser().parse_args(line.split())
        (served,) = opened({"digits": "digits"}, capacity=1, admission=options.admission)
        with served.engine as engine:
            assert (engine._waiting._work is not None) == (admission == "work")
    with pytest.raises(SystemExit):
        parser().parse_args(["serve", "digits", "--admission", "least"])
