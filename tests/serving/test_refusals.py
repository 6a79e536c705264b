"""What a service refuses: with a 4xx in OpenAI's shape that names the field, before anything is drawn."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

import adadiff
from adadiff.engine.engine import Engine
from adadiff.serving.reading import depth
from adadiff.serving.served import ServedModel
from serving.apps import client_of, draw, pixels, run, tiny

JSON = {"Content-Type": "application/json"}
URL = "/v1/images/generations"

FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"promt": "a cat"}, "promt"),
    ({"quality": "hd"}, "quality"),
    ({"": 1}, ""),
    ({"\ud800": 1}, "\ud800"),
    ({"model": 3}, "model"),
    ({"prompt": "a cat"}, "prompt"),
    ({"prompt": "a" * 5000}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"class_label": 3}, "class_label"),
    ({"class_label": -1}, "class_label"),
    ({"class_label": "1"}, "class_label"),
    ({"class_label": 1.0}, "class_label"),
    ({"class_label": True}, "class_label"),
    ({"class_label": 10**30}, "class_label"),
    ({"class_label": [1, 2]}, "class_label"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": "two"}, "n"),
    ({"n": 10**400}, "n"),
    ({"size": "8x8"}, "size"),
    ({"size": "1024x1024"}, "size"),
    ({"size": 4}, "size"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 2**63 - 1, "n": 2}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 31}, "num_inference_steps"),
    ({"num_inference_steps": 10**19}, "num_inference_steps"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_scale": float("inf")}, "guidance_scale"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"guidance_scale": 1e300}, "guidance_scale"),
    ({"guidance_scale": 10**400}, "guidance_scale"),
    ({"guidance_scale": "4"}, "guidance_scale"),
    ({"solver": "euler"}, "solver"),
    ({"solver": "ddim:nan"}, "solver"),
    ({"solver": "sampler.own_rules:BelowATime"}, "solver"),
    ({"solver": "ddim:spacing=none"}, "num_inference_steps"),
    ({"solver": None, "policy": "exit"}, "policy"),
    ({"policy": ""}, "policy"),
    ({"policy": "exit:2"}, "policy"),
    ({"policy": "exit:nan"}, "policy"),
    ({"policy": "exit:0.1+exit:0.2"}, "policy"),
    ({"policy": "exit:budget=0.55"}, "policy"),
    ({"policy": "exit:depth=6"}, "policy"),
    ({"policy": "exit:batch-mean=0.1"}, "policy"),
    ({"policy": "cache:batch=0.1"}, "policy"),
    ({"policy": "reuse:every=100000000000000000000"}, "policy"),
    ({"policy": "exit:٣"}, "policy"),
    ({"policy": "x" * 300}, "policy"),
    ({"response_format": "url"}, "response_format"),
    ({"response_format": "jpeg"}, "response_format"),
    ({"response_format": "png", "stream": True}, "response_format"),
    ({"response_format": "png", "n": 2}, "n"),
    ({"output_format": "webp"}, "output_format"),
    ({"stream": "yes"}, "stream"),
    ({"partial_images": 2}, "partial_images"),
    ({"stream": True, "partial_images": 65}, "partial_images"),
    ({"stream": True, "partial_images": -1}, "partial_images"),
    ({"user": "u" * 300}, "user"),
]


def check(reply: Any, status: int) -> dict[str, Any]:
    """The error of a refusal, whose shape is OpenAI's."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error"]
    error = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert error["message"]
    assert error["code"]
    assert len(error["message"]) <= 500
    return error


def test_every_field_is_named_when_it_is_wrong() -> None:
    async def work() -> None:
        async with client_of(max_images=8, max_steps=30, steps=2) as client:
            service = client.app.state.service
            before = service.models["tiny"].engine.report
            for body, field in FIELDS:
                reply = await client.post(URL, content=json.dumps(body), headers=JSON)
                assert check(reply, 400)["param"] == field, (body, reply.text)
            assert service.models["tiny"].engine.report == before, "nothing is drawn"
            assert (await draw(client, seed=1)).status_code == 200

    run(work())


def test_messages_say_what_would_do() -> None:
    async def work() -> None:
        async with client_of(max_steps=30, steps=2) as client:
            for body, words in {
                '{"prompt": "a cat"}': "give class_label, 0 to 2",
                '{"size": "1x1"}': "draws images of 4x4",
                '{"num_inference_steps": 31}': "at most 30",
                '{"response_format": "url"}': "use b64_json or png",
                '{"model": "big"}': "there are tiny",
                '{"polcy": "full"}': "unknown field 'polcy'; there are model, prompt",
            }.items():
                reply = await client.post(URL, content=body, headers=JSON)
                assert words in reply.json()["error"]["message"]

    run(work())


@pytest.mark.parametrize(
    "policy",
    [
        *("os:system", "subprocess:Popen:args=ls", "sampler.own_rules:Own", "cascade:/etc/passwd", "width:/etc/passwd"),
        "estimate:/etc/passwd,share=0.5",
        *("exit:0.1+os:system", "full+cascade:x", "exit:0.1+", "+", "FULL", "hidden:", " full", "json:JSONDecoder"),
    ],
)
def test_policies_that_import_code_or_open_files_are_refused_unread(policy: str, monkeypatch: Any) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr("adadiff.serving.allowed.parts_from", never)

    async def work() -> None:
        async with client_of(ready=False) as client:
            reply = await draw(client, policy=policy)
            error = check(reply, 400)
            assert (error["param"], "not served" in error["message"]) == ("policy", True)

    run(work())


