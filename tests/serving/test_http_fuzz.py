"""Two thousand requests of all kinds, most of them malformed: none is a 5xx, none is taken by mistake, and the service
draws the right images all the while and afterwards."""

import asyncio
import json
import random
import string
from collections import Counter
from typing import Any

import httpx

from serving.apps import client_of, draw, run, tiny

REQUESTS = 2000
AT_ONCE = 16
URL = "/v1/images/generations"
GOOD: dict[str, Any] = {
    "model": ["tiny", None],
    "class_label": [0, 1, 2, None],
    "n": [1, 2, None],
    "size": ["4x4", "auto", None],
    "seed": [0, 7, 2**63 - 3],
    "num_inference_steps": [1, 2, 3],
    "guidance_scale": [0, 1, 2.5, 100, None],
    "solver": ["ddim", "ddpm", "ddim:0.5", "dpm++2m", None],
    "policy": ["full", "exit:0.4", "exit:depth=2", "exit:patience=0.5", "quick", None],
    "response_format": ["b64_json", None],
    "stream": [False, True, None],
    "prompt": ["", None],
    "user": ["me", None],
}
NUMBERS = [-1, 0, 3, 64, 1e3, 2**31, 2**63, 2**64, -(2**70), 10**40, 10**400, 0.5, 1e308, float("nan"), float("inf")]
TEXTS = [
    "",
    "a",
    "\0",
    "\n",
    "é",
    "\ud800",
    "𝔘",
    "../../etc/passwd",
    "${x}",
    "%s%n",
    "' OR 1=1",
    "os:system",
    "A" * 3000,
]
POLICIES = [
    "exit:",
    "exit:1e999",
    "exit:0.1,min_layer=99999",
    "exit:depth=1e30",
    "cache:threshold=nan",
    "reuse:every=-1",
]
POLICIES += [
    "exit:budget=0.5",
    "cascade:/dev/zero",
    "width:x",
    "exit:0.1+exit:0.2",
    "+" * 200,
    "exit:table=1",
    "full+full",
]
ODD = [None, True, [], {}, [[]], {"a": {}}, *NUMBERS, *TEXTS, *POLICIES]
KINDS = ["application/json"] * 30 + [
    "text/plain",
    "",
    "application/x-www-form-urlencoded",
    "application/json; charset=utf-16",
]
METHODS = ["POST"] * 40 + ["GET", "PUT", "PATCH", "DELETE", "HEAD"]
PATHS = [URL] * 40 + [
    "/v1/images",
    "/v1/images/generations/",
    "/v1//images/generations",
    "/%00",
    "/v1/models/%ff",
    "/" + "x" * 3000,
]


def body_of(rng: random.Random) -> tuple[bytes, bool]:
    """A body, and whether it is a request that has to be drawn."""
    fields = {name: rng.choice(values) for name, values in GOOD.items() if rng.random() < 0.4}
    fields.setdefault("num_inference_steps", 1)
    kind = rng.random()
    if kind < 0.3:
        return json.dumps(fields).encode(), True
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*GOOD, "partial_images", "output_format", "quality", rng.choice(TEXTS)])
        fields[name] = rng.choice(ODD)
    data = json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind < 0.7:
        return data, False
    if kind < 0.8:  # bytes changed
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed), False
    if kind < 0.85:
        return data[: rng.randrange(len(data))], False
    if kind < 0.9:
        level = rng.randint(1, 3000)
        return b'{"n":' + b"[" * level + b"]" * rng.randint(0, level) + b"}", False
    if kind < 0.93:
        return b'{"prompt":"' + b"a" * rng.randint(60_000, 80_000) + b'"}', False
    return bytes(rng.choices(string.printable.encode(), k=rng.randint(0, 200))), False


def headers_of(rng: random.Random) -> dict[str, bytes | str]:
    headers: dict[str, bytes | str] = {"Content-Type": rng.choice(KINDS)}
    if rng.random() < 0.2:
        headers["X-Request-Id"] = rng.choice([b"ok-1", b"a b", b"\xff", b"x" * 500, b"<script>", b""])
    if rng.random() < 0.2:
        headers["Accept"] = rng.choice(["image/png", "*/*", "image/png;q=x", ",,,", "text/html"])
    if rng.random() < 0.1:
        headers["Authorization"] = rng.choice([b"Bearer", b"Basic x", b"\xfe", b"Bearer " + b"x" * 2000])
    return headers


def check(reply: httpx.Response) -> None:
    if reply.status_code == 200:
        return
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text)
    assert "x-request-id" in reply.headers
    if reply.request.method != "HEAD":
        error = reply.json()["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["type"] == "invalid_request_error"
        assert 0 < len(error["message"]) <= 500


def test_a_fuzz_of_two_thousand_requests() -> None:
    rng, seen = random.Random(24), Counter[int]()
    made = []
    for _ in range(REQUESTS):
        body, good = body_of(rng)
        method, path, headers = rng.choice(METHODS), rng.choice(PATHS), headers_of(rng)
        right = good and (method, path, headers["Content-Type"]) == ("POST", URL, "application/json")
        made.append((method, path, headers, body, right and "Accept" not in headers))

    async def ask(client: httpx.AsyncClient, free: asyncio.Semaphore, request: tuple) -> None:
        method, path, headers, body, right = request
        async with free:
            reply = await client.request(method, path, headers=headers, content=body)
        check(reply)
        assert not right or reply.status_code == 200, (body, reply.text)
        seen[reply.status_code] += 1

    async def work() -> None:
        model = tiny(capacity=32, queue=AT_ONCE * 8, execution=None)
        limits = {"max_images": 4, "max_steps": 20, "steps": 2, "policies": {"quick": "exit:depth=1"}}
        async with client_of(model, **limits) as client:
            right = {"seed": 5, "class_label": 1, "num_inference_steps": 4, "policy": "exit:0.4"}
            before = (await draw(client, **right)).json()["data"][0]["b64_json"]
            free = asyncio.Semaphore(AT_ONCE)
            await asyncio.gather(*(ask(client, free, request) for request in made))
            after = (await draw(client, **right)).json()["data"][0]["b64_json"]
            assert after == before
            assert (await client.get("/ready")).status_code == 200
            report = model.engine.report
            assert (report.waiting, report.running, report.failed, report.cancelled) == (0, 0, 0, 0)
            page = (await client.get("/metrics")).text
            assert 'adadiff_http_requests_total{path="other",status="404"}' in page
            assert page.count("http_requests_total{") < 30, "addresses of clients make no metrics"

    run(work())
    assert seen.total() == REQUESTS
    assert seen[200] > 400
    assert min(seen[400], seen[404], seen[405], seen[413], seen[415]) > 20, seen
