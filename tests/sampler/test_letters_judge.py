"""The judge of letters: the shipped classifier, its features, the held-out images, and evaluation of models by them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adadiff.checkpoint import write_tensors
from adadiff.data.glyphs import CHARACTERS, draw_font
from adadiff.data.image_sets import Pixels
from adadiff.metrics import letters, letters_network
from adadiff.metrics.extractors import features_from
from adadiff.metrics.frechet import FeatureStatistics, frechet_distance
from adadiff.metrics.judges import LettersJudge, judge_of
from adadiff.metrics.letters_network import LettersNet
from benchmarks.suites.judging import judging_of
from sampler.fonts import SANS, SERIF
from sampler.shell import config, error_line, run, saved


def drawn(path: Path) -> torch.Tensor:
    """float32 [62, 1, 32, 32] in [-1, 1]."""
    return torch.from_numpy(draw_font(path))[:, None].float() / 127.5 - 1


def test_the_judge_reads_held_out_images() -> None:
    judge = LettersJudge()
    assert judge_of((1, 32, 32), 62) == judge_of((1, 32, 32), name="letters") == judge
    assert judge_of((1, 32, 32), 10) is judge_of((3, 32, 32)) is None
    images, labels = judge.held_out()
    assert (images.dtype, images.shape) == (torch.float32, (62 * letters.ROWS, 1, 32, 32))
    assert labels.bincount().tolist() == [letters.ROWS] * 62
    assert float(judge.right(images, labels).double().mean()) > 0.9
    assert float(judge.right(images, labels.roll(1)).double().mean()) < 0.1
    groups = judge.groups(labels)
    assert [int(own.sum()) for own in groups.values()] == [n * letters.ROWS for n in (26, 26, 10)]
    assert CHARACTERS[int(labels[groups["digits"]][0])] == "0"


def test_fonts_drawn_here_are_read_as_what_they_are() -> None:
    """Two families that ship with matplotlib; they were drawn by this machine's FreeType, not from the sheet."""
    for font in (SANS, SERIF):
        right = LettersJudge().right(drawn(font), torch.arange(62))
        wrong = [c for c, good in zip(CHARACTERS, right.tolist(), strict=True) if not good]
        assert len(wrong) <= 4, wrong


def test_the_classifier_is_small_and_independent_of_the_batch() -> None:
    network = letters_network.letters_network()
    assert sum(parameter.numel() for parameter in network.parameters()) <= 300_000
    shipped = (letters.SHEET, letters_network.CHECKPOINT)
    assert sum(path.stat().st_size for path in shipped) <= 2_000_000
    images = LettersJudge().held_out()[0][:7]
    together, alone = network(images), torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    for wrong in (images[..., :31], images.half(), images.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match="the letters features take float32"):
            network.features(wrong)


def test_features_tell_letters_from_noise() -> None:
    features = features_from("letters")
    images = LettersJudge().held_out()[0]
    half = len(images) // 2  # of whole rows of the sheet, so that both hold every character
    real = FeatureStatistics.of(features(images[:half]))
    near = frechet_distance(FeatureStatistics.of(features(images[half:])), real)
    noise = torch.randn(600, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert features.dims((1, 32, 32)) == letters_network.FEATURES
    assert frechet_distance(FeatureStatistics.of(features(noise)), real) > 20 * near


def test_a_short_training_learns() -> None:
    """Two fonts by heart, from the first update on the same whatever was drawn before."""
    images = torch.cat([torch.from_numpy(draw_font(font))[:, None] for font in (SANS, SERIF)])
    data = Pixels(images, torch.arange(62).repeat(2), 62)
    networks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        networks.append(letters_network.train(data, updates=60, width=8, batch=64, lr=1e-2))
    one, two = (network.state_dict() for network in networks)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    right = letters_network.read(networks[0], data) == data.labels
    assert float(right.double().mean()) > 0.2  # chance is 0.016
    with pytest.raises(ValueError, match="training takes updates"):
        letters_network.train(data, updates=0)


def test_a_sheet_survives_its_file_and_others_are_refused(tmp_path: Path) -> None:
    images = torch.randint(256, (62 * 3, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = Pixels(images, torch.arange(62).repeat(3), 62)
    letters.write_sheet(data, tmp_path / "sheet.png", rows=2)
    back = letters.read_sheet(tmp_path / "sheet.png")
    assert back.labels.tolist() == 2 * list(range(62))
    for image, label in zip(back.images, back.labels, strict=True):
        assert any(torch.equal(image, own) for own in images[int(label) :: 62])
    with pytest.raises(ValueError, match="3 images of A, 4 are needed"):
        letters.write_sheet(data, tmp_path / "sheet.png", rows=4)
    Image.fromarray(np.zeros((32, 61 * 32), np.uint8)).save(tmp_path / "narrow.png")
    with pytest.raises(ValueError, match="is no sheet of letters"):
        letters.read_sheet(tmp_path / "narrow.png")


def test_files_of_other_networks_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", LettersNet(8).state_dict(), {})
    with pytest.raises(ValueError, match="does not fit this model"):
        letters_network.load(tmp_path / "a.safetensors")


def test_models_of_letters_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    own = config(image_size=32, patch=8)
    own = dataclasses.replace(own, network=dataclasses.replace(own.network, num_classes=63), null_label=62)
    model = saved(tmp_path / "letters.safetensors", own)
    file = tmp_path / "quality.json"
    assert run(f"evaluate {model} --n 70 --steps 2 --policy exit:depth=2 --resamples 3 --json {file}") == 0
    content = json.loads(file.read_text())
    assert content["configuration"]["features"] == "letters"
    assert content["real"]["accuracy"] > 0.9
    for result in content["results"].values():
        assert result["frechet"] > 0
        assert set(result["shares"]) == {"capitals", "lower case", "digits"}
        assert result["kernel"] is not None
    assert "lower case" in capsys.readouterr().out
    judging = judging_of("letters", (1, 32, 32), 62)
    images = LettersJudge().held_out()[0][: 62 * 2]
    row = judging.measure(images, torch.arange(62).repeat(2), images)
    assert row["accuracy"] > 0.9
    assert row["accuracy_of"] == "of the class"
    with pytest.raises(ValueError, match="letters are"):
        judging_of("letters", (1, 32, 32), 10)
    assert run(f"evaluate {model} --n 70 --steps 2 --features digits") == 2
    assert "do not take images of 1x32x32" in error_line(capsys.readouterr().err)
