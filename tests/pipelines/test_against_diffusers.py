"""Beside diffusers' own first-block cache, which takes one decision for the batch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from torch import nn

import adadiff
from pipelines.helpers import difference
from pipelines.pipes import draw, pipeline
from pipelines.zoo import call, network

STEPS = 6
# Theirs raises for the other classes, or counts residuals from outside of the blocks twice (WanVACE).
WORKS = [
    *("FluxTransformer2DModel", "CogView4Transformer2DModel", "HunyuanImageTransformer2DModel"),
    *("QwenImageTransformer2DModel", "QwenImage, edit", "CogVideoXTransformer3DModel", "MochiTransformer3DModel"),
    *("HunyuanVideoTransformer3DModel", "HunyuanVideo, tokens replaced", "LTXVideoTransformer3DModel"),
    *("HunyuanVideoFramepackTransformer3DModel", "WanTransformer3DModel"),
]


@contextmanager
def theirs(module: nn.Module, threshold: float) -> Iterator[list[bool]]:
    """Their cache; the list takes their decisions, True where all blocks run."""
    decided: list[bool] = []
    decide = FBCHeadBlockHook._should_compute_remaining_blocks

    def noted(self: FBCHeadBlockHook, residual: torch.Tensor) -> bool:
        decided.append(decide(self, residual))
        return decided[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FBCHeadBlockHook, "_should_compute_remaining_blocks", noted)
        module.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        try:
            yield decided
        finally:
            module.disable_cache()


def threshold_between(changes: torch.Tensor) -> float:
    """In the middle of the widest gap of the inner half of all changes, so that no rounding decides."""
    inner = changes[changes.isfinite()].sort().values
    inner = inner[len(inner) // 4 : len(inner) - len(inner) // 4]
    at = int(inner.diff().argmax())
    return float((inner[at] + inner[at + 1]) / 2)


@pytest.mark.parametrize("name", WORKS)
def test_one_sample_is_decided_and_computed_as_theirs(name: str) -> None:
    module = copy.deepcopy(network(name))
    record = adadiff.enable(module, "cache:threshold=0")
    plain = [call(name, [2], step, module) for step in range(STEPS)]
    adadiff.disable(module)
    threshold = threshold_between(torch.stack([step.change for step in record.steps]).flatten())
    record = adadiff.enable(module, f"cache:threshold={threshold}")
    ours = [call(name, [2], step, module) for step in range(STEPS)]
    adadiff.disable(module)
    with theirs(module, threshold) as decided, module.cache_context("one"):
        expected = [call(name, [2], step, module) for step in range(STEPS)]
    assert [bool(step.full) for step in record.steps] == decided
    assert set(decided) == {True, False}
    largest = max(float(part.abs().max()) for parts in plain for part in parts)
    assert difference(ours, expected) <= 8 * torch.finfo(torch.float32).eps * largest < difference(ours, plain) / 100


def test_one_image_of_a_pipeline_is_theirs() -> None:
    pipe = pipeline("flux")
    record = adadiff.enable(pipe, "cache:threshold=0")
    draw(pipe, "flux", [3])
    adadiff.disable(pipe)
    threshold = threshold_between(torch.stack([step.change for step in record.steps]).flatten())
    record = adadiff.enable(pipe, f"cache:threshold={threshold}")
    ours = draw(pipe, "flux", [3])
    adadiff.disable(pipe)
    with theirs(pipe.transformer, threshold) as decided:
        expected = draw(pipe, "flux", [3])
    assert [bool(step.full) for step in record.steps] == decided
    assert set(decided) == {True, False}
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("B", [2, 8, pytest.param(32, marks=pytest.mark.slow)])
def test_an_image_does_not_depend_on_its_batch_as_it_does_with_theirs(B: int) -> None:
    pipe = pipeline("flux")
    record = adadiff.enable(pipe, "cache:threshold=0")
    draw(pipe, "flux", range(B), STEPS)
    adadiff.disable(pipe)
    threshold = threshold_between(torch.stack([step.change for step in record.steps]).flatten())

    record = adadiff.enable(pipe, f"cache:threshold={threshold}")
    together = draw(pipe, "flux", range(B), STEPS)
    full = torch.stack([step.full for step in record.steps])  # [steps, B]
    moved = 0
    for image in range(B):
        alone = draw(pipe, "flux", [image], STEPS)
        same = torch.equal(torch.stack([step.full[0] for step in record.steps]), full[:, image])
        moved += not same or not torch.allclose(alone[0], together[image], rtol=0, atol=1e-5)
    adadiff.disable(pipe)
    assert len(set(map(tuple, full.T.tolist()))) > 1, "all images decide alike"
    assert moved == 0

    with theirs(pipe.transformer, threshold):
        together = draw(pipe, "flux", range(B), STEPS)
    changed = 0
    for image in range(B):
        with theirs(pipe.transformer, threshold):
            alone = draw(pipe, "flux", [image], STEPS)
        changed += not torch.allclose(alone[0], together[image], rtol=0, atol=1e-3)
    assert changed >= B // 4, f"the cache of the batch changes {changed} of {B}"