@pytest.mark.parametrize(
    "solver", ["subprocess:Popen:args=ls", "os:system", "sampler.own_rules:Own", "json:JSONDecoder"]
)
def test_a_client_cannot_import_a_solver(solver: str, monkeypatch: Any) -> None:
    def never(name: str) -> None:
        raise AssertionError(f"{name} was imported")

    async def work() -> None:
        async with client_of(ready=False) as client:
            monkeypatch.setattr("adadiff.spelling.importlib", SimpleNamespace(import_module=never))
            error = check(await draw(client, solver=solver), 400)
            assert error["param"] == "solver"
            assert "of your own" not in error["message"]

    run(work())


def test_presets_are_the_operators_alone() -> None:
    """Any spelling, under a name that says nothing of what it opens."""

    async def work() -> None:
        async with client_of(policies={"own": "adadiff.policies.exits:Full"}, steps=1) as client:
            assert (await draw(client, policy="own")).status_code == 200
            check(await draw(client, policy="adadiff.policies.exits:Full"), 400)
            check(await draw(client, policy="own+exit:0.2"), 400)

    run(work())


BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "invalid_json"),
    "no JSON": (b"{'n': 1}", "invalid_json"),
    "cut off": (b'{"n": 1', "invalid_json"),
    "more after it": (b'{"n": 1} {}', "invalid_json"),
    "an array": (b"[1]", "invalid_json"),
    "a number": (b"3", "invalid_json"),
    "null": (b"null", "invalid_json"),
    "not UTF-8": (b'{"prompt": "\xff"}', "invalid_json"),
    "UTF-16": ('{"n": 1}'.encode("utf-16"), "invalid_json"),
    "a mark of byte order": (b'\xef\xbb\xbf{"n": 1}', "invalid_json"),
    "thousands of digits": (b'{"n": ' + b"9" * 5000 + b"}", "invalid_json"),
    "a field twice": (b'{"n": 1, "n": 2}', "duplicate_field"),
    "a field twice, deeper": (b'{"x": {"n": 1, "n": 2}}', "duplicate_field"),
    "deep arrays": (b'{"n": ' + b"[" * 1000 + b"]" * 1000 + b"}", "too_deep"),
    "deep objects": (b'{"n":' * 100 + b"1" + b"}" * 100, "too_deep"),
    "deep without an end": (b"[" * 60000, "too_deep"),
    "too large": (b'{"prompt": "' + b"a" * 70000 + b'"}', "body_too_large"),
}


def test_bodies_that_are_no_request() -> None:
    async def work() -> None:
        async with client_of(steps=1) as client:
            for name, (content, code) in BODIES.items():
                reply = await client.post(URL, content=content, headers=JSON)
                error = check(reply, 413 if code == "body_too_large" else 400)
                assert error["code"] == code, name
            for kind in ("text/plain", "multipart/form-data", "application/json; charset=latin-1", "json", ""):
                reply = await client.post(URL, content=b"{}", headers={"Content-Type": kind})
                assert check(reply, 415)["code"] == "unsupported_content_type"
            for kind in ("application/json; charset=utf-8", "Application/JSON"):
                assert (await client.post(URL, content=b"{}", headers={"Content-Type": kind})).status_code == 200

    run(work())


def test_depth_counts_no_brackets_in_strings() -> None:
    assert depth('{"a": ["[[[[", {"b": "\\"[[["}]}', 16) == 3
    assert depth("[[[", 16) == 3
    assert depth("[" * 100, 16) == 17, "it ends above the limit"
    assert depth('"' + '\\"' * 30000, 16) == 0, "in linear time, since no quote ends the string"
    assert depth("", 16) == 0


def test_addresses_and_methods_that_are_not_served() -> None:
    async def work() -> None:
        async with client_of() as client:
            check(await client.get("/v1/nothing"), 404)
            check(await client.get("/v1/models/"), 404)
            assert check(await client.get("/v1/models/big"), 404)["code"] == "model_not_found"
            assert check(await draw(client, model="big"), 404)["param"] == "model"
            for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
                reply = await client.request(method, URL)
                check(reply, 405)
                assert reply.headers["allow"] == "POST"
            check(await client.post("/health"), 405)

    run(work())


def test_what_a_model_is_not_made_for_is_refused() -> None:
    async def work() -> None:
        plain = ServedModel("plain", Engine(adadiff.load("digits_plain"), 1))
        async with client_of(plain, steps=1) as client:
            assert check(await draw(client, policy="exit:0.2"), 400)["param"] == "policy"
            assert check(await draw(client, guidance_scale=2), 400)["param"] == "guidance_scale", "one lane"
            found = (await draw(client, class_label=3)).json()
            assert pixels(found["data"][0]["b64_json"]).shape == (8, 8)

    run(work())


def test_a_defect_of_ours_is_a_500_that_tells_nothing(monkeypatch: Any, caplog: Any) -> None:
    async def work() -> None:
        async with client_of(tiny(), steps=1) as client:
            service = client.app.state.service
            with monkeypatch.context() as patch:
                patch.setattr(service, "submit", lambda order: 1 / 0)
                reply = await draw(client)
                error = check(reply, 500)
                assert reply.headers["x-request-id"] in error["message"]
                assert "ZeroDivision" not in reply.text
            assert (await draw(client)).status_code == 200
        assert "ZeroDivisionError" in caplog.text

    run(work())
