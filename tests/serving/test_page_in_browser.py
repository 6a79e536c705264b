"""The page at / as people use it, in headless Chromium: what it draws, compares, says, and never asks for."""

import base64
import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn")
import httpx
import uvicorn

import adadiff
from adadiff.engine.engine import Engine
from adadiff.serving import lifecycle
from adadiff.serving.app import GENERATIONS, create_app
from adadiff.serving.bodies import ImageRequest
from adadiff.serving.class_names import class_names
from adadiff.serving.pictures import png
from adadiff.serving.served import ServedModel
from adadiff.serving.settings import Settings
from sampler.tiny import served
from serving.apps import EXACT, SECONDS, expected, pixels
from serving.browser import Browser, Tab, find
from serving.test_text import CHANNELS, TEXT, TOKENS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix" or find() is None, reason="needs Chromium: apt-get install chromium"),
]
KEY = "a-key-of-tests"
REFUSED = "Failed to load resource"  # what the console says of every request that a service refuses
DONE = "document.querySelector('#stop').hidden && /^(Done|Full:)/.test(document.querySelector('#status').textContent)"
OPEN = "!document.querySelector('#settings').hidden"


class Service:
    """On a port of the loopback, in a thread. `slow` makes a step when a test says so."""

    def __init__(self, *models: ServedModel, **settings: Any):
        self.app = create_app(models, Settings(**settings))
        self._bound = lifecycle.bind("127.0.0.1", 0)
        self.address = lifecycle.address_of(self._bound)
        # without its lifespan, which would draw with engines that make no step by themselves
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, access_log=False, lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._bound]}, daemon=True)
        self._thread.start()
        self.web = httpx.Client(base_url=self.address, timeout=SECONDS)

    def draw(self, **body: Any) -> dict[str, Any]:
        reply = self.web.post(GENERATIONS, json=body)
        assert reply.status_code == 200
        return reply.json()

    def close(self) -> None:
        self.web.close()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(30)
        self._bound.close()
        for model in self.app.state.service.models.values():
            model.engine.close(drain=False)


class Faulty(http.server.ThreadingHTTPServer):
    """Passes the page on from a service, and answers requests for images wrongly, each time in another way."""

    def __init__(self, service: Service):
        event = {
            "type": "image_generation.partial_image",
            "b64_json": base64.b64encode(png(torch.zeros(1, 8, 8))).decode(),
            "adadiff": {"index": 0, "seed": 1, "step": 1, "steps": 12, "exit_layers": []},
        }
        stream = f"event: image_generation.partial_image\ndata: {json.dumps(event)}\n\n".encode()
        self.answers = iter(
            [
                (200, "text/event-stream", stream, 100),  # less than what was announced
                (200, "text/event-stream", stream, 0),  # a stream that ends early
                (503, "application/json", b'{"error": {"message": "a proxy of ours"}}', 0),
                (502, "text/html", b"<h1>Bad Gateway</h1>", 0),
            ]
        )
        self.web = service.web
        super().__init__(("127.0.0.1", 0), Passing)
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def __exit__(self, *error: object) -> None:
        self.close()


