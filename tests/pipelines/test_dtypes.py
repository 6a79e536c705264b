"""In 16 bits: the same promises as in 32, up to their rounding; and pipelines from end to end."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import adadiff
from pipelines.helpers import B, difference, of_lane, scripted
from pipelines.pipes import TRANSFORMERS, arguments, pipeline
from pipelines.zoo import CASES, call_in, cast, network

STEPS, LANES = 2, (1, B - 1)
KEEPS = {"Kandinsky5Transformer3DModel": "the plain network takes no other dtype than float32 for its times"}
# hidden states in another dimension, rows several times the batch, two streams, lists, several outputs
QUICK = {
    *("DiTTransformer2DModel", "FluxTransformer2DModel", "QwenImage, edit", "ErnieImageTransformer2DModel"),
    *("LatteTransformer3DModel", "WanTransformer3DModel", "ZImageTransformer2DModel", "MochiTransformer3DModel"),
}
EVERY = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES if name not in KEEPS]


def in_steps(dtype: torch.dtype, name: str, lanes: Any, policy: Any = None) -> list[list[Tensor]]:
    module = copy.deepcopy(network(name)).to(dtype)
    if policy is not None:
        adadiff.enable(module, policy, blocks=CASES[name].blocks)
    return [call_in(dtype, name, lanes, step, module) for step in range(STEPS)]


@pytest.mark.parametrize("name", EVERY)
def test_rows_in_bfloat16_are_those_of_runs_alone(name: str) -> None:
    """The self-check raises no false alarm, and nothing goes through another dtype than the network's own."""
    dtype, policy = torch.bfloat16, scripted("alternating", STEPS, B)
    plain, outputs = in_steps(dtype, name, range(B)), in_steps(dtype, name, range(B), policy)
    assert all(
        a.dtype == b.dtype for one, two in zip(plain, outputs, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert difference(outputs[:1], plain[:1]) == 0
    assert difference(outputs, plain) > 0
    largest = max(float(part.abs().max()) for parts in plain for part in parts)
    for lane in LANES:
        own = difference(of_lane(plain, lane), in_steps(dtype, name, [lane]))
        allowed = 2 * max(own, torch.finfo(dtype).eps * largest)
        assert difference(of_lane(outputs, lane), in_steps(dtype, name, [lane], policy.column(lane))) <= allowed


QUICK_PIPES = {("flux", torch.bfloat16), ("sd3", torch.float16)}


def half(name: str, dtype: torch.dtype) -> Any:
    pipe = pipeline(name)
    pipe.transformer.to(dtype)
    if name == "dit":
        pipe.vae.to(dtype)
    return pipe


PIPES = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK_PIPES else [pytest.mark.slow])
    for name in TRANSFORMERS
    for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("name", "dtype"), PIPES)
def test_whole_calls_draw_and_are_calibrated(name: str, dtype: torch.dtype) -> None:
    """Prompts are as the pipeline wants them, in the network's dtype."""
    pipe, given = half(name, dtype), cast(dict(arguments(name, [1, 2])), dtype)
    found = adadiff.calibrate(
        pipe,
        list(range(4))
        if name == "dit"
        else [{k: v for k, v in cast(arguments(name, [i]), dtype).items() if k != "generator"} for i in range(4)],
        0.7,
        num_inference_steps=4,
        progress=False,
        **({"guidance_scale": 4.0} if name == "dit" else {}),
    )
    assert 0.3 < found.share < 1
    assert found.cache.held_out.error > 0
    for policy in (found.cache, "cache:threshold=0.5,gate=input"):
        record = adadiff.enable(pipe, policy)
        images = pipe(**given, num_inference_steps=4, **({"output_type": "pt"} if name == "dit" else {}))
        assert record.calls
        assert images
        adadiff.disable(pipe)
