"""Checkpoints of format version 1, as earlier releases wrote them: refused with advice, and made new by `convert`."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import adadiff
from adadiff.checkpoint import load, read_tensors, save
from adadiff.conversion.convert import convert
from adadiff.conversion.describing import describe
from adadiff.forward.options import ExecutionOptions
from adadiff.model import Model
from adadiff.policies.calibrated import Calibration
from adadiff.training.run_folder import STATE
from adadiff.training.trainer import Trainer
from sampler.shell import error_line, run
from sampler.test_recipes import SHORT
from sampler.tiny import SERVED, scramble

MEASURED = {"share": 0.5, "depth": 2.0, "error": 0.01, "low": 0.005, "high": 0.02, "psnr": 30.0, "frechet": None}
CALIBRATION = {  # as version 1 had it, of the five blocks of SERVED
    "aim": "faithful",
    "solver": "ddim",
    "steps": 3,
    "guidance": 1.5,
    "n": 8,
    "seed": 4294967296,
    "layers": 5,
    "t": [900.0, 500.0, 100.0],
    "weights": [3.0, 2.0, 1.0],
    "budgets": [
        {
            "share": 0.5,
            "thresholds": [[0.0, 0.45, 0.0, 2.0], [0.0, 0.6, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5]],
            "depths": [2, 3, 5],
            "adaptive": MEASURED,
            "static": MEASURED,
            "ratio": [0.5, 0.4, 0.6],
        }
    ],
    "refit": False,
}
HEADER = {
    "format_version": "1",
    "config": json.dumps(
        {
            "family": "uvit",
            "network": {
                "image_size": 4,
                "channels": 1,
                "patch": 2,
                "dim": 16,
                "depth": 4,
                "heads": 2,
                "num_classes": 4,
                "mlp_time_embed": True,
            },
            "schedule": "linear",
            "null_label": 3,
            "exits": {"map": False, "time": True, "shared_head": False, "every_token": False, "head": "linear"},
            "guided_channels": None,
            "latent_scale": None,
        }
    ),
    "notes": json.dumps({"train": {"steps": 7}}),
    "calibration": json.dumps(CALIBRATION),
}


def network() -> Model:
    model = Model(SERVED).eval()
    scramble(model.backbone, 0.3, seed=1)
    scramble(model.exits, 0.3, seed=5)
    return model


def earlier(path: Path, **header: object) -> Path:
    """The file that version 1 wrote of `network()`. header: JSON of entries that differ; None: without it."""
    entries = {**HEADER, **{key: None if value is None else json.dumps(value) for key, value in header.items()}}
    save_file(network().state_dict(), path, metadata={key: text for key, text in entries.items() if text is not None})
    return path


def now(path: Path) -> Path:
    """The same model in a file of this version."""
    model = network()
    calibration = {**CALIBRATION, "num_layers": 5, "guidance_scale": 2.5}
    del calibration["layers"], calibration["guidance"]
    model.calibration = Calibration.from_dict(calibration)
    save(model, path, {"train": {"steps": 7}})
    return path


def test_loading_one_says_how_to_convert_it(tmp_path: Path) -> None:
    file = earlier(tmp_path / "old.safetensors")
    before = file.read_bytes()
    message = f"{file} has format version 1, this release reads 2; adadiff convert {file} NEW.safetensors"
    for read in (load, read_tensors, describe):
        with pytest.raises(ValueError, match=r"format version 1") as refused:
            read(file)
        assert str(refused.value) == message
    assert file.read_bytes() == before


def test_by_the_command_that_is_advised(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = earlier(tmp_path / "old.safetensors")
    assert run(f"sample {file} --out {tmp_path}/o --n 2 --steps 2") == 2
    line = error_line(capsys.readouterr().err)
    new = tmp_path / "new.safetensors"
    advice = line.split("; adadiff ")[1].replace("NEW.safetensors", shlex.quote(str(new)))
    assert run(advice) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^layout +earlier version$", printed, re.MULTILINE)
    assert f"wrote {new}" in printed
    assert run(f"sample {new} --out {tmp_path}/o --n 2 --steps 2 --policy exit:budget=0.5 --class-labels 1") == 0


def test_the_new_file_is_what_this_version_writes(tmp_path: Path) -> None:
    file = earlier(tmp_path / "old.safetensors")
    before = file.read_bytes()
    done = convert(file, tmp_path / "new.safetensors")
    assert (done.source, done.part, done.preset, done.served_by) == (file, None, None, None)
    assert done.config == network().config
    assert done.parameters == sum(value.numel() for value in network().parameters())
    assert file.read_bytes() == before
    new, wanted = (read_tensors(path) for path in (tmp_path / "new.safetensors", now(tmp_path / "wanted.safetensors")))
    assert new[0].keys() == wanted[0].keys()
    assert all(torch.equal(value, wanted[0][key]) for key, value in new[0].items())
    assert new[1]["notes"] == wanted[1]["notes"] == {"train": {"steps": 7}}
    assert new[1]["calibration"] == wanted[1]["calibration"]
    with safe_open(tmp_path / "new.safetensors", framework="pt") as opened:
        assert opened.metadata()["format_version"] == "2"
    model = load(tmp_path / "new.safetensors")
    assert (model.calibration.num_layers, model.calibration.guidance_scale) == (5, 2.5)
    assert model.calibration.budgets[0].depths == (2, 3, 5)


@pytest.mark.parametrize("policy", ["full", "exit:0.45", "exit:budget=0.5", "exit:table=0.5"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_the_same_bits_are_drawn(policy: str, guidance_scale: float, tmp_path: Path) -> None:
    convert(earlier(tmp_path / "old.safetensors"), tmp_path / "new.safetensors")
    settings = {
        "steps": 5,
        "seed": 3,
        "class_labels": [0, 1, 2] * 3,
        "policy": policy,
        "guidance_scale": guidance_scale,
        "execution": ExecutionOptions(batch_invariant=True),
    }
    drawn = []
    for path in (tmp_path / "new.safetensors", now(tmp_path / "wanted.safetensors")):
        drawn.append(adadiff.sample(load(path), 9, **settings))
    (images, report), (wanted, wanted_report) = drawn
    assert torch.equal(images, wanted)
    assert torch.equal(report.exit_layer, wanted_report.exit_layer)
    assert bool(images.isfinite().all())
    depths = set(report.exit_layer[..., 0].flatten().tolist())
    assert (depths == {5}) == (policy == "full")


def test_without_a_calibration(tmp_path: Path) -> None:
    convert(earlier(tmp_path / "old.safetensors", calibration=None), tmp_path / "new.safetensors")
    model = load(tmp_path / "new.safetensors")
    assert model.calibration is None
    own = network().state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_stored_in_the_dtype_asked_for(dtype: str, tmp_path: Path) -> None:
    convert(earlier(tmp_path / "old.safetensors"), tmp_path / "new.safetensors", dtype=dtype)
    tensors, _ = read_tensors(tmp_path / "new.safetensors")
    for key, value in network().state_dict().items():
        assert torch.equal(tensors[key], value.to(getattr(torch, dtype)))
    assert load(tmp_path / "new.safetensors").backbone.pos_embed.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("header", "settings", "message"),
    [
        (
            {},
            {"preset": "digits"},
            r"old\.safetensors is of an earlier version .* holds all settings; leave preset and served_by out$",
        ),
        ({}, {"served_by": "dit"}, "of an earlier version"),
        ({}, {"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"config": None}, {}, "holds tensors of an earlier version but no model"),
        ({"config": {"family": "unet"}}, {}, "unknown network family 'unet'"),
        ({"config": {**json.loads(HEADER["config"]), "exits": None}}, {}, r"unexpected exits\.bias"),
        ({"calibration": {"aim": "faithful"}}, {}, r"calibration in .*old\.safetensors is damaged: KeyError\('layers'"),
        ({"calibration": [1]}, {}, "is damaged"),
        ({"calibration": {**CALIBRATION, "guidance": "1"}}, {}, "is damaged"),
        ({"calibration": {**CALIBRATION, "layers": 4}}, {}, "a calibration has tables of 3 times and 3 layers"),
        ({"calibration": {**CALIBRATION, "colour": 1}}, {}, "no calibration"),
        ({"format_version": 0}, {}, "a checkpoint of ours already"),
        ({"format_version": 2}, {}, "a checkpoint of ours already"),
        ({"format_version": 3}, {}, "a checkpoint of ours already"),
    ],
)
def test_what_cannot_be_is_refused(header: dict, settings: dict, message: str, tmp_path: Path) -> None:
    file = earlier(tmp_path / "old.safetensors", **header)
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path / "new.safetensors", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]


def test_a_damaged_one_is_named(tmp_path: Path) -> None:
    file = earlier(tmp_path / "old.safetensors")
    for keep in (0, 8, 100, -1):
        file.write_bytes(earlier(file).read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"old\.safetensors is not a readable safetensors file"):
            convert(file, tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


def test_the_state_of_a_training_is_told_apart(tmp_path: Path) -> None:
    """It holds no model, so that the advice would lead nowhere."""
    Trainer(SHORT, tmp_path).save()
    tensors, numbers = read_tensors(tmp_path / STATE)
    header = {"format_version": "1", **{key: json.dumps(value) for key, value in numbers.items()}}
    save_file(tensors, tmp_path / STATE, metadata=header)
    with pytest.raises(ValueError, match=r"state\.safetensors has format version 1, this release reads 2$"):
        Trainer(SHORT, tmp_path)
