"""What comes out as NaN or infinity is no image: everybody says so in the same way, but for `trace`, which shows it."""

import copy
import math
from collections.abc import Callable

import pytest
import torch

from adadiff.model import Model
from adadiff.sampling.sampler import SamplerRun, sample
from adadiff.sampling.trace import trace
from sampler.tiny import served, stepped

OVERFLOW = {"guidance_scale": 1e37, "class_labels": 1, "steps": 3}


def with_head(value: float) -> Model:
    model = copy.deepcopy(served())
    list(model.backbone.parameters())[-1].data.fill_(value)
    return model


CASES: dict[str, tuple[Callable[[], Model], dict]] = {
    "guidance that overflows": (served, OVERFLOW),
    "guidance below 1": (served, {**OVERFLOW, "guidance_scale": -1e37}),
    "NaN weights": (lambda: with_head(math.nan), {"steps": 2}),
    "infinite weights": (lambda: with_head(math.inf), {"steps": 2, "solver": "dpm++2m"}),
    "a stochastic solver": (served, {**OVERFLOW, "solver": "ddpm"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sample_that_is_not_finite_is_refused(case: str) -> None:
    make, settings = CASES[case]
    model = make()
    with pytest.raises(FloatingPointError, match=r"sample 0 \(seed 5\) holds NaN or infinity"):
        sample(model, 1, seed=5, **settings)
    engine = stepped(2)
    engine.model = engine._batch.model = model
    handle = engine.submit(seed=5, **settings)
    engine.close()
    assert isinstance(handle.exception(0), FloatingPointError)
    assert not bool(trace(model, seed=5, **settings).x[-1].isfinite().all())  # to be looked at


def collect(run: SamplerRun, found: dict[int, torch.Tensor]) -> None:
    for index, images in run:
        found.update(zip(index.tolist(), images, strict=True))


def test_those_that_were_finished_with_it_come_first() -> None:
    """Sample 2 is finished with two others; those before it have come earlier."""
    settings = {"steps": [1, 3, 3, 3, 9], "class_labels": [0, 1, 2, 0, 1], "guidance_scale": [1, 1, 1e37, 1, 1]}
    run, found = SamplerRun(served(), 5, seed=[10, 11, 12, 13, 14], batch=5, **settings), {}
    with pytest.raises(FloatingPointError, match=r"sample 2 \(seed 12\)"):
        collect(run, found)
    assert sorted(found) == [0, 1, 3]
    assert all(bool(image.isfinite().all()) for image in found.values())
    wanted, _ = sample(served(), 4, seed=[10, 11, 13, 14], steps=[1, 3, 3, 9], class_labels=[0, 1, 0, 1])
    torch.testing.assert_close(torch.stack([found[i] for i in (0, 1, 3)]), wanted[:3], rtol=1e-4, atol=1e-4)


def test_a_guidance_scale_beyond_float32_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="guidance_scale must fit into float32"):
        sample(served(), 1, guidance_scale=1e39, class_labels=1)
    with pytest.raises(ValueError, match="guidance_scale must fit into float32"):
        sample(served(), 1, guidance_scale=torch.tensor(1e39, dtype=torch.float64), class_labels=1)
