"""PyTorch's settings of the process, as others may have set them: data, metrics and calibrations are the same, and
training, whose weights would be others, is refused."""

import ast
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff.calibration.calibrating import Calibrating
from adadiff.calibration.recording import noised_errors
from adadiff.calibration.reuse_errors import ReuseErrors
from adadiff.data import sources
from adadiff.metrics.images import open_images
from adadiff.metrics.quality import evaluate_samples, frechet_ratio
from adadiff.training.config import load_config
from adadiff.training.trainer import Trainer
from sampler.settings import default_device, default_dtype
from sampler.shell import run
from sampler.test_process_settings import MADE, UNTYPED
from sampler.tiny import served

SETTINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta device": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
}


def draw_data() -> object:
    index = torch.tensor([0, 3], dtype=torch.int64, device="cpu")
    names = ("digits", "canvases:n=9,seed=2,hard=0.3", "canvases:side=3,n=5")
    return [[part.tolist() for part in sources.load(name, split).batch(index)] for name in names for split in SPLITS]


def measure() -> object:
    real = sources.load("digits", "test")
    images, others = real.images[:50], real.images[50:100]
    plain = evaluate_samples(images, real.labels[:50], paired=others, resamples=3)
    return plain, frechet_ratio(images, others, resamples=3)


def calibrate() -> object:
    calibrating = Calibrating(served(), [0.6, 0.8], n=8, steps=3, batch=8, refit=True)
    found = calibrating.run()
    images = torch.linspace(-1, 1, 32, dtype=torch.float32, device="cpu").view(2, 1, 4, 4)
    labels = torch.tensor([0, 1], dtype=torch.int64, device="cpu")
    errors = noised_errors(calibrating.model, images, labels, [300.0, 700.0])
    return found, [value.tolist() for value in calibrating.model.exits.parameters()], [e.tolist() for e in errors]


def estimate() -> object:
    return ReuseErrors(served(), n=32, steps=4, batch=16).run().text


SPLITS = ("train", "test")
USES: dict[str, Callable[[], object]] = {
    "data": draw_data,
    "metrics": measure,
    "calibration": calibrate,
    "reuse": estimate,
}


@cache
def wanted(use: str) -> object:
    return USES[use]()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("use", USES)
def test_defaults_change_no_bit(use: str, setting: str) -> None:
    right = wanted(use)
    with SETTINGS[setting]():
        found = USES[use]()
    assert repr(found) == repr(right)


@pytest.mark.parametrize("setting", SETTINGS)
def test_labels_of_folders_are_numbers(setting: str, tmp_path: Path) -> None:
    assert run(f"sample digits --out {tmp_path}/o -n 3 --steps 1 --class-labels 4,2") == 0
    with SETTINGS[setting]():
        labels = open_images(tmp_path / "o").labels
    assert (labels.dtype, labels.device.type, labels.tolist()) == (torch.int64, "cpu", [4, 2, 4])


NO_TRAINING = {**SETTINGS, "no_grad": torch.no_grad, "inference mode": torch.inference_mode}


@pytest.mark.parametrize("setting", NO_TRAINING)
@pytest.mark.parametrize("when", ["before", "between"])
def test_training_refuses_them(when: str, setting: str, tmp_path: Path) -> None:
    """Also where they are set after the trainer is made."""
    small = {"depth": 2, "dim": 32, "heads": 2}
    config = load_config(None, {"preset": "digits", "data": "digits", "steps": 2, "batch": 4, "network": small})
    trainer = None if when == "before" else Trainer(config, tmp_path / "run")
    with (
        NO_TRAINING[setting](),
        pytest.raises(ValueError, match=r"training needs (the defaults of|gradients)") as refused,
    ):
        trainer.run() if trainer else Trainer(config, tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert adadiff.load((trainer or Trainer(config, tmp_path / "run")).run(progress=False)).num_layers


FOLDERS = ("calibration", "commands", "data", "metrics")


def test_no_tensor_is_made_by_the_defaults_of_the_process() -> None:
    """Each call that makes one names its device, and its dtype where that could be another."""
    found, calls = [], 0
    for path in (path for name in FOLDERS for path in (Path(adadiff.__file__).parent / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.removeprefix("torch.") in {*MADE, "randperm"} and name.startswith("torch."):
                calls += 1
                wanted = {"device"} if name.removeprefix("torch.") in {*UNTYPED, "randperm"} else {"device", "dtype"}
                if not wanted <= {keyword.arg for keyword in node.keywords}:
                    found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert calls > 30
    assert not found