class Passing(http.server.BaseHTTPRequestHandler):
    server: Faulty

    def do_GET(self) -> None:
        found = self.server.web.get(self.path)
        self._answer(found.status_code, found.headers["content-type"], found.content)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(*next(self.server.answers))

    def _answer(self, status: int, kind: str, body: bytes, missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


def encode(prompts: list[str]) -> torch.Tensor:
    """A stand-in for a text encoder: the same for equal prompts."""
    values = [np.random.default_rng(list(prompt.encode())).standard_normal((TOKENS, CHANNELS)) for prompt in prompts]
    return torch.tensor(np.array(values), dtype=torch.float32)


def digits(capacity: int) -> ServedModel:
    return ServedModel("digits", Engine(adadiff.load("digits"), capacity, execution=EXACT), class_names("digits"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(adadiff.load("digits"), 4, threaded=False, execution=EXACT)


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Service]:
    made = Service(
        digits(16),
        ServedModel("slow", engine),
        ServedModel("text", Engine(served(TEXT), 4, execution=EXACT), encode=encode),
        steps=12,
        policies={"quick": "exit:depth=5"},
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """One tab for all, since each costs a second of a processor; pages share nothing but the browser's cache."""
    with Browser(tmp_path_factory.mktemp("profile")) as made:
        yield made.open()


@contextmanager
def visit(tab: Tab, address: str, refusals: int = 0, **options: Any) -> Iterator[Tab]:
    """A page that never asks another origin, sends only what the API takes, and complains of nothing but refusals."""
    tab.show(address, **options)
    yield tab
    origin = urlsplit(address)
    assert {urlsplit(one["url"])[:2] for one in tab.requests if not one["url"].startswith("blob:")} == {origin[:2]}
    for one in tab.requests:
        assert not one["body"] or set(json.loads(one["body"])) <= set(ImageRequest.model_fields)
    refused = [words for words in tab.complaints if words.startswith(REFUSED)]
    assert [words for words in tab.complaints if words not in refused] == []
    assert len(refused) == refusals


SHOWN = """[...document.querySelectorAll('#sets canvas')].map((canvas) =>
    [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 === 0)
).join(' ')"""  # the red of every picture


def shown(images: list[np.ndarray]) -> str:
    """Grey pictures as SHOWN has them."""
    return " ".join(",".join(map(str, image.ravel())) for image in images)


def drawn(tab: Tab, index: int = 0) -> np.ndarray:
    """Pixels uint8 [H, W, 4] of a picture."""
    width, height, data = tab.value(f"""(() => {{
        const canvas = document.querySelectorAll('#sets canvas')[{index}];
        const {{ width, height }} = canvas;
        return [width, height, [...canvas.getContext('2d').getImageData(0, 0, width, height).data]];
    }})()""")
    return np.array(data, dtype=np.uint8).reshape(height, width, 4)


def in_colour(b64_json: str) -> np.ndarray:
    """A grey picture of the API as a canvas has it."""
    grey = pixels(b64_json)
    return np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=-1)


def layers_of(tab: Tab, index: int = 0) -> list[int]:
    return tab.value(
        f"[...document.querySelectorAll('#sets figure')[{index}].querySelectorAll('.ran')]"
        ".map((bar) => Number(bar.dataset.layers))"
    )


def test_an_image_is_that_of_the_api_and_bars_are_its_exit_layers(browser: Tab, service: Service) -> None:
    with visit(browser, f"{service.address}/#class_label=7&seed=11&policy=exit:0.135&guidance_scale=2&n=2") as tab:
        tab.wait_for(OPEN)
        tab.click("#draw")
        tab.wait_for(DONE)
        body = {"class_label": 7, "seed": 11, "policy": "exit:0.135", "guidance_scale": 2, "n": 2}
        reply = service.draw(**body)
        assert tab.value("document.querySelectorAll('#sets figure').length") == 2
        for i, image in enumerate(reply["data"]):
            np.testing.assert_array_equal(drawn(tab, i), in_colour(image["b64_json"]))
            layers = image["adadiff"]["exit_layers"]
            assert len(set(layers)) > 1
            assert layers_of(tab, i) == layers
            heights = tab.value(
                f"[...document.querySelectorAll('#sets figure')[{i}].querySelectorAll('.ran')]"
                ".map((bar) => Number(bar.getAttribute('height')))"
            )
            assert heights == layers
        left_out = np.mean([image["adadiff"]["share_left_out"] for image in reply["data"]])
        assert f"{100 * left_out:.0f} %" in tab.text(".numbers")
        seconds_in(tab.text(".numbers"))
        saved = tab.value("document.querySelector('#sets a').getAttribute('href')")
        assert saved.startswith(f"blob:{service.address}/")


def seconds_in(text: str) -> list[float]:
    """Of drawing, in the queue where that was long, and by the wall clock, in which both lie."""
    words = text.split()
    found = [float(before) for before, word in pairwise(words) if word == "s"]
    assert len(found) == 2 + ("queue" in words)
    assert 0 < found[0] <= sum(found[:-1]) <= found[-1] + 0.02, "each is rounded"
    return found


def test_the_picture_forms_step_by_step_and_escape_frees_the_lanes(
    browser: Tab, service: Service, engine: Engine
) -> None:
    with visit(browser, f"{service.address}/#model=slow&seed=3&n=3&num_inference_steps=9&policy=exit:0.135") as tab:
        tab.wait_for(OPEN)
        tab.click("#draw")
        tab.wait_for("document.querySelectorAll('#sets figure').length === 3")
        before = engine.report.cancelled
        (drawing,) = service.app.state.service._drawings
        for step in (1, 2, 3):
            engine.step()
            tab.wait_for(f"document.querySelector('#progress').value >= {step} / 9 - 1e-6")
            assert tab.value("document.querySelectorAll('#sets .ran').length") == 3 * (step - 1)
            previews = [expected(handle.predicted_x0()) for handle in drawing.handles]
            tab.wait_for(f"({SHOWN}) === {json.dumps(shown(previews))}")
        assert tab.text("#status").startswith("Drawing 3 images with exit:0.135")
        assert tab.value("document.querySelector('#draw').getAttribute('aria-disabled')") == "true"
        tab.click("#compare")  # of no effect
        assert engine.report.running == 3
        tab.press("Escape")
        tab.wait_for("document.querySelector('#status').textContent.startsWith('Stopped after')")
        wait_until_freed(service, engine, before + 3)
        assert tab.value(SHOWN) == shown(previews), "they stay"
        assert not tab.value("document.querySelectorAll('[aria-busy]').length")
        tab.fill("#count", "1")
        tab.click("#draw")
        tab.wait_for("document.querySelectorAll('#sets figure').length === 1")
        engine.step()
        tab.wait_for("document.querySelector('#progress').value > 0")
        tab.click("#stop")
        tab.wait_for("document.querySelector('#stop').hidden")
        wait_until_freed(service, engine, before + 4)


def wait_until(condition: Callable[[], object], otherwise: str) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, otherwise
        time.sleep(0.01)


def wait_until_freed(service: Service, engine: Engine, cancelled: int) -> None:
    """Lanes are free at the next step, once the service has heard that their client is gone. cancelled: images since
    the engine began."""
    wait_until(lambda: not service.app.state.service._drawings, "the service still draws")
    engine.step()
    assert (engine.report.running, engine.report.cancelled) == (0, cancelled)


def test_comparing_shows_both_with_seconds_and_their_difference(browser: Tab, service: Service) -> None:
    with visit(browser, f"{service.address}/#class_label=2&seed=4&policy=exit:depth=3&n=2") as tab:
        tab.wait_for(OPEN)
        tab.click("#compare")
        tab.wait_for(DONE)
        titles = tab.value("[...document.querySelectorAll('.set h2')].map((title) => title.textContent)")
        assert titles == ["full", "exit:depth=3"]
        pairs = []
        for place, policy in enumerate(titles):
            reply = service.draw(class_label=2, seed=4, policy=policy, n=2)
            for i, image in enumerate(reply["data"]):
                np.testing.assert_array_equal(drawn(tab, 2 * place + i), in_colour(image["b64_json"]))
                assert layers_of(tab, 2 * place + i) == image["adadiff"]["exit_layers"]
            numbers = tab.value(f"document.querySelectorAll('.numbers')[{place}].innerText")
            assert f"{100 * reply['adadiff']['share_left_out']:.0f} %" in numbers
            seconds_in(numbers)
            pairs.append([pixels(image["b64_json"]).astype(int) for image in reply["data"]])
        apart = np.abs(np.array(pairs[0]) - np.array(pairs[1]))
        assert apart.max() > 0
        said = f"{apart.mean():.2f} of 255 grey levels on average; the largest is {apart.max()}."
        assert tab.text("#difference-text") == said
        for i in range(2):
            shown = tab.value(f"""(() => {{
                const canvas = document.querySelectorAll('#difference canvas')[{i}];
                return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data];
            }})()""")
            wanted = 255 * apart[i] / apart.max()
            np.testing.assert_allclose(np.array(shown).reshape(-1, 4)[:, 0], wanted.ravel(), atol=0.5001)
        tab.fill("#policy", "Full: every block at every step")
        tab.click("#compare")
        assert "leaves something out" in tab.text("#policy-error")


def test_the_same_pictures_differ_by_nothing(browser: Tab, service: Service) -> None:
    blocks = 13
    with visit(browser, f"{service.address}/#class_label=2&seed=4&policy=exit:depth={blocks}") as tab:
        tab.wait_for(OPEN)
        tab.click("#compare")
        tab.wait_for(DONE)
        assert "the same in every pixel" in tab.text("#difference-text")


def test_all_of_it_works_by_keyboard(browser: Tab, service: Service, engine: Engine) -> None:
    def focused() -> str:
        return tab.value("document.activeElement.id")

    with visit(browser, f"{service.address}/#model=slow&seed=5&policy=exit:0.2") as tab:
        tab.wait_for(OPEN)
        before, passed = engine.report.cancelled, []
        while not passed or passed[-1] != "compare":
            tab.press("Tab")
            passed.append(focused())
            assert len(passed) < 20, passed
        assert passed == [
            *("model", "class-label", "policy", "policy-value", "steps", "count", "seed", "new-seed", "guidance"),
            *("draw", "compare"),
        ]
        while focused() != "policy":
            tab.press("Tab", shift=True)
        tab.press("ArrowUp")  # from one choice of the list to another
        assert tab.text("#policy-hint").startswith("exit:depth=")
        tab.press("Tab")
        tab.type("2")
        tab.press("Tab")
        tab.type("5")
        tab.wait_for("location.hash.includes('&num_inference_steps=5&')")
        tab.press("Enter")
        tab.wait_for("document.querySelectorAll('#sets figure').length === 1")
        assert focused() == "steps", "the focus stays where it was"
        for _ in range(20):
            tab.press("Tab")
            if focused() == "stop":
                break
        tab.press("Enter")
        tab.wait_for("document.querySelector('#status').textContent.startsWith('Stopped')")
        assert focused() == "draw", "not lost with the button"
        wait_until_freed(service, engine, before + 1)
        tab.press("Enter")
        wait_until(lambda: service.app.state.service._drawings, "the service draws nothing")
        for _ in range(6):
            engine.step()
        tab.wait_for(DONE)
        assert layers_of(tab) == [2] * 5


def test_on_a_phone_all_is_in_one_column_and_nothing_scrolls_sideways(browser: Tab, service: Service) -> None:
    address = f"{service.address}/#class_label=2&seed=4&policy=exit:0.135&n=3&guidance_scale=1.5"
    with visit(browser, address, refusals=1, width=390, height=740) as tab:

        def check() -> None:
            for width in (320, 390, 699, 700):
                tab.resize(width, 740)
                assert tab.value("document.documentElement.scrollWidth") <= width
                sides = "['#settings', '#result'].map((id) => document.querySelector(id).getBoundingClientRect().left)"
                settings, result = tab.value(sides)
                assert (settings == result) == (width < 700)

        tab.wait_for(OPEN)
        check()
        tab.click("#compare")
        tab.wait_for(DONE)
        check()
        tab.resize(390, 740)
        assert len(set(tab.value("[...document.querySelectorAll('.set')].map((one) => one.offsetLeft)"))) == 1
        heights = tab.value(
            "[...document.querySelectorAll('#settings :is(input, select, button)')].filter((one) => one.offsetParent)"
            ".map((one) => one.offsetHeight)"
        )
        assert min(heights) >= 44
        tab.fill("#seed", "9" * 400)
        tab.click("#draw")
        tab.wait_for("document.querySelector('#seed-error').textContent")
        check()


def test_errors_stand_beside_the_field_they_name(browser: Tab, service: Service) -> None:
    with visit(browser, f"{service.address}/#class_label=1&seed=1", refusals=5) as tab:
        tab.wait_for(OPEN)
        for field, text, words in (
            ("steps", "251", "Must be at most 250 here, got 251"),
            ("count", "0", "greater than or equal to 1"),
            ("count", "2.5", "integer"),
            ("count", "many", "This takes a number, not “many”."),
            ("seed", str(2**63), "less than"),
            ("guidance", "1,5", "This takes a number"),
        ):
            before = tab.value(f"document.querySelector('#{field}').value")
            tab.fill(f"#{field}", text)
            tab.click("#draw")
            tab.wait_for(f"document.querySelector('#{field}-error').textContent")
            assert words in tab.text(f"#{field}-error")
            assert tab.value("[document.activeElement.id, document.activeElement.getAttribute('aria-invalid')]") == [
                field,
                "true",
            ]
            tab.fill(f"#{field}", before)
            assert tab.text(f"#{field}-error") == ""
        tab.fill("#policy", "Text of your own")
        tab.fill("#policy-text", "module:Class")
        tab.click("#draw")
        tab.wait_for("document.querySelector('#policy-error').textContent")
        assert "is not served" in tab.text("#policy-error")
        assert "exit:..." in tab.text("#policy-error")
        tab.fill("#policy", "quick")
        tab.fill("#seed", str(2**63 - 1))  # which JavaScript's numbers cannot tell from its neighbours
        tab.click("#draw")
        tab.wait_for(DONE)
        assert layers_of(tab) == [5] * 12
        assert f'"seed":{2**63 - 1},' in tab.requests[-1]["body"]
        assert f"seed {2**63 - 1}" in tab.text("#sets")


def test_a_link_holds_the_settings_and_is_never_markup(browser: Tab, service: Service) -> None:
    attack = "<img src=x onerror=alert(1)>"
    with visit(browser, f"{service.address}/#seed=7&class_label=&n=2&policy={attack}&toString=1", refusals=1) as tab:
        tab.wait_for(OPEN)
        assert tab.value("document.querySelector('#class-label').selectedOptions[0].textContent") == "no class"
        assert tab.value("document.querySelector('#policy-text').value") == attack
        tab.click("#draw")
        tab.wait_for("document.querySelector('#policy-error').textContent")
        assert "<img" in tab.text("#policy-error")
        assert tab.value("document.querySelectorAll('img, script:not([src])').length") == 0
        tab.fill("#policy", "Exit after a fixed block")
        tab.fill("#policy-value", "4")
        tab.fill("#steps", "6")
        link = tab.wait_for("location.hash.includes('&num_inference_steps=6&') && location.href")
        assert parse_qs(urlsplit(link).fragment, keep_blank_values=True) == {
            "model": ["digits"],
            "class_label": [""],
            "policy": ["exit:depth=4"],
            "num_inference_steps": ["6"],
            "n": ["2"],
            "seed": ["7"],
            "guidance_scale": ["1"],
        }
    with visit(browser, link) as tab:
        tab.wait_for(OPEN)
        assert tab.value("location.href") == link
        tab.click("#draw")
        tab.wait_for(DONE)
        reply = service.draw(seed=7, n=2, policy="exit:depth=4", num_inference_steps=6)
        np.testing.assert_array_equal(drawn(tab, 1), in_colour(reply["data"][1]["b64_json"]))
    with visit(browser, f"{service.address}/#model=<b>none</b>&class_label=99") as tab:
        tab.wait_for(OPEN)
        assert "no model “<b>none</b>” here; there is no class 99 here" in tab.text("#status")


def test_a_model_of_text_takes_a_prompt(browser: Tab, service: Service) -> None:
    with visit(browser, f"{service.address}/#model=text&seed=2&policy=exit:0.2", refusals=1) as tab:
        tab.wait_for(OPEN)
        shown = "[...document.querySelectorAll('[data-param]:not([hidden])')].map((one) => one.dataset.param)"
        assert {"prompt", "guidance_scale"} <= set(tab.value(shown))
        assert "class_label" not in tab.value(shown)
        tab.click("#draw")
        tab.wait_for("document.querySelector('#prompt-error').textContent")
        tab.fill("#prompt", "a “cat”")
        tab.click("#draw")
        tab.wait_for(DONE)
        reply = service.draw(model="text", prompt="a “cat”", seed=2, policy="exit:0.2")
        np.testing.assert_array_equal(drawn(tab), in_colour(reply["data"][0]["b64_json"]))


def test_colours_and_motion_are_as_the_reader_wants_them(browser: Tab, service: Service) -> None:
    look = """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        getComputedStyle(document.querySelector('#draw')).transitionDuration,
        getComputedStyle(document.querySelector('#sets canvas')).imageRendering]"""
    found = {}
    for scheme, motion in (("light", "no-preference"), ("dark", "reduce")):
        media = {"prefers_color_scheme": scheme, "prefers_reduced_motion": motion}
        with visit(browser, f"{service.address}/#class_label=2&seed=4", **media) as tab:
            tab.wait_for(OPEN)
            tab.click("#draw")
            tab.wait_for(DONE)
            found[scheme] = tab.value(look)
    (light, dark), white, black = (found["light"], found["dark"]), "rgb(255, 255, 255)", "rgb(22, 24, 28)"
    assert (light[0], dark[0]) == (white, black)
    assert light[1] != dark[1]
    assert (light[2], dark[2]) == ("0.15s", "0s")
    assert light[3] == dark[3] == "pixelated"


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser: Tab) -> None:
    guarded = Service(digits(4), steps=3, api_keys=(KEY,))
    try:
        with visit(browser, f"{guarded.address}/#class_label=3&seed=1", refusals=3) as tab:
            tab.wait_for("!document.querySelector('#key-form').hidden")
            assert tab.value("document.querySelector('#settings').hidden")
            for wrong, words in (("with space", "no space"), ("wrong-key", "does not know this key")):
                tab.fill("#key", "")
                tab.type(wrong)
                tab.press("Enter")
                tab.wait_for(f"document.querySelector('#key-error').textContent.includes('{words}')")
            tab.type(KEY)
            tab.press("Enter")
            tab.wait_for(OPEN)
            tab.click("#draw")
            tab.wait_for(DONE)
            assert tab.value("[Object.values(sessionStorage), Object.keys(localStorage)]") == [[KEY], []]
            assert KEY not in tab.value("location.href + document.cookie")
            tab.reload()
            tab.wait_for(OPEN)
            tab.click("#forget-key")
            assert tab.value("[sessionStorage.length, document.querySelector('#settings').hidden]") == [0, True]
            tab.reload()
            tab.wait_for("!document.querySelector('#key-form').hidden")
    finally:
        guarded.close()


def test_a_service_that_breaks_off_or_is_gone_is_named_and_nothing_hangs(browser: Tab, service: Service) -> None:
    server = Faulty(service)
    with server, visit(browser, f"{server.address}/#class_label=3&seed=1", refusals=4) as tab:
        tab.wait_for(OPEN)
        for words in ("broke off", "broke off", "a proxy of ours", "status 502"):
            tab.click("#draw")
            tab.wait_for(f"document.querySelector('#problem').textContent.includes('{words}')")
            assert tab.value("document.querySelector('#stop').hidden")
            tab.value("document.querySelector('#problem').textContent = ''")
        server.close()
        tab.click("#draw")
        tab.wait_for("document.querySelector('#problem').textContent.includes('does not answer')")
        assert tab.text("#status") == ""
