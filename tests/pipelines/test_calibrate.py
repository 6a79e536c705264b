"""Thresholds for a budget: what chooses them, the file they live in, and what is refused."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import adadiff
from adadiff.pipelines import calibrating
from adadiff.pipelines.calibrated_file import load_cache
from adadiff.pipelines.enable import enabled
from adadiff.pipelines.step_thresholds import Changes, between, interpolated, measured_growth, thresholds_for
from adadiff.policies.calibrated_cache import CalibratedCache
from pipelines.pipes import TRANSFORMERS, arguments, draw, pipeline

STEPS, N = 7, 6


def prompts(name: str, n: int = N) -> list[Any]:
    """Arguments of a call each; of DiT its labels."""
    if name == "dit":
        return list(range(n))
    return [{k: v for k, v in arguments(name, [i]).items() if k != "generator"} for i in range(n)]


def calibrated(pipe: Any, name: str, budget: float = 0.6, **settings: Any) -> calibrating.Calibrated:
    settings = {"num_inference_steps": STEPS, "progress": False, **settings}
    if name == "dit":
        settings = {"guidance_scale": 4.0, "batch": 2, **settings}
    return adadiff.calibrate(pipe, prompts(name), budget, **settings)


def modelled(weights: list[float], lanes: int = 5, alike: bool = False, seed: int = 3) -> Changes:
    S = len(weights)
    steps = 0.05 + torch.rand(S, lanes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if alike:
        steps = torch.full((S, lanes), 0.25, dtype=torch.float64)
    steps[0] = torch.inf
    return Changes(steps, torch.tensor(weights, dtype=torch.float64), 0.2)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.62, 0.8, 0.95])
def test_the_model_meets_the_share_across_cliffs(share: float, alike: bool) -> None:
    """Lanes that are alike step together: a step of all of them is the finest there is."""
    changes = modelled([1.0] * 20, alike=alike)
    reached = changes.share(thresholds_for(changes, share))
    assert abs(reached - share) <= (0.8 / 20 if alike else 0.8 / 100) + 1e-9


def test_lanes_reuse_where_it_costs_least() -> None:
    changes = modelled([1.0] * 10 + [50.0] * 10)
    full, _ = changes.run(thresholds_for(changes, 0.6))
    assert full[0].all()
    assert full[10:].double().mean() > full[1:10].double().mean() + 0.4


def test_a_model_runs_as_a_cache_does() -> None:
    """By hand: changes add up from the last full step, NaN never reuses."""
    steps = torch.tensor([[torch.inf] * 2, [0.1, 0.3], [0.1, 0.1], [0.1, torch.nan], [0.4, 0.1]], dtype=torch.float64)
    full, change = Changes(steps, torch.ones(5, dtype=torch.float64), 0.5).run(torch.full((5,), 0.25))
    assert full.T.tolist() == [[True, False, False, True, True], [True, True, False, True, False]]
    assert change[2].tolist() == pytest.approx([0.2, 0.1])
    grown = Changes(steps, torch.ones(5, dtype=torch.float64), 0.5, {1: 1.0, 2: 0.8})
    assert grown.run(torch.full((5,), 0.25))[1][3, 0] == pytest.approx(0.3 * 0.8)


def test_growth_is_measured_where_lanes_reused() -> None:
    steps = torch.full((5, 3), 0.5, dtype=torch.float64)
    steps[0] = torch.inf
    full = torch.tensor([[True], [False], [False], [True], [False]]).expand(5, 3)
    change = torch.tensor([torch.inf, 0.5, 0.75, 0.9, 0.5], dtype=torch.float64)[:, None].expand(5, 3)
    assert measured_growth([(full, change)], steps) == pytest.approx({1: 1.0, 2: 0.75, 3: 0.6})


def test_between_two_shares_half_of_the_steps_move() -> None:
    low, high = torch.tensor([9.0, 2, 2, 2, 2]), torch.tensor([9.0, 1, 1, 1, 1])
    assert between({0.3: low, 0.1: low + 5, 0.8: high}, 0.5).tolist() == [9, 2, 2, 1, 1]
    assert between({0.3: low, 0.4: high}, 0.5) is None


def test_weights_are_interpolated_by_ratio() -> None:
    assert interpolated({1: 1.0, 3: 4.0}, 5).tolist() == pytest.approx([1, 1, 2, 4, 4])
    assert interpolated({2: 0.0}, 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["dit", "flux", "wan"])
def test_a_budget_is_met_and_the_file_does_it_again(name: str, tmp_path: Path) -> None:
    pipe, file = pipeline(name), tmp_path / "cache.json"
    plain = draw(pipe, name, [0, 1, 2], STEPS)
    found = calibrated(pipe, name, path=file)
    assert enabled(pipe.transformer) is None
    assert torch.equal(draw(pipe, name, [0, 1, 2], STEPS), plain)

    blocks = found.cache.blocks
    # three prompts choose: one lane's step, and where the lanes are alike a step of all of them
    assert abs(found.share - 0.6) <= (blocks - 1) / blocks / STEPS
    assert load_cache(file) == found.cache
    assert found.cache.held_out.prompts == N // 2
    assert 0 < found.cache.held_out.low <= found.cache.held_out.error <= found.cache.held_out.high

    record = adadiff.enable(pipe, str(file))
    draw(pipe, name, list(range(0, N, 2)), STEPS)
    again = 1 - record.left_out
    if name == "dit":  # the same calls
        assert again == pytest.approx(found.share)
    assert again == pytest.approx(found.share, abs=0.15)
    full = torch.stack([step.full for step in record.steps])
    assert full[0].all()
    assert not full.all()
    adadiff.disable(pipe)


@pytest.mark.parametrize("order", [0, 1])
def test_what_was_held_out_is_measured_as_told(order: int, tmp_path: Path) -> None:
    """Drawn again by hand, from the file: the error and the share of the prompts that did not choose."""
    pipe, others, file = pipeline("flux"), [1, 3, 5], tmp_path / "cache.json"
    found = calibrated(pipe, "flux", order=order, path=file)
    assert load_cache(file).order == order
    full = torch.cat([draw(pipe, "flux", [i], STEPS) for i in others])
    record = adadiff.enable(pipe, file)
    drawn = torch.cat([draw(pipe, "flux", [i], STEPS) for i in others])
    error = (drawn - full).double().flatten(1).norm(dim=1) / full.double().flatten(1).norm(dim=1)
    assert float(error.mean()) == pytest.approx(found.cache.held_out.error, rel=1e-6)
    assert 1 - record.left_out == pytest.approx(found.cache.held_out.share)


def test_it_measures_what_reuse_costs_at_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn again by hand: the prompts that choose, each with one step reused, error over change."""
    noted: list[dict[int, float]] = []
    monkeypatch.setattr(calibrating, "interpolated", lambda places, S: noted.append(places) or interpolated(places, S))
    pipe = pipeline("flux")
    calibrated(pipe, "flux")
    (places,) = noted
    assert len(places) == N // 2
    assert {1, STEPS - 1} <= set(places)
    for place, image in zip(places, range(0, N, 2), strict=True):
        full = draw(pipe, "flux", [image], STEPS).double()
        record = adadiff.enable(pipe, calibrating.Steps((place,)))
        drawn = draw(pipe, "flux", [image], STEPS).double()
        adadiff.disable(pipe)
        assert [bool(step.full) for step in record.steps] == [step != place for step in range(STEPS)]
        change = float(record.steps[place].change)
        assert places[place] == pytest.approx(float((drawn - full).norm() / full.norm()) / change, rel=1e-4)


