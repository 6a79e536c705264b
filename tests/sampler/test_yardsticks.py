"""What images are measured by: judges, feature networks from files, and whether they fit together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adadiff.data.canvases import Canvases
from adadiff.data.digits import digits
from adadiff.metrics import judges
from adadiff.metrics.canvases import canvas_features
from adadiff.metrics.extractors import features_from, to_bytes
from adadiff.metrics.features import digits_network
from adadiff.metrics.frechet import FeatureStatistics
from adadiff.metrics.judges import CanvasesJudge, DigitsJudge, judge_of
from adadiff.metrics.yardsticks import Yardstick
from adadiff.output.pictures import to_pixels
from sampler.test_evaluation_files import pixels, statistics, write_pictures

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of held-out canvases is read in no time."""
    monkeypatch.setattr(judges, "HELD_OUT", 140)


@pytest.mark.usefixtures("few")
def test_judges_by_shape_and_classes() -> None:
    assert judge_of((1, 8, 8), 10) == DigitsJudge()
    assert [judge_of((1, s, s), 20) for s in (16, 24)] == [CanvasesJudge(2), CanvasesJudge(3)]
    assert judge_of((1, 8, 8), 20) is judge_of((1, 16, 16), 10) is judge_of((3, 8, 8), 10) is None
    assert judge_of((1, 16, 16), name="canvases") == CanvasesJudge(2)
    assert judge_of((1, 16, 16), name="digits") is None
    for judge in (DigitsJudge(), CanvasesJudge(3)):
        images, labels = judge.held_out()
        assert images.shape[1:] == judge.shape
        assert set(labels.tolist()) == set(range(judge.classes))
        assert float(judge.right(images, labels).double().mean()) > 0.85
        assert float(judge.right(images, labels.roll(1)).double().mean()) < 0.3


class Means(nn.Module):
    """Two features an image: the mean and the largest value."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return torch.stack([flat.mean(1), flat.amax(1)], 1)


class Eights(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(-1, 64)[:, :5]


def scripted(module: nn.Module, path: Path) -> str:
    torch.jit.save(torch.jit.trace(module, torch.zeros(2, 1, 8, 8)), path)
    return str(path)


def test_features_by_name(tmp_path: Path) -> None:
    images = digits("test")[0][:20]
    assert torch.equal(features_from("digits")(images), digits_network().features(images))
    canvases = Canvases(3).draw(4)[0]
    assert torch.equal(features_from("canvases")(canvases), canvas_features(canvases))
    own = features_from(scripted(Means(), tmp_path / "means.pt"))
    assert own(images).tolist() == Means()(images).tolist()
    assert (own.dims((1, 8, 8)), features_from("digits").dims((1, 8, 8))) == (2, 32)
    assert features_from("canvases").dims((1, 24, 24)) == 9 * 32


def test_bytes_are_those_of_pictures() -> None:
    images = torch.linspace(-1.2, 1.2, 3 * 7 * 5).view(1, 3, 7, 5)
    assert np.array_equal(to_bytes(images)[0].numpy().transpose(1, 2, 0), to_pixels(images[0]))


def test_inception_is_that_of_torch_fidelity(tmp_path: Path) -> None:
    """With random weights: its own network on bytes; gray images as three equal channels."""
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="an optional extra"
    ).FeatureExtractorInceptionV3
    made = inception.__new__(inception)
    weights = _state_of(made, inception)
    path = tmp_path / "inception.pth"
    torch.save(weights, path)
    features = features_from(f"inception:{path}")
    images = torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    theirs = inception("x", ["2048"], str(path))(to_bytes(images).repeat(1, 3, 1, 1))[0]
    assert theirs.shape == (2, 2048)
    assert torch.equal(features(images), theirs)
    assert features.dims((3, 8, 8)) == 2048
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not hold the weights of the FID Inception"):
        features_from(f"inception:{path}")
    del weights["fc.bias"]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"fc\.bias"):
        features_from(f"inception:{path}")


def _state_of(made: nn.Module, inception: type[nn.Module]) -> dict[str, Tensor]:
    """Of the network as its constructor makes it, before it looks for a file."""
    kept = {}

    def no_file(self: nn.Module, *_: object) -> None:
        kept.update(nn.Module.state_dict(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(inception, "load_state_dict", no_file)
        inception.__init__(made, "x", ["2048"], "nowhere")
    return kept


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, ("ran",)


def test_weights_that_hold_code_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity", reason="an optional extra")
    monkeypatch.chdir(tmp_path)
    torch.save({"Mixed_7c.branch_pool.conv.weight": Evil()}, "evil.pth")
    with pytest.raises(ValueError, match="holds no weights that can be read"):
        features_from("inception:evil.pth")
    assert not Path("ran").exists()


def test_a_yardstick_fits_or_says_why_not(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **statistics(7))
    write_pictures(tmp_path / "large", pixels(3, 9, 9))
    write_pictures(tmp_path / "one", pixels(1, 8, 8))
    write_pictures(tmp_path / "color", pixels(2, 8, 8, 3))
    shape, flat = (1, 8, 8), scripted(nn.Flatten(0), tmp_path / "flat.pt")
    eights = scripted(Eights(), tmp_path / "eights.pt")
    (tmp_path / "no.pt").write_text("no module")
    for features, reference, message in (
        (None, "s.npz", "give --features, digits"),
        ("digits", "s.npz", "holds statistics of 7 features, but digits makes 32; choose"),
        ("digits", "large", "holds images of 9x9, but those to compare are 8x8"),
        ("digits", "one", "holds 1 image"),
        ("digits", "color", r"do not take images of 3x8x8"),
        (
            "digit",
            None,
            "no features 'digit'; there are digits, .* inception:FILE, module:Class.* the file",
        ),
        ("inception:", None, "inception needs FILE"),
        (str(tmp_path / "no.pt"), None, "is no TorchScript module that can be read"),
        (flat, "large", r"must be \[2, F\] for two images, got \[128\]"),
        (eights, None, "need real images to compare: give --reference"),
    ):
        with pytest.raises(ValueError, match=message):
            Yardstick.of(shape, None, features, None if reference is None else tmp_path / reference)
    with pytest.raises(ValueError, match="digits do not take images of 3x32x32"):
        Yardstick.of((3, 32, 32), None, "digits")


def test_too_few_images_are_told(tmp_path: Path) -> None:
    write_pictures(tmp_path, pixels(12, 8, 8))
    with_images = Yardstick.of((1, 8, 8), DigitsJudge(), reference=tmp_path)
    assert [line.split(" are ")[0] for line in with_images.too_few(32)] == ["32 samples", "12 real images"]
    assert with_images.too_few(33) == with_images.too_few(10000) == with_images.too_few(33)[:1]
    assert Yardstick.of((1, 8, 8), DigitsJudge()).too_few(33) == []
    assert Yardstick.of((3, 8, 8), None).too_few(2) == []


@pytest.mark.usefixtures("few")
def test_the_default_reference_is_held_out() -> None:
    yardstick = Yardstick.of((1, 16, 16), CanvasesJudge(2))
    reference = yardstick.reference()
    real = CanvasesJudge(2).held_out()[0]
    expected = FeatureStatistics.of(canvas_features(real))
    torch.testing.assert_close(reference.statistics.mean, expected.mean, rtol=0, atol=0)
    assert len(reference.features) == 140
    assert Yardstick.of((1, 8, 8), None, "digits").reference().statistics.count == len(digits("test")[0])
