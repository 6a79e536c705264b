"""The image that a sample's last prediction would end in, against two formulas that know nothing of how it is made."""

import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from adadiff.config import ModelConfig
from adadiff.diffusion.noise import initial_noise
from adadiff.engine.engine import Engine, Handle
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.model import Model
from adadiff.models.uvit import UViTConfig
from adadiff.uem import PAPER
from sampler.test_text_and_images import SHAPE, schedule
from sampler.tiny import SERVED, Inputs, plain_layers, plain_predictions, requests, served, stepped

INTERVAL = (200.0, 800.0)
REQUESTS = [
    {"seed": 3, "steps": 4, "class_labels": 1, "policy": "exit:0.5"},
    {"seed": 4, "steps": 5, "class_labels": 2, "policy": "full", "guidance_scale": 3.0},
    {"seed": 5, "steps": 3, "class_labels": 0, "policy": "exit:depth=2", "guidance_scale": 0.4, "tied": True},
    {"seed": 6, "steps": 5, "class_labels": 1, "policy": "full", "guidance_scale": 2.0, "guidance_interval": INTERVAL},
    {"seed": 7, "steps": 2, "policy": "full"},
]


def by_hand(name: str, request: dict, exit_layer: Tensor) -> list[Tensor]:
    """DDIM in float64 by plain modules, each lane through as many blocks as exit_layer, [steps, 2], says: the images
    predicted at every step."""
    model = served(ModelConfig(SERVED.network, name, null_label=3, exits=PAPER))
    times, alpha_bar = schedule(name, request["steps"])
    low, high = request.get("guidance_interval", (-math.inf, math.inf))
    scale, x = request.get("guidance_scale", 1.0), initial_noise(torch.tensor([request["seed"]]), SHAPE)[0].double()
    predicted = []
    for k, t in enumerate(times):
        label = torch.tensor(request.get("class_labels", 3))
        eps = at_layer(model, t, x, label, int(exit_layer[k, 0]))
        if scale != 1 and low <= t <= high:
            uncond = at_layer(model, t, x, torch.tensor(3), int(exit_layer[k, 1]))
            eps = uncond + scale * (eps - uncond)
        x0 = (x - math.sqrt(1 - alpha_bar[k]) * eps) / math.sqrt(alpha_bar[k])
        x = math.sqrt(alpha_bar[k + 1]) * x0 + math.sqrt(1 - alpha_bar[k + 1]) * eps
        predicted.append(x0)
    return predicted


def at_layer(model: Model, t: float, x: Tensor, label: Tensor, layer: int) -> Tensor:
    given = Inputs(x[None].float(), torch.tensor([t]).float(), label[None])
    rows = plain_layers(model.backbone, given)
    return plain_predictions(model.backbone, model.exits, given, rows)[layer - 1, 0].double()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["linear", "stable_diffusion", "vp"])
