"""The README: short, and everything in it runs. Sizes that would take hours are made small, the commands stay."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import adadiff
from adadiff.config import PRESETS
from adadiff.models.dit import DiT
from sampler.shell import run
from sampler.test_calibration import MOST
from sampler.test_calibration import made as calibration
from sampler.test_early_exit import calibrated, pipe
from sampler.test_training_data import features
from sampler.tiny import scramble

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line]
ADADIFF = [line.removeprefix("adadiff ") for line in COMMANDS if line.startswith("adadiff ")]
# the README's network and data, small enough for a test
SMALL = {"dit_xl_2_256": "dit_s_8_256", "imagenet256_features:FOLDER": "imagenet256_features:{features}"}
FEW = {
    "sample": "--n 3 --steps 2",
    "train": "--steps 2 --batch 2 --warmup 1",
    "calibrate": "--n 8 --steps 2 --batch 8",
    "diff": "--steps 2",
}

__all__ = ["features", "pipe"]  # fixtures


def test_it_is_short_and_shows_code_early() -> None:
    assert len(README.split()) <= 800
    first = next(i for i, line in enumerate(README.splitlines(), start=1) if line.startswith("```"))
    assert first <= 40


def test_nothing_unusable_is_published() -> None:
    assert "(!)" not in README
    assert "usable" not in README


def test_python_runs_as_written(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Block by block, each with what the ones before it made. The pipeline is a tiny one, with exits to match."""
    assert len(PYTHON) == 3
    names: dict[str, object] = {"pipe": pipe, "adadiff": adadiff}
    exec(PYTHON[0], names)
    printed = capsys.readouterr().out
    report, images = names["report"], names["images"]
    assert printed == f"{report}\n"
    assert images.shape == (64, 1, 32, 32)
    assert bool(images.isfinite().all())
    shown = re.search(r"value:output-->\n```text\n(.*?)\n```", README, re.DOTALL).group(1)
    without_time = [re.sub(r"\d+\.\d+ s \([\d.]+/s\)", "", text) for text in (shown, printed.strip())]
    assert without_time[0] == without_time[1]

    exec(PYTHON[1], names)
    assert len(names["images"]) == 20

    try:
        exec(PYTHON[2], names)
        assert len(names["images"]) == 2
        assert capsys.readouterr().out == f"{adadiff.summary(pipe)}\n"
    finally:
        adadiff.disable(pipe)
    model = calibrated()
    model.calibration = calibration((0.8, *MOST[1:]))
    monkeypatch.chdir(tmp_path)
    adadiff.save(model, "dit-exits.safetensors")
    (with_exits,) = re.findall(r"`(adadiff\.enable\(.*?)`", README)
    try:
        record = eval(with_exits, names)
        assert len(pipe(class_labels=[1, 0], num_inference_steps=2, output_type="np").images) == 2
        assert record.totals.ticks == 2
    finally:
        adadiff.disable(pipe)


@pytest.fixture(scope="module")
def workshop(features, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint that the README converts: a published layout, random weights."""
    folder = tmp_path_factory.mktemp("readme")
    network = DiT(PRESETS["dit_s_8_256"].network)
    scramble(network, 0.02, 0)
    torch.save(network.state_dict(), folder / "DiT-XL-2-256x256.pt")
    return folder


def test_commands_run_as_written(workshop: Path, features, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    for line in ADADIFF:
        words = line
        for published, small in SMALL.items():
            words = words.replace(published, small.format(features=features[0]))
        command = words.split()[0]
        words = re.sub(r" --(?:n|steps) \d+", "", words) if command in FEW else words
        assert run(f"{words} {FEW.get(command, '')}") == 0, line
    assert (workshop / "samples" / "grid.png").exists()
    assert adadiff.load("dit-exits.safetensors").calibration is not None
    assert any((workshop / "dogs").glob("shard-*.npz"))


def test_other_commands_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"make ([a-z-]+)", "\n".join([*COMMANDS, *re.findall(r"`([^`]+)`", README)]))
    assert {"bench", "test"} <= set(named) <= set(targets)
    others = [shlex.split(line)[0] for line in COMMANDS if not line.startswith(("adadiff ", "make "))]
    assert others == ["python3", "pip"]


def test_presets_and_paths_exist() -> None:
    presets = re.findall(r"^\| .* \| `(\w+)` \|$", README, re.MULTILINE)
    assert len(presets) >= 3
    assert set(presets) <= set(PRESETS)
    paths = re.findall(r"`([\w./]+(?:/|\.py))`", README)
    places = (ROOT, ROOT / "python/adadiff")
    assert not [path for path in paths if not any((place / path).exists() for place in places)]
