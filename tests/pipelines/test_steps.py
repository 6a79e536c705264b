"""Which call is which step of a run: with every scheduler, in whatever direction and unit the network counts time."""

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.policies.reuse import ReuseContext, ReusePolicy
from pipelines.helpers import B, own, scripted
from pipelines.pipes import arguments, draw, pipeline
from pipelines.zoo import call, inputs


@dataclass
class Told(ReusePolicy):
    """Reuses after the first step, and keeps what it is told: (step, steps left)."""

    needs_steps_left: bool = True
    told: list[tuple[int, int]] = field(default_factory=list)

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        left = -1 if context.steps_left is None else int(context.steps_left[0])
        self.told.append((int(context.step[0]), left))
        return torch.ones_like(context.step, dtype=torch.bool)

    def __str__(self) -> str:
        return "told"


def countdown(steps: int) -> list[tuple[int, int]]:
    return [(step, steps - 1 - step) for step in range(steps)]


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": diffusers.DDIMScheduler,
    "heun": diffusers.HeunDiscreteScheduler,  # two calls at most times, with a step between them
    "kdpm2": diffusers.KDPM2AncestralDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,  # counts in `counter`
    "plms": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "lcm": diffusers.LCMScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_equal_times_are_several_steps_where_the_scheduler_steps_between_them(name: str) -> None:
    pipe = pipeline("dit" if name == "lcm" else "pixart")
    pipe.scheduler = SCHEDULERS[name]()
    policy = Told()
    record = adadiff.enable(pipe, policy)
    for _ in range(2):
        policy.told.clear()
        draw(pipe, "dit" if name == "lcm" else "pixart", [1, 2], steps=7)
        steps = len(pipe.scheduler.timesteps)
        assert policy.told == countdown(steps)
        assert [bool(step.full.any()) for step in record.steps] == [True] + [False] * (steps - 1)


def test_times_that_coincide_in_bfloat16_are_several_steps() -> None:
    pipe = pipeline("flux")
    pipe.transformer.to(torch.bfloat16)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=12.0)
    given = {
        key: value.bfloat16() if isinstance(value, Tensor) else value for key, value in arguments("flux", [1]).items()
    }
    policy = Told()
    record = adadiff.enable(pipe, policy)
    pipe(**given, num_inference_steps=50)
    assert policy.told == countdown(50)
    assert len({float(step.t.max()) for step in record.steps}) < 50


class Looped:
    """A transformer in what adadiff takes for a pipeline, to call it as one likes."""

    def __init__(self, name: str, scheduler: Any, policy: Any):
        self.components, self.scheduler = {"transformer": own(name)}, scheduler
        self.record = adadiff.enable(self, policy)


def looped(name: str, scheduler: Any, policy: Any) -> tuple[Any, Any]:
    pipe = Looped(name, scheduler, policy)
    return pipe, pipe.components["transformer"]


def at(name: str, module: Any, step: int, time: float, **more: Any) -> None:
    given = inputs(name, range(B), step)
    key = "t" if "t" in given else "timestep"
    with torch.no_grad():
        module(**{**given, key: torch.full_like(given[key], time), **more})


@pytest.mark.parametrize("name", ["LuminaNextDiT2DModel", "Ideogram4Transformer2DModel"])
@pytest.mark.parametrize("stepped", [True, False])
def test_pipelines_that_count_time_upwards(name: str, stepped: bool) -> None:
    """As they pass 1 - t, with a scheduler that counts its steps and without such a count."""
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler() if stepped else diffusers.DDIMScheduler()
    pipe, module = looped(name, scheduler, Told())
    for steps in (6, 4):
        scheduler.set_timesteps(steps)
        sample = torch.zeros(1)
        for step, time in enumerate(scheduler.timesteps):
            at(name, module, step, 1 - float(time) / 1000)
            if stepped:
                scheduler.step(sample, time, sample)
        assert [bool(step.full.any()) for step in pipe.record.steps] == [True] + [False] * (steps - 1)


def test_a_scheduler_whose_times_rise() -> None:
    scheduler = diffusers.DDIMInverseScheduler()
    scheduler.set_timesteps(6)
    assert scheduler.timesteps[0] < scheduler.timesteps[-1]
    pipe, module = looped("PixArtTransformer2DModel", scheduler, policy := Told())
    for _ in range(2):  # time goes back at the second, with the same times
        policy.told.clear()
        for step, time in enumerate(scheduler.timesteps):
            at("PixArtTransformer2DModel", module, step, float(time))
        assert policy.told == countdown(6)
        assert len(pipe.record.steps) == 6