def test_after_every_step_by_plain_modules(name: str, exact: bool) -> None:
    """Guided and unguided, all in one batch, each exiting elsewhere; what a callback sees is what a caller sees."""
    seen: dict[Handle, list[Tensor]] = {}
    model = served(ModelConfig(SERVED.network, name, null_label=3, exits=PAPER))
    engine = Engine(model, 16, threaded=False, execution=ExecutionOptions(batch_invariant=exact))

    def look(handle: Handle) -> None:
        seen.setdefault(handle, []).append(handle.predicted_x0())

    handles = [engine.submit(**request, on_step=look) for request in REQUESTS]
    while engine.step():
        for handle in handles:
            if not handle.done():
                assert torch.equal(handle.predicted_x0(), seen[handle][-1])
    for handle, request in zip(handles, REQUESTS, strict=True):
        wanted = by_hand(name, request, handle.report.exit_layer[:, 0])
        assert len(seen[handle]) == request["steps"]
        for found, own in zip(seen[handle], wanted, strict=True):
            assert (found.shape, found.dtype, found.device.type) == (SHAPE, torch.float32, "cpu")
            torch.testing.assert_close(found.double(), own, rtol=2e-3, atol=2e-4 * float(own.abs().max()))
        # the last step of DDIM goes there
        size = float(handle.result(0).abs().max())
        torch.testing.assert_close(seen[handle][-1], handle.result(0), rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_two_states_of_ddim_say_it(scale: float, channels: int) -> None:
    """x = sqrt(a) x0 + sqrt(1 - a) eps before and after a step, solved for x0; some channels guided and others not."""
    network = UViTConfig(4, 3, 2, 16, 4, 2, num_classes=4)
    model = served(ModelConfig(network, "linear", null_label=3, exits=PAPER))
    engine = Engine(model, 4, threaded=False)
    request = {"seed": 1, "steps": 6, "class_labels": 0, "guidance_scale": scale, "guided_channels": channels}
    handle = engine.submit(policy="exit:0.5", **request)
    engine.submit(seed=2, steps=6, class_labels=2)
    _, alpha_bar = schedule("linear", 6)
    x = initial_noise(torch.tensor([1]), (3, 4, 4))[0].double()
    for k in range(5):
        engine.step()
        after = engine._batch.peek(np.array([handle._slot[0]]))[0].double()
        a, b = alpha_bar[k], alpha_bar[k + 1]
        wanted = (math.sqrt(1 - b) * x - math.sqrt(1 - a) * after) / (
            math.sqrt(1 - b) * math.sqrt(a) - math.sqrt(1 - a) * math.sqrt(b)
        )
        size = float(wanted.abs().max())
        torch.testing.assert_close(handle.predicted_x0().double(), wanted, rtol=1e-3, atol=1e-3 * size)
        x = after
    engine.close()


@pytest.mark.parametrize("solver", ["ddpm", "dpm++2m", "ddim:0.5", "dpm++fast", "unipc", "heun"])
def test_whatever_the_solver_it_is_that_of_the_state_and_the_prediction(solver: str) -> None:
    """Also of singlestep solvers, whose evaluations lie between timesteps."""
    calls = []

    def noted(*given: object, **options: object) -> ForwardOutput:
        output = run_forward(*given, **options)
        calls.append((given[1].clone(), float(given[2][0]), output.prediction.clone()))
        return output

    engine = stepped(1, forward=noted)
    handle = engine.submit(seed=3, steps=6, solver=solver, class_labels=1, policy="exit:0.5")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    logs = (1 - betas).log().cumsum(0)
    while not handle.done():
        engine.step()
        if handle.done():
            break
        x, t, eps = (value[0].double() if isinstance(value, Tensor) else value for value in calls[-1])
        low = min(int(t), 998)
        a = math.exp(float(logs[low] + (t - low) * (logs[low + 1] - logs[low])))
        wanted = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        size = float(wanted.abs().max())
        torch.testing.assert_close(handle.predicted_x0().double(), wanted, rtol=1e-4, atol=1e-5 * size)


def test_there_is_none_before_the_first_step_and_after_the_end() -> None:
    engine = stepped(1)
    first, second = engine.submit(seed=0, steps=2), engine.submit(seed=1, steps=2)
    for handle in (first, second):
        with pytest.raises(ValueError, match="not in flight"):
            handle.predicted_x0()
    engine.step()
    held = first.predicted_x0()
    assert held.isfinite().all()
    with pytest.raises(ValueError, match="not in flight"):
        second.predicted_x0()  # it waits
    engine.step()
    with pytest.raises(ValueError, match="not in flight"):
        first.predicted_x0()
    engine._admit()  # it has the slot of the first, and has made no step
    with pytest.raises(ValueError, match="has made no step yet"):
        second.predicted_x0()
    engine.step()
    assert not torch.equal(second.predicted_x0(), held)
    second.cancel()
    engine.step()
    with pytest.raises(ValueError, match="not in flight"):
        second.predicted_x0()


def test_it_is_the_callers_own() -> None:
    engine = stepped(4)
    request = {"seed": 3, "steps": 3, "policy": "exit:0.5", "guidance_scale": 2.0}
    looked_at, other = engine.submit(**request), engine.submit(**request)
    while engine.step():
        if not looked_at.done():
            before = looked_at.predicted_x0().clone()
            looked_at.predicted_x0().zero_()
            assert torch.equal(looked_at.predicted_x0(), before)
    assert torch.equal(looked_at.result(0), other.result(0))


def test_where_memory_for_all_at_once_is_lacking() -> None:
    """Each sample's prediction is that of the pass it was in."""
    wanted = [request for request in requests(40, seed=6, most=6) if request["steps"] > 2][:8]

    def limited(*given: object, **options: object) -> ForwardOutput:
        if len(given[1]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_forward(*given, **options)

    engines = stepped(16), stepped(16, forward=limited)
    handles = [[engine.submit(**request) for request in wanted] for engine in engines]
    for _ in range(2):
        for engine in engines:
            engine.step()
        for one, other in zip(*handles, strict=True):
            if not one.done():
                assert torch.equal(one.predicted_x0(), other.predicted_x0())
    assert engines[1].report.batch.halvings > 0


def test_other_threads_may_look_while_the_engine_runs() -> None:
    begun, seen = threading.Event(), []
    with Engine(served(), 2) as engine:
        handle = engine.submit(seed=1, steps=400, policy="exit:0.5", on_step=lambda _: begun.set())
        assert begun.wait(60)
        while not handle.done() and len(seen) < 20:
            try:
                seen.append(handle.predicted_x0())
            except ValueError:
                break
        assert handle.result(60).isfinite().all()
    assert seen
    assert all(image.isfinite().all() for image in seen)
