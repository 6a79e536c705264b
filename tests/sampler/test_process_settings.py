"""PyTorch's and NumPy's settings of a process or a thread, entered between calls: the same bits come of everything."""

import ast
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from torch import Tensor

import adadiff
from adadiff.diffusion import schedules
from adadiff.forward import decision
from adadiff.forward.options import ExecutionOptions
from adadiff.pipelines.pipeline import AdaDiffPipeline
from adadiff.policies import spelling
from adadiff.sampling import sample_batch
from sampler.settings import default_device, default_dtype, deterministic
from sampler.test_calibration import HALF, made
from sampler.test_early_exit import exits, parts
from sampler.test_pipeline import LATENT, vae
from sampler.tiny import requests, served

EXACT = ExecutionOptions(batch_invariant=True)
REQUESTS, ASKED = (
    requests(4, seed=77, most=3),
    requests(4, seed=5, most=3),
)  # made here, since their images follow the settings


SETTINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta device": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "gradients": torch.enable_grad,
    "anomaly detection": torch.autograd.detect_anomaly,
    "deterministic": lambda: deterministic("error"),
    "not deterministic": lambda: deterministic("default"),
    "numpy raises": lambda: np.errstate(all="raise"),
}


def draw_with_sample() -> list[Tensor]:
    found = []
    for request in REQUESTS:
        images, report = adadiff.sample(served(), 1, record_scores=True, **request)
        found += [images, report.exit_layer, report.scores.nan_to_num(-1)]
    together = {"policy": "exit:0.41", "class_labels": [0, 1, 2], "steps": [2, 3, 4], "guidance_scale": [1, 2.3, 1.7]}
    images, report = adadiff.sample(served(), 3, seed=[3, 4, 5], guidance_interval=(100.7, 900.1), **together)
    shallow, _ = adadiff.sample(served(), 2, steps=4, shallow_model=served(), t_switch=600, policy="exit:0.41")
    image = torch.linspace(-1, 1, 16, dtype=torch.float32, device="cpu").view(1, 4, 4)
    begun, _ = adadiff.sample(served(), 2, steps=7, init_image=image, strength=0.3, solver="dpm-fast", batch=1)
    invariant, _ = adadiff.sample(served(), 2, steps=3, policy="exit:0.41", execution=EXACT)
    device, _ = adadiff.sample(
        *(served(), 3), steps=3, policy="exit:0.41", execution=ExecutionOptions(count_sync="lagged"), tied=True
    )
    return [*found, images, report.exit_layer, shallow, begun, invariant, device]


def draw_calibrated() -> list[Tensor]:
    model = adadiff.Model(served().config).eval()
    model.to_empty(device="cpu").float()
    model.load_state_dict(served().state_dict())
    model.calibration = made(HALF)
    found = [
        adadiff.sample(model, 2, steps=3, policy=policy) for policy in ("exit:budget=0.5", "exit:table=0.5", "full")
    ]
    return [value for images, report in found for value in (images, report.exit_layer)]


def draw_with_solvers() -> list[Tensor]:
    solvers = (
        "ddim",
        "ddim:0.5,spacing=trailing-diffusers",
        "ddpm:spacing=respaced",
        "dpm++2m",
        "dpm++fast",
        "dpm-fast",
        "unipc:order=3",
        "heun",
    )
    return [adadiff.sample(served(), 2, steps=5, solver=solver)[0] for solver in solvers]


def look_with_trace() -> list[Tensor]:
    found = adadiff.trace(served(), steps=4, policy="exit:0.41", guidance_scale=1.7, class_labels=1)
    return [found.t, found.exit_layer, found.scores.nan_to_num(-1), found.x, found.x0, found.exit_scores.nan_to_num(-1)]


def call_forward() -> list[Tensor]:
    x = torch.linspace(-2, 2, 80, dtype=torch.float32, device="cpu").view(5, 1, 4, 4)
    t = torch.linspace(3, 990, 5, dtype=torch.float32, device="cpu")
    labels = torch.tensor([0, 1, 2, 3, 0], dtype=torch.int64, device="cpu")
    pairs = torch.tensor([1, 0, 2, 4, 3], device="cpu")
    found = []
    for policy in ("full", "exit:0.41", "exit:patience=0.5", "exit:depth=2.3", "exit:batch-mean=0.5"):
        output = adadiff.forward(served(), x, t, labels, policy=policy, cfg_partner=pairs, record_scores=True)
        found += [output.prediction, output.exit_layer, output.scores.nan_to_num(-1)]
    return found


def serve(threaded: bool) -> list[Tensor]:
    engine = adadiff.Engine(served(), 4, threaded=threaded, execution=EXACT)
    handles = [engine.submit(**request, record_scores=True) for request in ASKED]
    engine.close(timeout=60)
    return [value for handle in handles for value in (handle.result(0), handle.report.scores.nan_to_num(-1))]


