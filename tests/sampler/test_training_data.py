"""Training on files, and a DiT on latents: the data by one spelling, and variances that are trained, too."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.checkpoint import load
from adadiff.data import sources
from adadiff.data.datasets import NAMES
from adadiff.training.config import TrainConfig
from adadiff.training.trainer import Trainer
from sampler import guards
from sampler.shell import error_line, run
from sampler.test_datasets import make_celeba, make_cifar, make_imagenet, make_mscoco, pair
from sampler.test_picture_files import png
from sampler.tiny import scramble

no_hang, little_memory = guards.no_hang, guards.little_memory
MOMENTS = 5  # files, each of a class of its own
# 16 patches of 8 x 8 latents, 3 blocks; the null class and the four channels are those of the preset
TINY_DIT = {"dim": 16, "depth": 3, "heads": 2}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tensor]:
    """A folder of ImageNet features whose deviation is nothing, and their means [5, 4, 32, 32]."""
    folder, draw = tmp_path_factory.mktemp("imagenet256_features"), np.random.default_rng(3)
    means = draw.standard_normal((MOMENTS, 4, 32, 32)).astype(np.float32) * 5
    for i, mean in enumerate(means):
        moments = np.concatenate([mean, np.full_like(mean, -40)])  # of the logarithm of the variance
        np.save(folder / f"{i}.npy", pair(moments, np.int64(i)), allow_pickle=True)
    return str(folder), torch.from_numpy(means)


def dit(features: tuple[str, Tensor], **changes: object) -> TrainConfig:
    settings = {"batch": 4, "warmup": 1, "steps": 40, "lr": 1e-2, "label_drop": 0.0, "network": TINY_DIT}
    return TrainConfig(preset="dit_s_8_256", data=f"imagenet256_features:{features[0]}", **{**settings, **changes})


def test_data_sets_by_name_and_folder(tmp_path: Path) -> None:
    images, labels = make_cifar(tmp_path, "bin")
    data = sources.load(f"cifar10:{tmp_path}")
    x, y = data.batch(torch.arange(15))
    assert torch.equal(((x + 1) * 127.5).round().byte(), torch.from_numpy(images))
    assert y.tolist() == labels
    assert len(sources.load(f"cifar10:{tmp_path}", "test")) == 3
    awkward = tmp_path / "a=1,b:2"  # of a folder, nothing is a setting
    make_celeba(awkward)
    assert len(sources.load(f"celeba64:{awkward}")) == 3
    scans = sources.load("digits", "test")
    assert (scans.shape, scans.classes, scans.moments) == ((1, 8, 8), 10, False)
    assert sources.load("canvases:n=30,hard=0").classes == 10


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_folder_is_named_before_work(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (("", f"{name} needs FOLDER"), (":nowhere", "no such folder: nowhere")):
        assert run(f"train --out {tmp_path}/run --data {name}{folder}") == 2
        assert words in error_line(capsys.readouterr().err)
    assert run(f"train --out {tmp_path}/run --data {name}:{tmp_path}/empty") == 2
    assert f"{tmp_path}/empty holds no " in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit_the_network(
    tmp_path: Path, features: tuple[str, Tensor], capsys: pytest.CaptureFixture
) -> None:
    make_imagenet(tmp_path / "imagenet", flat=False)
    make_celeba(tmp_path / "celeba")
    make_mscoco(tmp_path / "mscoco")
    for words, line in (
        ("is 3x64x64 in 3 classes, but the network draws 1x8x8 in 10", f"--data imagenet64:{tmp_path}/imagenet"),
        ("is latents, but 'digits' draws images", f"--data imagenet256_features:{features[0]}"),
        ("is 4x32x32 in 0 classes", f"--preset dit_s_8_256 --data mscoco256_features:{tmp_path}/mscoco"),
        (
            "is 3x64x64 in 0 classes",
            f"--preset imagenet64_uvit_mid --label-drop 0 --data celeba64:{tmp_path}/celeba",
        ),
    ):
        assert run(f"train --out {tmp_path}/run {line}") == 2
        assert words in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_training_on_pictures(tmp_path: Path) -> None:
    """Without classes, the labels that the data have are left aside."""
    make_cifar(tmp_path, "py")
    line = (
        f"train --preset cifar10_uvit_small --network dim=16 depth=2 heads=2 --label-drop 0 --steps 2 --batch 3 "
        f"--data cifar10:{tmp_path} --out {tmp_path}/run"
    )
    assert run(line) == 0
    assert run(line) == 0  # goes on, and has nothing left to do
    model = load(tmp_path / "run" / "model.safetensors")
    images, _ = adadiff.sample(model, 2, steps=2)
    assert images.shape == (2, 3, 32, 32)
    assert bool(images.isfinite().all())


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "is no picture that can be read"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is no picture that can be read"),
    "another size": (lambda path: path.write_bytes(png(64, 64)), r"img_align_celeba"),
    "bomb": (lambda path: path.write_bytes(png(60000, 60000)), "exceeds limit"),
    "large": (lambda path: path.write_bytes(png(9000, 9000)), "9000 x 9000 pixels"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is no regular file"),
    "device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "is no regular file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_ends_training_in_a_line_that_names_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, no_hang: None
) -> None:
    make_celeba(tmp_path / "celeba")
    damage, words = BROKEN[name]
    for file in ("000001.jpg", "000002.jpg", "000005.jpg"):  # all of the training set
        path = tmp_path / "celeba" / "img_align_celeba" / file
        damage(path)
    network = "--preset celeba64_uvit_small --network dim=16 depth=2 heads=2 --label-drop 0 --steps 1 --batch 2"
    assert run(f"train {network} --data celeba64:{tmp_path} --out {tmp_path}/run") == 2
    line = error_line(capsys.readouterr().err)
    assert re.search(words, line)
    assert "img_align_celeba/00000" in line


@pytest.mark.parametrize("n", [0, -1, 200_001, 10**9, 10**18, 10**400])
def test_canvases_fit_in_memory(n: int, little_memory: None) -> None:
    with pytest.raises(ValueError, match="n of canvases must be at least 1 and at most 200000"):
        sources.load(f"canvases:n={n}")
    with pytest.raises(ValueError, match=r"seed of canvases must be below 2\^62"):
        sources.load(f"canvases:seed={2**62 + abs(n)}")


def test_latents_are_drawn_from_moments(tmp_path: Path, features: tuple[str, Tensor]) -> None:
    trainer = Trainer(dit(features, batch=8), tmp_path)
    x, t, labels, noise = trainer.inputs(0)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t.long(), None, None, None]
    x0 = (x.double() - (1 - alpha_bar).sqrt() * noise.double()) / alpha_bar.sqrt()
    error = (x0 - 0.18215 * features[1][labels].double()).abs() * alpha_bar.sqrt()
    assert float(error.max()) < 1e-5
    assert len(set(labels.tolist())) > 1
    again = Trainer(dit(features, batch=8), tmp_path).inputs(0)
    assert all(torch.equal(a, b) for a, b in zip(again, (x, t, labels, noise), strict=True))


def test_frozen_exits_learn_the_networks_variance(tmp_path: Path, features: tuple[str, Tensor]) -> None:
    """New heads start as copies of the network's, whose variance they keep while it stays as it is."""
    plain = adadiff.Model(dit(features, exits=False).model)
    scramble(plain, 0.25, seed=4)
    adadiff.save(plain, tmp_path / "plain.safetensors")
    config = dit(features, recipe="frozen", init=str(tmp_path / "plain.safetensors"), loss="relative")
    trainer = Trainer(config, tmp_path / "run")
    own = trainer.model.backbone.head.state_dict()
    for head in trainer.model.exits.heads:
        assert all(torch.equal(value, own[key]) for key, value in head.state_dict().items())
    given = trainer.inputs(0)
    before = trainer.objective(*given)[1]["variance"]
    assert float(before[:-1].min()) > 0.1, "nothing to learn"
    for _ in range(config.steps):
        trainer.update()
    after = trainer.objective(*given)[1]["variance"]
    assert bool((after[:-1] < 0.5 * before[:-1]).all())
    assert after[-1] == before[-1]
    assert all(torch.equal(value, plain.backbone.head.state_dict()[key]) for key, value in own.items())


