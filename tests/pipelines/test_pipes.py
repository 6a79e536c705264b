"""Whole pipelines: calls, step counts, guidance, several at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.pipelines.enable import enabled
from adadiff.pipelines.record import ReuseRecord
from pipelines.pipes import TRANSFORMERS, draw, pipeline
from pipelines.zoo import call, network

IMAGES = [1, 2, 3]
EACH = pytest.mark.parametrize("name", TRANSFORMERS)


def threshold(pipe: Any, name: str, **settings: Any) -> float:
    """At which some lanes reuse in the second step of a run, and some do not."""
    record = adadiff.enable(pipe, "cache:threshold=0")
    draw(pipe, name, IMAGES, **settings)
    adadiff.disable(pipe)
    return float(next(step.change for step in record.steps if step.step == 1).median())


def decisions(record: ReuseRecord) -> list[list[bool]]:
    return [step.full.tolist() for step in record.steps]


@pytest.mark.parametrize("guided", [False, True])
@EACH
def test_a_pipeline_draws_and_is_as_it_was_afterwards(name: str, guided: bool) -> None:
    pipe = pipeline(name)
    plain = draw(pipe, name, IMAGES, guided=guided)
    policy = f"cache:threshold={threshold(pipe, name, guided=guided)}"
    record = adadiff.enable(pipe, policy)
    images = draw(pipe, name, IMAGES, guided=guided)
    assert 0.02 < record.left_out < 0.8
    assert not torch.equal(images, plain)
    assert bool(images.isfinite().all())
    in_two_calls = guided and name == "wan"
    assert record.calls == (12 if in_two_calls else 6)
    assert {step.context for step in record.steps} >= ({"cond", "uncond"} if in_two_calls else set())
    assert any(len(set(lanes)) == 2 for lanes in decisions(record)), "all lanes decide alike"
    # a second call is the first one again, and that of a pipeline that has drawn nothing
    assert torch.equal(draw(pipe, name, IMAGES, guided=guided), images)
    fresh = pipeline(name)
    adadiff.enable(fresh, policy)
    assert torch.equal(draw(fresh, name, IMAGES, guided=guided), images)
    adadiff.disable(pipe)
    assert torch.equal(draw(pipe, name, IMAGES, guided=guided), plain)


@pytest.mark.parametrize(
    "name", ["pixart", "flux", "wan", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dit", "sd3", "zimage"))]
)
def test_calls_of_other_lengths_sizes_and_prompts_leave_nothing_behind(name: str) -> None:
    pipe = pipeline(name)
    policy = f"cache:threshold={threshold(pipe, name)}"
    runs: list[Callable[[Any], Tensor]] = [
        lambda pipe: draw(pipe, name, IMAGES, 6),
        lambda pipe: draw(pipe, name, IMAGES, 3),
        lambda pipe: draw(pipe, name, [4], 7),
        lambda pipe: draw(pipe, name, [4, 5, 6], 6),
        lambda pipe: draw(pipe, name, [3, 2, 1], 1 if name != "pixart" else 2),  # its schedule has no single step
        lambda pipe: draw(pipe, name, [3, 2, 1], 2, guided=False),
        lambda pipe: draw(pipe, name, [3, 2, 1], 6),
    ]
    adadiff.enable(pipe, policy)
    together = [run(pipe) for run in runs]
    for run, images in zip(runs, together, strict=True):
        alone = pipeline(name)
        adadiff.enable(alone, policy)
        assert torch.equal(run(alone), images)


def test_several_pipelines_take_turns() -> None:
    """Step by step: each draws inside the callback of another."""
    names = ("flux", "sd3", "pixart")
    pipes = {name: pipeline(name) for name in names}
    policies = {name: f"cache:threshold={threshold(pipes[name], name)}" for name in names}
    for name, pipe in pipes.items():
        adadiff.enable(pipe, policies[name])
    alone = {name: draw(pipe, name, IMAGES) for name, pipe in pipes.items()}
    inner: list[Tensor] = []

    def between(pipe: Any, step: int, t: Tensor, values: dict) -> dict:
        inner.append(draw(pipes["sd3"], "sd3", IMAGES))
        return values

    outer = draw(pipes["flux"], "flux", IMAGES, callback_on_step_end=between)
    assert torch.equal(outer, alone["flux"])
    assert len(inner) == 6
    assert all(torch.equal(images, alone["sd3"]) for images in inner)
    assert torch.equal(draw(pipes["pixart"], "pixart", IMAGES), alone["pixart"])


def test_a_run_that_stops_half_way_leaves_nothing_behind() -> None:
    pipe = pipeline("flux")
    adadiff.enable(pipe, f"cache:threshold={threshold(pipe, 'flux')}")
    images = draw(pipe, "flux", IMAGES)

    def stop(*_: Any) -> dict:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        draw(pipe, "flux", [7, 8, 9], callback_on_step_end=stop)
    assert torch.equal(draw(pipe, "flux", IMAGES), images)


def test_tied_halves_decide_together() -> None:
    pipe = pipeline("sd3")
    policy = f"cache:threshold={threshold(pipe, 'sd3')}"
    apart = adadiff.enable(pipe, policy)
    draw(pipe, "sd3", IMAGES)
    assert any(step[:3] != step[3:] for step in decisions(apart))
    adadiff.disable(pipe)
    tied = adadiff.enable(pipe, policy, tied=True)
    draw(pipe, "sd3", IMAGES)
    assert all(step[:3] == step[3:] for step in decisions(tied))
    assert tied.left_out > 0
    adadiff.disable(pipe)
    two_calls = pipeline("wan")
    adadiff.enable(two_calls, policy, tied=True)
    with pytest.raises(ValueError, match="tied needs both halves in one call of twice the batch, this one has 3 lanes"):
        draw(two_calls, "wan", IMAGES)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "dit", "zimage"])
def test_a_static_plan_counts_steps(name: str) -> None:
    pipe = pipeline(name)
    record = adadiff.enable(pipe, "reuse:every=3,dense_early=2,dense_late=2")
    draw(pipe, name, IMAGES, 9)
    for context in {step.context for step in record.steps}:
        full = [step.full.tolist() for step in record.steps if step.context == context]
        assert [set(lanes) for lanes in full] == [
            {ran} for ran in (True, True, False, False, True, False, False, True, True)
        ]


def test_a_depth_takes_the_rest_of_the_first_step() -> None:
    pipe = pipeline("flux")
    record = adadiff.enable(pipe, "exit:depth=2")
    draw(pipe, "flux", IMAGES)
    assert [step.blocks.tolist() for step in record.steps] == [[6] * 3] + [[2] * 3] * 5


def test_the_input_gate_sums_changes_up_to_the_next_full_step() -> None:
    """Of inputs that do not depend on what comes out, so that the sums can be told beforehand."""
    name, steps, lanes = "SD3Transformer2DModel", 9, range(4)
    module = network(name)

    def changes(threshold: float) -> tuple[Tensor, Tensor]:
        record = adadiff.enable(module, f"cache:threshold={threshold},gate=input")
        for step in range(steps):
            call(name, lanes, step)
        adadiff.disable(module)
        assert not any(part._forward_pre_hooks for part in module.modules())
        return torch.stack([step.change for step in record.steps]), torch.stack([step.full for step in record.steps])

    summed, full = changes(1e9)
    assert full.tolist() == [[True] * 4] + [[False] * 4] * 8  # nobody runs in full after the first step
    single = summed.diff(dim=0)
    assert bool((single > 0).all())
    threshold = float(single.median() * 2.5)
    found, full = changes(threshold)
    total = torch.zeros(4)
    for step in range(1, steps):
        total = total + single[step - 1]
        torch.testing.assert_close(found[step], total, rtol=1e-4, atol=1e-6)
        assert full[step].tolist() == (total > threshold).tolist()
        total = torch.where(total > threshold, 0.0, total)
    assert 0.2 < full[1:].float().mean() < 0.8


def test_the_summary_draws_lanes_and_steps() -> None:
    pipe = pipeline("flux")
    adadiff.enable(pipe, "reuse:every=2")
    assert adadiff.summary(pipe).endswith("no calls yet")
    draw(pipe, "flux", IMAGES)
    text = adadiff.summary(pipe)
    assert text.splitlines()[:5] == [
        "transformer: policy 'reuse:every=2', 6 blocks",
        "cond: 6 steps, 3 lanes (# all blocks, . reused)",
        *(f"   {lane} #.#.#.  50% reused" for lane in range(3)),
    ]
    assert "41.7% of the blocks left out in 6 calls" in text  # 5 of 6 blocks in half of the steps
    adadiff.disable(pipe)
    with pytest.raises(ValueError, match="FluxPipeline is not enabled"):
        adadiff.summary(pipe)


def test_a_policy_that_leaves_nothing_out_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline("flux")
    record = adadiff.enable(pipe, "cache:threshold=0")
    for _ in range(3):
        draw(pipe, "flux", IMAGES)
    adadiff.disable(pipe)
    told = [entry.getMessage() for entry in caplog.records if entry.name == "adadiff"]
    assert told == ["transformer: policy 'cache:threshold=0.0' left nothing out in 6 calls"]
    assert record.left_out == 0
    assert "nothing was left out" in record.summary()
    adadiff.enable(pipe, "full")
    draw(pipe, "flux", IMAGES)
    adadiff.disable(pipe)
    assert len([entry for entry in caplog.records if entry.name == "adadiff"]) == 1


def test_a_pipeline_of_two_transformers_is_enabled_as_a_whole() -> None:
    pipe = pipeline("wan")
    pipe.register_modules(transformer_2=network("WanTransformer3DModel"))
    pipe.register_to_config(boundary_ratio=0.5)
    plain = draw(pipe, "wan", IMAGES)
    adadiff.enable(pipe, "reuse:every=2")
    assert not torch.equal(draw(pipe, "wan", IMAGES), plain)
    lines = adadiff.summary(pipe).splitlines()
    assert [line.split(":")[0] for line in lines if "policy" in line] == ["transformer", "transformer_2"]
    assert all(enabled(part).record.left_out > 0 for part in (pipe.transformer, pipe.transformer_2))
    adadiff.disable(pipe)
    assert torch.equal(draw(pipe, "wan", IMAGES), plain)