def draw_with_a_pipeline() -> list[Tensor]:
    pipe = AdaDiffPipeline(served(LATENT), vae=vae())
    pipe.set_progress_bar_config(disable=True)

    def halve(pipe: object, step: int, t: float, values: dict) -> None:
        values["latents"].mul_(0.9)

    given = {"class_labels": [0, 1], "num_inference_steps": 3, "guidance_scale": 1.7, "policy": "exit:0.41"}
    generator = torch.Generator().manual_seed(1)
    images = pipe(generator=generator, output_type="pt", callback_on_step_end=halve, **given).images
    pictures = pipe(generator=generator, output_type="np", **given).images
    return [images, torch.from_numpy(pictures)]


def call_a_pipeline_of_diffusers(fused: bool) -> list[Tensor]:
    pipe = DiTPipeline(*parts(), DDIMScheduler(clip_sample=False))
    with torch.device("cpu"), default_dtype(torch.float32):
        weights = exits()
    adadiff.enable(pipe, "exit:0.17", exits=weights, fused=fused)
    x = torch.linspace(-2, 2, 3 * 144, dtype=torch.float32, device="cpu").view(3, 4, 6, 6)
    t, labels = (torch.tensor(own, device="cpu") for own in ([3, 500, 990], [7, 1, 999]))
    try:
        return [pipe.transformer(x, timestep=t, class_labels=labels).sample]
    finally:
        adadiff.disable(pipe)


USES: dict[str, Callable[[], list[Tensor]]] = {
    "sample": draw_with_sample,
    "a calibrated model": draw_calibrated,
    "solvers": draw_with_solvers,
    "trace": look_with_trace,
    "forward": call_forward,
    "engine": lambda: serve(threaded=True),
    "engine, stepped": lambda: serve(threaded=False),
    "pipeline": draw_with_a_pipeline,
    "diffusers' pipeline": lambda: call_a_pipeline_of_diffusers(fused=False),
    "diffusers' pipeline, fused": lambda: call_a_pipeline_of_diffusers(fused=True),
}


def forget() -> None:
    """What earlier calls have made and kept."""
    for cached in (schedules._alpha_bar, decision._of_all_passes, sample_batch._check_steps, spelling._spelled):
        cached.cache_clear()


@cache
def wanted(use: str) -> list[Tensor]:
    forget()
    return USES[use]()


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("use", USES)
def test_settings_of_others_change_no_bit(use: str, setting: str) -> None:
    """What is made and kept is made with the setting once, and read without it; then the other way round."""
    right = wanted(use)
    forget()
    with SETTINGS[setting]():
        first = USES[use]()
    later = USES[use]()
    forget()
    USES[use]()
    with SETTINGS[setting]():
        found = USES[use]()
    for values in (first, later, found):
        for value, own in zip(values, right, strict=True):
            assert (value.dtype, value.device) == (own.dtype, own.device)
            assert torch.equal(value, own)


def test_an_engine_made_in_a_setting_serves_after_it() -> None:
    right = wanted("engine, stepped")
    for setting in SETTINGS.values():
        with setting():
            engine = adadiff.Engine(served(), 4, threaded=False, execution=EXACT)
            handles = [engine.submit(**request, record_scores=True) for request in ASKED[:2]]
            engine.step()
        handles += [engine.submit(**request, record_scores=True) for request in ASKED[2:]]
        engine.close()
        found = [value for handle in handles for value in (handle.result(0), handle.report.scores.nan_to_num(-1))]
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


MADE = {
    "zeros",
    "ones",
    "full",
    "empty",
    "arange",
    "tensor",
    "as_tensor",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
}
UNTYPED = {"arange", "randint", "as_tensor"}  # of integers, or of what has a dtype
WHERE = ("adadiff/diffusion", "adadiff/forward", "adadiff/policies", "adadiff/sampling", "adadiff/engine")
FOLDERS = [Path(adadiff.__file__).parents[1] / name for name in (*WHERE, "adadiff/pipelines")]
KERNELS = Path(adadiff.__file__).parents[2] / "adadiff_kernels"


def test_no_tensor_is_made_by_the_defaults_of_the_process() -> None:
    """Each call that makes one names its device, and its dtype where that could be another."""
    found, calls = [], 0
    for folder in (*FOLDERS, KERNELS):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.") in MADE:
                    if not ast.unparse(node.func).startswith("torch."):
                        continue
                    calls += 1
                    named = {keyword.arg for keyword in node.keywords}
                    wanted = {"device"} if node.func.attr in UNTYPED else {"device", "dtype"}
                    if not wanted <= named:
                        found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert calls > 50
    assert not found
