"""Images over HTTP are those of `adadiff.sample`, pixel for pixel, whatever else is drawn, and replies say how."""

import asyncio
import json
import math
import re
from typing import Any

import numpy as np
import pytest

import adadiff
from adadiff.engine.engine import Engine
from adadiff.output.pictures import write_png
from adadiff.sampling.sampler import sample
from adadiff.serving.allowed import REUSE
from adadiff.serving.class_names import class_names
from adadiff.serving.served import ServedModel
from serving.apps import EXACT, client_of, draw, expected, pixels, run, tiny

FIELDS = {"num_inference_steps": "steps", "class_label": "class_labels"}


@pytest.fixture(scope="module")
def digits() -> adadiff.Model:
    return adadiff.load("digits")


def of_digits(model: adadiff.Model) -> ServedModel:
    return ServedModel("digits", Engine(model, 8, execution=EXACT), class_names("digits"))


def wanted(model: adadiff.Model, n: int = 1, **body: Any) -> np.ndarray:
    """Pixels [n, H, W] of what a body asks for, drawn by `sample`."""
    settings = {FIELDS.get(name, name): value for name, value in body.items()}
    images, _ = sample(model, n, **{"execution": EXACT, **settings})
    return np.stack([expected(image) for image in images])


BODIES = [
    {"seed": 1, "class_label": 3, "num_inference_steps": 3},
    {"seed": 2**63 - 2, "n": 2, "num_inference_steps": 2, "policy": "exit:0.135,min_layer=3"},
    {"seed": 7, "class_label": 9, "num_inference_steps": 3, "guidance_scale": 2.5, "policy": "exit:depth=4"},
    {"seed": 0, "num_inference_steps": 4, "solver": "dpm++2m", "n": 3, "policy": "exit:patience=0.2"},
    {"seed": 5, "class_label": 0, "num_inference_steps": 2, "solver": "ddim:0.7", "guidance_scale": 0},
]


def test_images_are_those_of_sample_whoever_else_is_served(digits: adadiff.Model) -> None:
    async def work() -> None:
        async with client_of(of_digits(digits), steps=3) as client:
            for reply, body in zip(await asyncio.gather(*(draw(client, **b) for b in BODIES)), BODIES, strict=True):
                assert reply.status_code == 200, reply.text
                found = np.stack([pixels(one["b64_json"]) for one in reply.json()["data"]])
                np.testing.assert_array_equal(found, wanted(digits, **body), err_msg=str(body))
            named = (await draw(client, prompt=" 3 ", seed=1)).json()["data"][0]
            np.testing.assert_array_equal(pixels(named["b64_json"]), wanted(digits, **BODIES[0])[0])

    run(work())


def test_a_png_reply_is_the_file_of_the_command_line(digits: adadiff.Model, tmp_path: Any) -> None:
    async def work() -> None:
        body = {"seed": 1, "class_label": 3, "num_inference_steps": 3}
        write_png(tmp_path / "x.png", wanted(digits, **body)[0])
        async with client_of(of_digits(digits)) as client:
            asked = await draw(client, **body, response_format="png")
            accepted = await client.post(
                "/v1/images/generations", json=body, headers={"Accept": "text/html, image/png;q=0.9"}
            )
            for reply in (asked, accepted):
                assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")
                assert reply.content == (tmp_path / "x.png").read_bytes()
                assert (reply.headers["x-adadiff-seed"], reply.headers["x-adadiff-share-left-out"]) == ("1", "0")

    run(work())


def test_a_reply_tells_how_its_images_were_drawn(digits: adadiff.Model) -> None:
    body = {"seed": 4, "n": 2, "class_label": 2, "num_inference_steps": 3, "policy": "exit:0.135", "guidance_scale": 2}

    async def work() -> None:
        async with client_of(of_digits(digits)) as client:
            reply = await draw(client, **body)
        found = reply.json()
        assert found["size"] == "8x8"
        own = found["adadiff"]
        _, report = sample(
            digits,
            2,
            seed=4,
            class_labels=2,
            steps=3,
            policy="exit:0.135",
            guidance_scale=2.0,
            execution=EXACT,
        )
        for i, one in enumerate(found["data"]):
            details, layers = one["adadiff"], report.exit_layer[:, i].double()
            assert (details["seed"], details["steps"], details["num_layers"]) == (4 + i, 3, 13)
            assert details["exit_layers"] == layers[:, 0].tolist()
            assert details["exit_layers_unconditional"] == layers[:, 1].tolist()
            assert details["mean_exit_layer"] == pytest.approx(layers.mean().item(), abs=1e-4)
            assert details["share_left_out"] == pytest.approx(1 - layers.mean().item() / 13, abs=1e-4)
            assert 0 < details["share_left_out"] < 1
            assert min(details["seconds_waiting"], details["seconds_running"]) >= 0
        assert own["mean_exit_layer"] == pytest.approx(report.mean_exit_layer, abs=1e-4)
        asked = ("digits", 4, 3, "exit:0.135", "ddim", 2.0)
        assert tuple(own[n] for n in ("model", "seed", "steps", "policy", "solver", "guidance_scale")) == asked
        timing = dict(re.findall(r"(\w+);dur=([\d.]+)", reply.headers["server-timing"]))
        assert list(timing) == ["queue", "draw", "total"]
        assert float(timing["draw"]) == pytest.approx(1000 * own["seconds_running"], abs=0.1)
        assert float(timing["total"]) >= float(timing["draw"])
        assert own["request_id"] == reply.headers["x-request-id"]

    run(work())


