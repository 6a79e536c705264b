"""Presets of estimated errors: read once, drawn with the steps and the solver that they hold for."""

from pathlib import Path

import pytest

import adadiff
from adadiff.calibration.reuse_errors import ReuseErrors
from adadiff.policies.estimated_file import estimates_json
from serving.apps import client_of, draw, run, tiny


@pytest.fixture(scope="module")
def text() -> str:
    return estimates_json(ReuseErrors(tiny().model, n=32, steps=5, solver="dpm++2m").run())


@pytest.fixture
def file(text: str, tmp_path: Path) -> Path:
    written = tmp_path / "secret.json"
    written.write_text(text)
    return written


def test_a_request_that_names_none_gets_their_steps_and_solver(file: Path) -> None:
    """Also after the file is gone: nothing is read in a request."""

    async def work() -> None:
        async with client_of(policies={"default": f"estimate:{file},share=0.9"}) as client:
            file.unlink()
            reply = (await draw(client, seed=1)).json()
            named = (await draw(client, seed=1, num_inference_steps=5, solver="dpm++2m", policy="default")).json()
            assert reply["data"][0]["b64_json"] == named["data"][0]["b64_json"]
            assert '"default"' in (await client.get("/v1/models")).text

    run(work())


def test_other_steps_and_solvers_are_refused_without_the_operators_path(file: Path) -> None:
    async def work() -> None:
        async with client_of(policies={"mine": f"estimate:{file},share=0.9"}) as client:
            for body, field in (({"num_inference_steps": 6}, "num_inference_steps"), ({"solver": "ddim"}, "solver")):
                reply = await draw(client, policy="mine", **body)
                error = reply.json()["error"]
                assert (reply.status_code, error["param"]) == (400, field)
                assert "num_inference_steps 5 and solver dpm++2m" in error["message"]
                assert "secret" not in reply.text
            assert (await draw(client, policy=f"estimate:{file},share=0.9")).status_code == 400

    run(work())


def test_a_preset_of_more_steps_than_clients_may_ask_for_ends_the_start(file: Path) -> None:
    async def work(most: int) -> None:
        async with client_of(policies={"mine": f"estimate:{file},share=0.9"}, steps=most, max_steps=most):
            pass

    run(work(5))
    with pytest.raises(ValueError, match=r"fits none of .* in 4 steps or fewer"):
        run(work(4))


def test_presets_that_no_model_can_follow_end_the_start(file: Path, tmp_path: Path, text: str) -> None:
    broken, other = tmp_path / "broken.json", tmp_path / "other.json"
    broken.write_text(text[:50])
    model = adadiff.load("digits")
    other.write_text(estimates_json(ReuseErrors(model, n=32, steps=4).run()))

    async def work(path: Path) -> None:
        with pytest.raises(ValueError, match="mine="):
            async with client_of(policies={"mine": f"estimate:{path},share=0.9"}):
                pass

    for path in (broken, other, tmp_path / "none.json"):
        run(work(path))