@pytest.mark.parametrize("exits", [True, False])
def test_a_dits_own_variance_is_trained(exits: bool, tmp_path: Path, features: tuple[str, Tensor]) -> None:
    trainer = Trainer(dit(features, exits=exits), tmp_path)
    terms = trainer.update()
    assert len(terms["variance"]) == (3 if exits else 1)
    total = sum(
        terms[name].sum() for name in (("simple", "uem", "ual", "variance") if exits else ("simple", "variance"))
    )
    torch.testing.assert_close(terms["loss"], total)
    for _ in range(3):
        trainer.update()
    rows = trainer.model.backbone.final_layer.linear.weight.detach().view(8, 8, 2, 4, 16)
    assert bool(rows.abs().sum((0, 1, 3, 4)).gt(0).all()), "they start at zero, noise and variance"


@pytest.mark.parametrize("preset", ["mscoco_uvit_small", "pixart_xl_2_256"])
def test_exits_learn_on_text(preset: str, tmp_path: Path) -> None:
    """On a frozen network; a tenth of the captions are the empty one, and a run that goes on draws the same."""
    empty = make_mscoco(tmp_path)[2]
    N, E = empty.shape
    network = {"dim": 16, "depth": 2, "heads": 2, "context_tokens": N, "context_dim": E}
    given = {"preset": preset, "data": f"mscoco256_features:{tmp_path}", "network": network, "batch": 8, "warmup": 1}
    plain = adadiff.Model(TrainConfig(**given, exits=False).model)
    scramble(plain, 0.2, seed=3)
    adadiff.save(plain, tmp_path / "plain.safetensors")
    frozen = {"recipe": "frozen", "init": str(tmp_path / "plain.safetensors"), "loss": "relative", "label_drop": 0.5}
    config = TrainConfig(**given, **frozen, steps=30, lr=1e-2)
    trainer = Trainer(config, tmp_path / "run")
    x, t, text, noise = trainer.inputs(0)
    known = {np.load(file).tobytes() for file in (tmp_path / "train").glob("*_*.npy")}
    kinds = [row.numpy().tobytes() for row in text]
    assert set(kinds) <= known | {empty.astype(np.float32).tobytes()}
    assert 0 < kinds.count(empty.astype(np.float32).tobytes()) < 8
    again = Trainer(config, tmp_path / "again").inputs(0)
    assert all(torch.equal(a, b) for a, b in zip(again, (x, t, text, noise), strict=True))
    before = trainer.objective(x, t, text, noise)[1]["ual"].sum()
    for _ in range(30):
        trainer.update()
    assert float(trainer.objective(x, t, text, noise)[1]["ual"].sum()) < float(before)


