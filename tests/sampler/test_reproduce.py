"""adadiff reproduce, end to end on tiny weights, and its table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adadiff.config import PRESETS, ModelConfig
from adadiff.data.digits import digits
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.solvers import solver_from
from adadiff.metrics.features import digits_network
from adadiff.metrics.published import PUBLISHED, Published
from adadiff.models.uvit import UViT, UViTConfig
from sampler.shell import error_line, run
from sampler.tiny import scramble

NETWORK = UViTConfig(8, 1, 2, 16, 2, 2, num_classes=11)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset whose weights are in U-ViT's own layout, and statistics of real digits."""
    monkeypatch.setitem(PRESETS, "tiny_uvit", ModelConfig(NETWORK, "linear", null_label=10))
    known = {**PUBLISHED, "tiny_uvit": Published("ddim", 4, 1.5, "stats.npz", "nobody", 1.5, classes=10, n=600)}
    monkeypatch.setattr("adadiff.commands.reproduce.PUBLISHED", known)
    network = UViT(NETWORK)
    scramble(network, 0.1)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with torch.no_grad():
        features = digits_network().features(digits("test")[0]).double().numpy()
    np.savez(tmp_path / "stats.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    given = f"--weights {tmp_path}/weights.pth --reference {tmp_path}/stats.npz --features digits"
    return f"reproduce tiny_uvit {given} --out {tmp_path}/out"


def test_end_to_end_and_again(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 0
    found = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    assert (found["n"], found["published"], found["solver"], found["guidance_scale"]) == (600, 1.5, "ddim", 1.5)
    results = json.loads((tmp_path / "out" / "result.json").read_text())["results"]["images"]
    assert found["fid"] == results["frechet"]
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "samples").glob("*.npz")}
    assert len(shards) == 2
    said = "".join(capsys.readouterr())
    assert "adadiff convert" in said
    assert "published 1.50, nobody" in said
    assert run(line) == 0
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert "adadiff convert" not in "".join(capsys.readouterr())


def test_several_processes_share_the_samples(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one finds half of the shards; when the other has drawn its own, one more call evaluates."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(line) == 2
    assert "convert it by one process first" in error_line(capsys.readouterr().err)
    monkeypatch.setenv("RANK", "0")
    assert run(line) == 0
    assert "1 of 2 shards are done" in "".join(capsys.readouterr())
    monkeypatch.setenv("RANK", "1")
    assert run(line) == 0
    assert not (tmp_path / "out" / "reproduction.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert run(line) == 0
    assert (tmp_path / "out" / "reproduction.json").exists()


def test_fewer_samples_are_not_compared(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{line} --n 40") == 0
    assert "of 40 samples instead of 600: not comparable" in "".join(capsys.readouterr())


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reproduce") == 0
    shown = capsys.readouterr().out
    for name, published in PUBLISHED.items():
        config = PRESETS[name]
        solver_from(published.solver).table(NoiseSchedule(config.schedule), published.steps)
        assert (published.classes > 0) == (config.network.num_classes > 0)
        assert published.guidance_scale == 1 or config.null_label is not None
        assert name in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("reproduce letters", "no published result is known for preset 'letters'"),
        ("reproduce dit_xl_2_256", "takes --weights, --reference, --features, --out"),
        (
            "reproduce dit_xl_2_256 --weights a --reference b --features c --out {out} --n 1",
            "--n must be at least 2",
        ),
        ("reproduce dit_xl_2_256 --weights a --reference b --features digits --out {out}", "no such file"),
    ],
)
def test_what_does_not_fit(arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments.format(out=tmp_path / "out")) == 2
    assert said in error_line(capsys.readouterr().err)
