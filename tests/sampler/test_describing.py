"""What `adadiff inspect` says of files: others' before they are converted as ours after, and thresholds in full."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff.conversion import convert as conversion
from adadiff.conversion.convert import convert
from adadiff.conversion.describing import describe
from adadiff.models.dit import DiT
from adadiff.models.uvit import UViT
from sampler import test_conversion as theirs
from sampler.shell import config, error_line, run
from sampler.shell import saved as saved_as_ours
from sampler.test_calibration import HALF, MOST, made
from sampler.tiny import DIT, UVIT

presets = theirs.presets  # an autouse fixture: tiny ones

SAME = ("family", "network", "exits", "classes", "num_layers", "tokens", "parameters", "macs", "null_label")
MADE = {
    "plain": (lambda: theirs.state_of(UViT(UVIT)), "tiny_uvit", ["tiny_uvit", "tiny_duodiff"]),
    "official": (theirs.official_state, "tiny_uvit", ["tiny_uvit"]),
    "duodiff": (theirs.duodiff_state, "tiny_duodiff", ["tiny_duodiff"]),
    "dit": (lambda: {"ema": theirs.state_of(DiT(DIT)), "args": theirs.namespace()}, "tiny_dit", ["tiny_dit"]),
}


@pytest.mark.parametrize("kind", MADE)
def test_files_of_others_are_told_as_what_they_become(kind: str, tmp_path: Path) -> None:
    make, preset, fitting = MADE[kind]
    source = theirs.saved(tmp_path / "a.pth", make())
    found = describe(source)
    convert(source, tmp_path / "b.safetensors", preset, drop_first_exit=kind == "duodiff")
    became = describe(tmp_path / "b.safetensors")
    differing = [name for name in SAME if found[name] != became[name]]
    assert differing == ([] if preset == fitting[0] else ["network", "classes", "null_label"])  # the first is shown
    assert found["presets"] == fitting
    assert found["layout"] == became["notes"]["layout"]
    assert found["part"] == ("ema" if kind == "dit" else None)
    assert found["file_bytes"] == source.stat().st_size
    schedules = {"plain": "vp (tiny_uvit), linear (tiny_duodiff)", "official": "vp"}
    assert found["schedule"] == schedules.get(kind, "linear")
    assert len(json.dumps(found)) > 500


def test_folders(tmp_path: Path) -> None:
    theirs.diffusers_folder(tmp_path / "folder", pipeline=True)
    found = describe(tmp_path / "folder")
    assert (found["layout"], found["presets"], found["schedule"]) == ("diffusers", ["tiny_dit"], "linear")
    assert found["network"]["mlp_norm_eps"] == 1e-2
    assert describe(theirs.training_folder(tmp_path))["presets"] == ["tiny_uvit", "tiny_duodiff"]


def test_a_transformer_of_diffusers_without_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schedule is told by a preset, or by nobody."""
    theirs.diffusers_folder(tmp_path / "folder")
    assert describe(tmp_path / "folder")["schedule"] == "linear"
    monkeypatch.setattr(conversion, "PRESETS", {})
    found = describe(tmp_path / "folder")
    assert (found["schedule"], found["presets"], found["num_layers"]) == (None, [], 5)


def test_a_network_of_no_preset_is_counted(tmp_path: Path) -> None:
    state = theirs.state_of(UViT(dataclasses.replace(UVIT, depth=2)))
    found = describe(theirs.saved(tmp_path / "a.pth", state))
    assert found["presets"] == []
    assert found["parameters"] == sum(value.numel() for value in state.values())
    assert found["tensors"] == len(state)
    assert "macs" not in found


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, plain, duodiff = (
        theirs.saved(tmp_path / f"{make.__name__}.pth", make())
        for make in (theirs.official_state, theirs.uvit_state, theirs.duodiff_state)
    )
    for file, name, value in (
        (source, "layout", "official"),
        (source, "presets", "tiny_uvit"),
        (plain, "presets", "tiny_uvit or tiny_duodiff"),
        (source, "exits.map", "True"),
        (plain, "schedule", "vp (tiny_uvit), linear (tiny_duodiff)"),
        (source, "macs.full forward pass", "[0-9,]+"),
    ):
        assert run(f"inspect {file} --all") == 0
        printed = capsys.readouterr().out
        assert re.search(rf"^{re.escape(name)} +{value if '+' in value else re.escape(value)}$", printed, re.MULTILINE)
    for file, preset, options in (
        (plain, "tiny_uvit or tiny_duodiff", " --preset tiny_uvit"),
        (source, "tiny_uvit", ""),
        (duodiff, "tiny_duodiff", " --drop-first-exit"),
    ):
        assert run(f"inspect {file}") == 0
        printed = capsys.readouterr().out
        assert f"preset: {preset}\n" in printed
        assert f"convert it first: adadiff convert {file} model.safetensors{options}\n" in printed
    assert run(f"sample {source} --out {tmp_path}/o") == 2
    assert "adadiff convert reads other formats" in error_line(capsys.readouterr().err)


def test_thresholds_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = adadiff.Model(config(depth=4))  # five blocks, as the calibration has
    model.calibration = made(HALF, MOST)
    adadiff.save(model, tmp_path / "c.safetensors")
    assert run(f"inspect {tmp_path}/c.safetensors --json") == 0
    content = json.loads(capsys.readouterr().out)["calibration"]
    assert content["budgets"][0]["thresholds"] == HALF[1]
    assert [budget["share"] for budget in content["budgets"]] == [0.5, 0.9]
    assert run(f"inspect {tmp_path}/c.safetensors --all") == 0
    lines = capsys.readouterr().out.splitlines()
    table = [
        line.split() for line in lines[lines.index(next(line for line in lines if line.startswith("budget  "))) + 1 :]
    ]
    times = [f"{t:g}:" for t in model.calibration.t]
    wanted = [
        [share, t, *(f"{v:.3g}" for v in row)]
        for share, rows in (("0.5", HALF[1]), ("0.9", MOST[1]))
        for t, row in zip(times, rows, strict=True)
    ]
    assert table == wanted
    assert str(model.calibration) in "\n".join(lines)
    plain = saved_as_ours(tmp_path / "plain.safetensors", config())
    assert describe(plain)["calibration"] is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("hello"), "truncated, or another format"),
        (lambda path: path.write_bytes(b""), "truncated, or another format"),
        (lambda path: torch.save({"a": 3}, path), "a state dict holds tensors only"),
        (lambda path: torch.save({"encoder.weight": torch.zeros(2)}, path), "are in no layout known here"),
        (lambda path: path.mkdir(), "holds no nnet_ema.pth"),
    ],
)
def test_what_is_no_checkpoint(make, words: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path / "x")
    assert run(f"inspect {tmp_path}/x") == 2
    assert words in error_line(capsys.readouterr().err)
    assert conversion.PRESETS.keys() == {"tiny_uvit", "tiny_duodiff", "tiny_dit"}
