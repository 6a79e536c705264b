"""What `sample` refuses before any work, and models that have less than others: no classes, no exits, no samples."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from adadiff.config import ModelConfig
from adadiff.models.uvit import UViTConfig
from adadiff.policies.exits import Replay
from adadiff.sampling.sampler import SamplerRun, sample
from adadiff.uem import PAPER
from sampler.test_sampler import CONFIG, SHAPE, model
from sampler.tiny import UVIT

NO_NULL = dataclasses.replace(CONFIG, null_label=None)
PLAIN = dataclasses.replace(CONFIG, exits=None)
UNCONDITIONAL = ModelConfig(dataclasses.replace(UVIT, num_classes=0), "vp", exits=PAPER)
TEXT = ModelConfig(UViTConfig(8, 3, 2, 48, 2, 3, context_tokens=7, context_dim=5), "linear")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adadiff.sampling.batch.run_forward", lambda *_, **__: pytest.fail("the network was called"))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_numbers_without_a_sign_are_numbers(kind: type) -> None:
    """PyTorch lacks most operations for them."""
    wanted, _ = sample(model(), 2, steps=[2, 3], seed=[5, 6], class_labels=[0, 2])
    found, _ = sample(
        model(), 2, steps=kind([2, 3]), seed=torch.from_numpy(kind([5, 6])), class_labels=np.array([0, 2], dtype=kind)
    )
    assert torch.equal(found, wanted)


def test_a_number_that_takes_a_sign_s_bit_is_refused() -> None:
    with pytest.raises(ValueError, match="below 2\\^63"):
        sample(model(), 1, steps=2, seed=np.uint64([2**63]))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "n_settings", [{}, {"class_labels": [], "seed": [], "thresholds": [], "policy": "exit:patience=0.5"}]
)
def test_no_samples_is_no_error(n_settings: dict) -> None:
    images, report = sample(model(), 0, **n_settings)
    assert images.shape == (0, *SHAPE)
    assert report.exit_layer.shape == (0, 0, 2)
    assert (report.passes, report.blocks, report.blocks_full, report.macs, report.macs_full) == (0,) * 5
    assert math.isnan(report.mean_exit_layer)
    assert "0 samples" in str(report)
    assert list(SamplerRun(model(), 0)) == []


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": -1}, "n must be an integer >= 0"),
        ({"n": 2.0}, "n must be an integer"),
        ({"n": True}, "n must be an integer"),
        ({"batch": 0}, "batch must be an integer >= 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": [3, -2]}, "steps must be at least 1"),
        ({"steps": 1001}, "1001"),
        ({"steps": 2.5}, "steps must be whole numbers"),
        ({"steps": [1, 2, 3]}, "steps must be one number, or one for each sample, 2"),
        ({"steps": 1000, "solver": "dpm++2m"}, "999 or fewer"),
        ({"steps": "ten"}, "steps must be a number"),
        ({"solver": "euler"}, "no solver 'euler'"),
        ({"solver": "ddim:2"}, r"\[0, 1\]"),
        ({"solver": "ddim:nan"}, r"\[0, 1\]"),
        ({"solver": 3}, "solver"),
        ({"policy": "exit:0"}, "strictly between 0 and 1"),
        ({"policy": "exit:1"}, "strictly between 0 and 1"),
        ({"policy": "exit:patience=nan"}, "strictly between 0 and 1"),
        ({"policy": "never"}, "no policy"),
        ({"policy": 0.07}, "a policy is"),
        ({"policy": Replay()}, "threshold"),
        ({"policy": "exit:0.5", "thresholds": [0.5, 1.0]}, "strictly between 0 and 1"),
        ({"policy": "exit:0.5", "thresholds": [0.5, math.nan]}, "thresholds must be finite"),
        ({"policy": "exit:0.5", "thresholds": [0.5]}, "thresholds must be one number, or one for each sample"),
        ({"policy": "exit:depth=3", "thresholds": [0, 3]}, "at least 1 block"),
        ({"thresholds": [0.5, 0.5]}, "'full' takes no thresholds"),
        ({"seed": [1, 2, 3]}, "seed must be one number, or one for each sample"),
        ({"seed": [5]}, "seed must be one number, or one for each sample"),
        ({"seed": [1, -1]}, "seed must be at least 0"),
        ({"seed": [1, 2**63]}, "seed must be a number"),
        ({"seed": [1.0, 2.0]}, "seed must be whole numbers"),
        ({"class_labels": [0, 4]}, r"class_labels must be in 0\.\.3"),  # 4 is the null class
        ({"class_labels": [-1, 0]}, r"class_labels must be in 0\.\.3"),
        ({"class_labels": [0]}, "class_labels must be one number, or one for each sample"),
        ({"class_labels": [0.0, 1.0]}, "class_labels must be whole numbers"),
        ({"class_labels": [None, 1]}, "class_labels"),
        ({"guidance_scale": math.nan}, "guidance_scale must be finite"),
        ({"guidance_scale": [1.0, math.inf]}, "guidance_scale must be finite"),
        ({"guidance_scale": [2.0]}, "guidance_scale must be one number, or one for each sample"),
        ({"model": NO_NULL}, r"needs class_labels in 0\.\.4"),
        ({"model": NO_NULL, "class_labels": [0, 4], "guidance_scale": 2.0}, "null class"),
        ({"model": PLAIN, "policy": "exit:0.5"}, "no exits"),
        ({"model": PLAIN, "policy": "exit:depth=3"}, "no exits"),
        ({"model": UNCONDITIONAL, "class_labels": [0, 1]}, "no classes"),
        ({"model": TEXT}, "text"),
    ],
    ids=str,
)
def test_bad_input_is_named_before_any_work(settings: dict, message: str) -> None:
    given = dict(settings)
    with pytest.raises(ValueError, match=message):
        sample(model(given.pop("model", CONFIG)), given.pop("n", 2), **given)


def test_models_without_classes_or_exits_are_sampled() -> None:
    images, report = sample(model(UNCONDITIONAL), 3, steps=2, policy="exit:0.5")
    assert images.isfinite().all()
    assert 0 < report.blocks <= report.blocks_full
    plain, _ = sample(model(PLAIN), 2, steps=3, class_labels=[0, 1])
    full, _ = sample(model(), 2, steps=3, class_labels=[0, 1])
    assert torch.equal(plain, full)