def test_a_random_seed_is_told_and_draws_the_image_again() -> None:
    async def work() -> None:
        async with client_of() as client:
            first, second = (await draw(client, n=2, num_inference_steps=2)).json(), (await draw(client)).json()
            seed = first["adadiff"]["seed"]
            assert seed != second["adadiff"]["seed"]
            again = (await draw(client, n=2, num_inference_steps=2, seed=seed)).json()
            assert [one["b64_json"] for one in again["data"]] == [one["b64_json"] for one in first["data"]]

    run(work())


def test_null_is_the_same_as_absent_and_an_empty_prompt_as_none() -> None:
    """OpenAI's client always sends a prompt."""

    async def work() -> None:
        async with client_of() as client:
            names = (
                "model",
                "class_label",
                "n",
                "size",
                "guidance_scale",
                "policy",
                "stream",
                "partial_images",
                "user",
            )
            body = {"seed": 3, "num_inference_steps": 2}
            plain = await draw(client, **body)
            nulls = await draw(client, **body, **dict.fromkeys(names), prompt="")
            full = await draw(client, **body, prompt="", model="tiny", n=1, size="4x4", guidance_scale=1, policy="full")
            auto = await draw(client, **body, size="auto", user="me", output_format="png", response_format="b64_json")
            assert {reply.json()["data"][0]["b64_json"] for reply in (nulls, full, auto)} == {
                plain.json()["data"][0]["b64_json"]
            }

    run(work())


def test_several_models_have_an_engine_each_and_the_first_is_the_default() -> None:
    shallow = adadiff.load("canvases_shallow")

    async def work() -> None:
        two = tiny(), tiny("canvases_shallow", shallow)
        async with client_of(*two, policies={"quick": "exit:depth=1", "default": "exit:depth=2"}) as client:
            body = {"seed": 1, "num_inference_steps": 2}
            other = (await draw(client, model="canvases_shallow", **body)).json()
            np.testing.assert_array_equal(
                pixels(other["data"][0]["b64_json"]), wanted(shallow, seed=1, steps=2, policy="full")[0]
            )
            first = (await draw(client, **body)).json()
            assert (first["adadiff"]["model"], first["adadiff"]["mean_exit_layer"]) == ("tiny", 2)
            assert first["adadiff"]["policy"] == "exit:depth=2"
            quick = (await draw(client, **body, policy="quick")).json()["adadiff"]
            assert (quick["policy"], quick["mean_exit_layer"]) == ("quick", 1)
            listed = (await client.get("/v1/models")).json()
            assert [one["id"] for one in listed["data"]] == ["tiny", "canvases_shallow"]
            assert "quick" in listed["data"][0]["adadiff"]["policies"]
            assert "quick" not in listed["data"][1]["adadiff"]["policies"], "it has no exits"
            assert (await client.get("/v1/models/canvases_shallow")).json() == listed["data"][1]

    run(work())


def test_models_tell_what_they_draw() -> None:
    async def work() -> None:
        canvases = ServedModel("canvases", Engine(adadiff.load("canvases"), 4), class_names("canvases"))
        async with client_of(canvases, tiny(), max_steps=77, steps=5, max_images=3) as client:
            first, second = (one["adadiff"] for one in (await client.get("/v1/models")).json()["data"])
        assert (first["size"], first["classes"], first["takes"], first["guidance"]) == (
            "16x16",
            20,
            "class_label",
            True,
        )
        assert (first["class_names"][3], first["class_names"][13], len(first["class_names"])) == (
            *("alone 3", "count from 3"),
            20,
        )
        shares = [budget.share for budget in canvases.model.calibration.budgets]
        assert first["calibrated_for"]["shares"] == shares
        assert {f"exit:{kind}={share:g}" for share in shares for kind in ("budget", "table")} < set(first["policies"])
        assert second["calibrated_for"] is None
        assert not [policy for policy in second["policies"] if "budget" in policy]
        limits = ("max_num_inference_steps", "num_inference_steps", "max_n", "capacity")
        assert [first[name] for name in limits] == [77, 5, 3, 4]

    run(work())


def test_policies_that_models_list_are_served() -> None:
    """Numbers in the place of capitals; what is not listed is refused."""
    numbers = {"BLOCKS": "2", "THRESHOLD": "0.4", "CHANGE": "0.1", "STEPS": "2"}

    async def work() -> None:
        async with client_of(tiny(), steps=1) as client:
            listed = (await client.get("/v1/models/tiny")).json()["adadiff"]["policies"]
            assert len(listed) >= 4
            for form in ("full", "exit:THRESHOLD", "exit:patience=THRESHOLD", "exit:depth=BLOCKS", *REUSE.values()):
                policy = re.sub("[A-Z]+", lambda found: numbers[found[0]], form)
                assert (await draw(client, policy=policy)).status_code == (200 if form in listed else 400), form

    run(work())


def test_floats_of_replies_are_numbers() -> None:
    async def work() -> None:
        async with client_of() as client:
            text = (await draw(client, n=2, num_inference_steps=1)).text
            json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
            assert math.isfinite(json.loads(text)["adadiff"]["seconds_running"])

    run(work())