def test_more_budget_runs_more() -> None:
    pipe = pipeline("wan")
    little, much = (calibrated(pipe, "wan", budget) for budget in (0.5, 0.9))
    assert little.share < 0.65 < 0.8 < much.share
    assert little.cache.held_out.error > much.cache.held_out.error


def test_it_is_deterministic_and_says_what_it_costs() -> None:
    pipe = pipeline("flux")
    one, two = calibrated(pipe, "flux"), calibrated(pipe, "flux")
    assert one == two
    text = str(one)
    assert f"{one.cache.held_out.error:.3f}" in text
    assert f"{one.share:.1%}" in text
    assert text.splitlines()[1].startswith("thresholds by step: never, ")


def test_interrupted_it_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, calls = pipeline("flux"), []

    def interrupted(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*given)

    real = calibrating.draw
    monkeypatch.setattr(calibrating, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(pipe, "flux", path=tmp_path / "cache.json")
    assert enabled(pipe.transformer) is None
    assert not any(module._compiled_call_impl for module in pipe.transformer.modules())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": 0}, r"budget must be a share of the blocks in \(0, 1\), got 0"),
        ({"budget": 1.0}, "budget must be a share"),
        ({"budget": "half"}, "budget must be a share"),
        ({"budget": 0.1}, "always run"),
        ({"budget": 0.36, "num_inference_steps": 3}, "3 steps, the first in full, run at least"),
        ({"prompts": []}, "prompts must be a list"),
        ({"prompts": "a dog"}, "prompts must be a list"),
        ({"prompts": [{}, {}, {}]}, "give at least 4, got 3"),
        ({"prompts": [1, "a", 2, "b"]}, "all texts, all class labels"),
        ({"prompts": [True] * 4}, "all texts, all class labels"),
        ({"prompts": [1, 2, 3, 4]}, "FluxPipeline takes no 'class_labels'"),
        ({"strength": 0.5}, "takes no 'strength'"),
        ({"num_images_per_prompt": 2}, "one result of each prompt, got num_images_per_prompt=2"),
        ({"seed": "a"}, "seed must be an integer"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"first": 0}, "first must be a whole number"),
        ({"gate": "none"}, "gate must be one of"),
        ({"order": 2}, "order must be one of 0, 1"),
        ({"path": "cache.txt"}, "path must end in .json"),
        ({"path": "nowhere/cache.json"}, "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    pipe = pipeline("flux")
    settings = {"prompts": prompts("flux"), "num_inference_steps": STEPS, "progress": False, **given}
    with pytest.raises(ValueError, match=says):
        adadiff.calibrate(pipe, **settings)
    assert enabled(pipe.transformer) is None


def test_what_is_no_pipeline_is_refused() -> None:
    pipe = pipeline("flux")
    with pytest.raises(ValueError, match="takes a pipeline with one transformer"):
        adadiff.calibrate(pipe.transformer, prompts("flux"))
    with pytest.raises(ValueError, match="adadiff calibrate"):
        adadiff.calibrate(adadiff.load("digits"), [1, 2, 3, 4])
    adadiff.enable(pipe, "cache:threshold=0.1")
    with pytest.raises(ValueError, match="enabled already"):
        calibrated(pipe, "flux")
    assert enabled(pipe.transformer) is not None
    two = pipeline("wan")
    two.register_modules(transformer_2=pipeline("wan").transformer)
    other_named = SimpleNamespace(  # those that `enable` takes, as Ideogram4's
        components={"transformer": two.transformer, "unconditional_transformer": two.transformer_2},
        scheduler=two.scheduler,
    )
    for pipes in (two, other_named):
        with pytest.raises(ValueError, match="has 2"):
            adadiff.calibrate(pipes, prompts("wan"))


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    file.write_text("mine")
    with pytest.raises(ValueError, match="it exists; force=True replaces it"):
        calibrated(pipeline("flux"), "flux", path=file)
    assert file.read_text() == "mine"


@pytest.fixture(scope="module")
def cache() -> CalibratedCache:
    return calibrated(pipeline("flux"), "flux").cache


def test_thresholds_are_for_their_steps_and_times(cache: CalibratedCache) -> None:
    pipe = pipeline("flux")
    adadiff.enable(pipe, cache)
    draw(pipe, "flux", [1], STEPS)
    with pytest.raises(ValueError, match=f"is for {STEPS} steps, this run has {STEPS + 1}"):
        draw(pipe, "flux", [1], STEPS + 1)
    # as many, spread otherwise
    with pytest.raises(ValueError, match="another scheduler or size"):
        draw(pipe, "flux", [1], STEPS, sigmas=torch.linspace(1, 0.5, STEPS).tolist())
    draw(pipe, "flux", [1], STEPS)  # still there


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"transformer": "WanTransformer3DModel"}, "calibrated for transformer WanTransformer3DModel, here it is Flux"),
        ({"blocks": 57}, "calibrated for blocks 57"),
        ({"scheduler": "DDIMScheduler"}, "calibrated for scheduler DDIMScheduler"),
        ({"tied": True}, "calibrated for tied True"),
    ],
)
def test_another_pipeline_is_refused(changed: dict[str, Any], says: str, cache: CalibratedCache) -> None:
    pipe = pipeline("flux")
    with pytest.raises(ValueError, match=says):
        adadiff.enable(pipe, dataclasses.replace(cache, **changed))
    assert enabled(pipe.transformer) is None
    assert not any(module._compiled_call_impl for module in pipe.transformer.modules())
    with pytest.raises(ValueError, match="counts steps from the end"):
        adadiff.enable(pipe.transformer, cache)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda read: "no json", "it is no JSON"),
        (lambda read: json.dumps([1]), "does not hold"),
        (lambda read: json.dumps({**read, "format": "other"}), "does not hold"),
        (lambda read: json.dumps({**read, "format_version": 9}), "format version 9"),
        (lambda read: json.dumps({**read, "more": 1}), "unknown fields more"),
        (lambda read: json.dumps({k: v for k, v in read.items() if k != "t"}), "its fields"),
        (lambda read: json.dumps({**read, "thresholds": read["thresholds"][:-1]}), "thresholds and times"),
        (lambda read: json.dumps({**read, "thresholds": ["x"] * STEPS}), "finite numbers"),
        (lambda read: json.dumps({**read, "thresholds": [float("nan")] * STEPS}), "finite numbers"),
        (lambda read: json.dumps({**read, "thresholds": 3}), "its fields"),
        (lambda read: json.dumps({**read, "first": 0}), "first must be"),
        (lambda read: json.dumps({**read, "gate": "x"}), "gate must be"),
        (lambda read: json.dumps({**read, "order": 2}), "order must be 0 or 1"),
        (lambda read: json.dumps({**read, "order": True}), "order must be 0 or 1"),
        (lambda read: json.dumps({**read, "held_out": 3}), "its fields"),
        (lambda read: json.dumps({**read, "budget": "x"}), "budget must be"),
    ],
)
def test_a_file_of_another_kind_is_refused(change: Any, says: str, cache: CalibratedCache, tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    file.write_text(change(json.loads(cache.to_json())))
    with pytest.raises(ValueError, match=says) as raised:
        adadiff.enable(pipeline("flux"), file)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        adadiff.enable(pipeline("flux"), tmp_path / "nothing.json")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_picture_is_darker_where_more_runs(name: str, tmp_path: Path) -> None:
    pipe, brightness = pipeline(name), {}
    for policy in ("full", "reuse:every=3"):
        file = tmp_path / "run.png"
        record = adadiff.enable(pipe, policy)
        with pytest.raises(ValueError, match="has not been called"):
            record.picture(file)
        draw(pipe, name, [1, 2, 3], 6)
        record.picture(file)
        adadiff.disable(pipe)
        with Image.open(file) as opened:
            assert opened.format == "PNG"
            brightness[policy] = np.asarray(opened.convert("L"), dtype=float).mean()
    assert brightness["full"] < brightness["reuse:every=3"] - 5
