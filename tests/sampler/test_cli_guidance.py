"""Prompts, and guidance at some timesteps, asked for on the command line: what Python draws, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.config import ModelConfig
from adadiff.models.uvit import UViTConfig
from adadiff.output import shards
from adadiff.pipelines.text import CLIP, TextEncoder
from adadiff.uem import ExitConfig
from sampler.clip import make_clip
from sampler.shell import config, error_line, pixels, read, run, saved

TEXT = ModelConfig(
    UViTConfig(8, 1, 4, 16, 2, 2, context_tokens=11, context_dim=12), "stable_diffusion"
)  # contexts as make_clip's


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for CLIP: contexts that tell what they are of. Returns where encoders were loaded from."""
    loaded = []
    monkeypatch.setattr(TextEncoder, "load", staticmethod(lambda folder: loaded.append(str(folder)) or contexts))
    return loaded


def contexts(prompts: list[str]) -> Tensor:
    numbers = torch.tensor([[len(prompt), prompt.count("a"), 1.0] for prompt in prompts])
    return (numbers @ torch.randn(3, 11 * 12, generator=torch.Generator().manual_seed(0))).sin().view(-1, 11, 12)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "text.safetensors", TEXT)


def drawn(model: str, n: int, **settings: object) -> list[np.ndarray]:
    return [pixels(image) for image in adadiff.sample(adadiff.load(model), n, **settings)[0]]


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_prompts_are_cycled_over_the_samples(kind: str, text: str, encoder: list[str], tmp_path: Path) -> None:
    """Shards of 2 of 5 samples: the second begins with the first prompt, the last one with the third."""
    line = f"sample {text} --out {tmp_path} -n 5 --steps 3 --prompt 'a cat' banana '' --guidance-scale 2.5"
    assert run(f"{line} --format {kind}" + (" --shard 2" if kind == "npz" else "")) == 0
    *made, null = contexts(["a cat", "banana", "", ""])
    context = torch.stack([made[i] for i in (0, 1, 2, 0, 1)])
    wanted = drawn(text, 5, steps=3, text_embeds=context, null_text_embeds=null, guidance_scale=2.5)
    if kind == "png":
        found = [read(tmp_path / f"{slot:06d}.png") for slot in range(5)]
    else:
        found = [image[..., 0] for shard in shards.read(tmp_path) for image in shard["images"]]
    for a, b in zip(found, wanted, strict=True):  # another batch, so the last bit of a float may differ
        assert np.abs(a.astype(int) - b.astype(int)).max() <= (0 if kind == "png" else 1)
    assert set(encoder) == {CLIP}
    asked = json.loads((tmp_path / "report.json").read_text())["configuration"]
    assert asked["prompt"] == ["a cat", "banana", ""]
    assert np.abs(wanted[0].astype(int) - wanted[3]).max() > 0  # another seed