def test_text_that_does_not_fit(tmp_path: Path, features: tuple[str, Tensor]) -> None:
    make_mscoco(tmp_path)
    given = {"preset": "mscoco_uvit_small", "network": {"dim": 16, "depth": 2, "heads": 2}}
    with pytest.raises(ValueError, match=r"takes text of \[77, 768\], but data 'imagenet.*' has no text"):
        Trainer(TrainConfig(**given, data=f"imagenet256_features:{features[0]}"), tmp_path / "a")
    with pytest.raises(ValueError, match=r"has text of \["):
        Trainer(TrainConfig(**given, data=f"mscoco256_features:{tmp_path}"), tmp_path / "b")


def test_a_calibration_takes_held_out_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_cifar(tmp_path, "py")
    settings = {"preset": "cifar10_uvit_small", "network": {"dim": 16, "depth": 2, "heads": 2}, "label_drop": 0.0}
    model = adadiff.Model(TrainConfig(**settings, data="digits").model)
    scramble(model, 0.15)
    adadiff.save(model, tmp_path / "m.safetensors")
    line = f"calibrate {tmp_path}/m.safetensors --budget 0.9 --out {tmp_path}/c.safetensors --n 8 --steps 2"
    assert run(f"{line} --data digits --picture {tmp_path}/p.png") == 2
    assert "is (1, 8, 8) in 10 classes, but the model draws (3, 32, 32)" in error_line(capsys.readouterr().err)
    assert run(f"{line} --data cifar10:{tmp_path} --picture {tmp_path}/p.png") == 0
    assert (tmp_path / "p.png").is_file()


def test_a_configuration_keeps_the_spelling(tmp_path: Path) -> None:
    config = TrainConfig(data=f"cifar10:{tmp_path}")
    assert dataclasses.asdict(config)["data"] == f"cifar10:{tmp_path}"
    with pytest.raises(ValueError, match="cifar10 needs FOLDER"):
        TrainConfig(data="cifar10")