def test_calls_at_one_step_of_the_scheduler_keep_apart_whatever_their_samples() -> None:
    name, scheduler = "AuraFlowTransformer2DModel", diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    pipe, module = looped(name, scheduler, policy := Told())
    for step, time in enumerate(scheduler.timesteps):
        at(name, module, step, float(time) / 1000)
        at(name, module, step + 5, float(time) / 1000)  # another sample
        scheduler.step(torch.zeros(1), time, torch.zeros(1))
    assert policy.told == [pair for pair in countdown(4) for _ in (0, 1)]
    assert [(step.step, step.call) for step in pipe.record.steps] == [(s, c) for s in range(4) for c in (0, 1)]


def test_steps_are_counted_where_nobody_steps_the_scheduler() -> None:
    """Times in units of the network, 1 among them, which is no time of the scheduler's."""
    name = "FluxTransformer2DModel"
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.DDIMScheduler(steps_offset=1)):
        scheduler.set_timesteps(8)
        pipe, module = looped(name, scheduler, policy := Told())
        for step in range(8):
            at(name, module, step, 1 - step / 8)
        assert policy.told == countdown(8)
        assert len(pipe.record.steps) == 8


def test_a_run_that_begins_late_counts_from_there() -> None:
    """As image-to-image does: with the place of its first time in a scheduler that does not count."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(8)
    _pipe, module = looped("PixArtTransformer2DModel", scheduler, policy := Told())
    for step, time in enumerate(scheduler.timesteps[5:]):
        at("PixArtTransformer2DModel", module, step, float(time))
    assert policy.told == countdown(3)


def test_steps_left_that_nobody_can_tell_are_refused() -> None:
    """In a loop of one's own, with another scheduler than that of the pipeline that is enabled."""
    name, scheduler = "SD3Transformer2DModel", diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    pipe, module = looped(name, scheduler, "reuse:every=3,dense_late=2")

    def steps(count: int, stepped: bool) -> None:
        for step, time in enumerate(scheduler.timesteps[:count]):
            at(name, module, step, float(time))
            if stepped:
                scheduler.step(torch.zeros(1), time, torch.zeros(1))

    steps(6, stepped=True)
    with pytest.raises(ValueError, match=r"the scheduler has taken all 6$"):
        steps(1, stepped=False)
    scheduler.set_timesteps(6)
    scheduler._step_index = 2  # as a run leaves it that was broken off
    with pytest.raises(ValueError, match=r"the scheduler of the enabled pipeline does not step$"):
        steps(2, stepped=False)
    del pipe
    gc.collect()
    with pytest.raises(ValueError, match="the enabled pipeline no longer exists; call disable, and enable"):
        steps(1, stepped=False)


def test_nan_in_a_lane_begins_no_run_for_the_others() -> None:
    """Two calls a step without a context, for which the pipeline makes the sample anew."""
    name, found = "AuraFlowTransformer2DModel", []
    for value in (0.0, torch.nan):
        module = own(name)
        record = adadiff.enable(module, scripted("none", 3, B))
        for step in range(3):
            for _ in range(2):
                given = inputs(name, range(B), step)
                given["hidden_states"][1, 0] = value
                with torch.no_grad():
                    module(**given)
        found.append([(step.step, step.call, step.full[[0, 2, 3, 4]].tolist()) for step in record.steps])
    assert found[0] == found[1]
    assert len(found[1]) == 6


@torch.inference_mode()
def test_samples_and_texts_that_change_in_place_in_inference_mode() -> None:
    """Their changes are not counted there."""
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    record = adadiff.enable(module, scripted("none", 9, B))
    given = inputs(name, range(B), 0)
    module(**given)
    given["timestep"] = given["timestep"] - 1
    module(**given)
    assert not record.steps[-1].full.any()
    given["encoder_hidden_states"][3] += 1
    given["timestep"] = given["timestep"] - 1
    module(**given)
    assert record.steps[-1].full.tolist() == [False, False, False, True, False]
    given["hidden_states"] += 1  # at the same time: of another run
    module(**given)
    assert record.steps[-1].full.all()


def test_each_thread_has_runs_of_its_own() -> None:
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    record = adadiff.enable(module, scripted("none", 9, B))
    call(name, range(B), 0, module)
    call(name, range(B), 1, module)
    assert not record.steps[-1].full.any()
    thread = threading.Thread(target=lambda: call(name, range(B), 2, module))
    thread.start()
    thread.join()
    assert record.steps[-1].full.all()


def test_steps_that_are_taken_for_runs_are_told(caplog: pytest.LogCaptureFixture) -> None:
    name, module = "FluxTransformer2DModel", own("FluxTransformer2DModel")
    record = adadiff.enable(module, "reuse:every=2")
    for step in range(6):  # upwards, and no scheduler to ask
        at(name, module, step, step / 8)
    assert len(record.steps) == 1
    told = [entry.getMessage() for entry in caplog.records if entry.name == "adadiff"]
    assert len(told) == 1
    assert "left nothing out in 4 calls: they were counted as 4 runs, the last of one step" in told[0]