def test_pictures_of_other_prompts_are_another_folders(
    text: str, encoder: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = f"sample {text} --out {tmp_path} -n 1 --steps 1 --text-encoder {tmp_path}/clip --prompt "
    assert run(line + "cat") == 0
    assert encoder == [f"{tmp_path}/clip"]
    assert run(line + "dog") == 2
    assert "holds pictures drawn with another prompt;" in error_line(capsys.readouterr().err)


def test_a_text_encoder_of_transformers(text: str, tmp_path: Path) -> None:
    folder = make_clip(tmp_path, tokens=11)
    assert run(f"sample {text} --out {tmp_path}/o -n 2 --steps 2 --prompt cat dog --text-encoder {folder}") == 0
    wanted = drawn(text, 2, steps=2, text_embeds=TextEncoder.load(folder)(["cat", "dog"]))
    for slot, image in enumerate(wanted):
        np.testing.assert_array_equal(read(tmp_path / "o" / f"{slot:06d}.png"), image)


def test_guidance_at_some_times(tmp_path: Path) -> None:
    model = saved(tmp_path / "m.safetensors", config())
    line = f"sample {model} --out {tmp_path}/o -n 2 --steps 4 --class-labels 3,5 --policy exit:0.1"
    assert run(f"{line} --guidance-scale 3 --guidance-interval 300,600.5") == 0
    settings = {"steps": 4, "class_labels": [3, 5], "policy": "exit:0.1", "guidance_scale": 3.0}
    wanted, always = (drawn(model, 2, **settings, **other) for other in ({"guidance_interval": (300, 600.5)}, {}))
    for slot, image in enumerate(wanted):
        np.testing.assert_array_equal(read(tmp_path / "o" / f"{slot:06d}.png"), image)
    assert any((a != b).any() for a, b in zip(wanted, always, strict=True))
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["passes"] == 2 * (4 + 1)  # of 999, 749, 499 and 249, one is guided
    assert report["configuration"]["guidance_interval"] == "(300.0, 600.5)"


def test_what_the_model_does_not_take_is_refused_before_work(
    text: str, encoder: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    labelled = saved(tmp_path / "labelled.safetensors", config())
    plain = saved(tmp_path / "plain.safetensors", ModelConfig(UViTConfig(8, 1, 4, 16, 2, 2), "linear"))
    imagenet64 = ModelConfig(UViTConfig(8, 3, 4, 16, 2, 2, num_classes=1000), "vp")  # 1000 classes, none of them null
    classes = saved(tmp_path / "classes.safetensors", imagenet64)
    for model, options, words in (
        (labelled, "--prompt cat", "takes no text; leave --prompt and --text-encoder out"),
        (labelled, "--text-encoder clip", "takes no text; leave --prompt and --text-encoder out"),
        (text, "", "takes text; give --prompt"),
        (text, "--prompt cat --class-labels 1", "takes text; leave --class-labels out"),
        (text, "--prompt a b c d", "4 prompts for 3 samples"),
        (text, "--prompt cat --solver euler", "no solver 'euler'"),
        (text, "--prompt cat --policy exit:0.5", "this model has no exits"),
        (text, "--prompt cat --format png --shard 2", "--shard is for --format npz"),
        (labelled, "--guidance-interval 100,800", "give --guidance-scale, too"),
        (labelled, "--guidance-scale 2 --guidance-interval 800,100", "low <= high"),
        (labelled, "--guidance-scale 2 --guidance-interval nan,5", "low <= high"),
        (plain, "--guidance-scale 2", "guidance needs a model with a null class"),
        (plain, "--guidance-scale 2 --guidance-interval 1,2", "guidance needs a model with a null class"),
        (
            labelled,
            "--guidance-scale 2 --guidance-interval 1000,2000",
            "none of the network's times, 0..999: (1000.0, 2000.0)",
        ),
        (plain, "--class-labels 1", "has no classes"),
        (classes, "--class-labels 1000", "labels must be in 0..999, got [1000]"),
        (classes, "--class-labels -1", "labels must be in 0..999, got [-1]"),
        (classes, "", "needs class_labels in 0..999"),
        (classes, "--class-labels 7 --guidance-scale 2", "guidance needs a model with a null class"),
        (classes, "--class-labels 1,2,3,4", "4 class labels for 3 samples"),
    ):
        assert run(f"sample {model} --out {tmp_path}/o -n 3 {options}") == 2
        captured = capsys.readouterr()
        assert words in error_line(captured.err)
        assert captured.out == ""
        assert not (tmp_path / "o").exists()
    assert not encoder
    for spelling in ("5", "1,2,3", "low,high"):
        with pytest.raises(SystemExit):
            run(f"sample {labelled} --out {tmp_path}/o --guidance-scale 2 --guidance-interval {spelling}")
        assert "takes two numbers, LOW,HIGH" in capsys.readouterr().err


def test_text_models_are_not_evaluated_and_calibrated_for_prompts(
    text: str, encoder: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(f"evaluate {text} --n 3") == 2
    assert "this model takes text: draw a folder of images" in error_line(capsys.readouterr().err)
    model = saved(tmp_path / "exits.safetensors", dataclasses.replace(TEXT, exits=ExitConfig()))
    line = f"calibrate {model} --budget 0.9 --out {tmp_path}/c.safetensors --n 8 --steps 2 --guidance-scale 2"
    assert run(line) == 2
    assert "this model takes text; give --prompts" in error_line(capsys.readouterr().err)
    (tmp_path / "prompts.txt").write_text("a cat\nbanana\n\na bat\n")
    assert run(f"{line} --prompts {tmp_path}/prompts.txt") == 0
    assert adadiff.load(tmp_path / "c.safetensors").calibration.guidance_scale == 2
    own = drawn(f"{tmp_path}/c.safetensors", 1, steps=2, text_embeds=contexts(["a cat"]), policy="exit:budget=0.9")
    assert len(own) == 1


def test_contexts_of_another_size(text: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(
        TextEncoder, "load", staticmethod(lambda folder: lambda prompts: torch.zeros(len(prompts), 7, 5))
    )
    assert run(f"sample {text} --out {tmp_path}/o --prompt cat") == 2
    assert "takes text [11, 12], the text encoder makes [7, 5]" in error_line(capsys.readouterr().err)
