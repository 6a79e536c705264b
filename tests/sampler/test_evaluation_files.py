"""Images, statistics and feature networks from files: what lies on disk is what is measured, or is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from adadiff.data.canvases import Canvases
from adadiff.data.digits import digits
from adadiff.evaluation import images as images_module
from adadiff.evaluation import judges
from adadiff.evaluation.canvases import canvas_features
from adadiff.evaluation.extractors import features_from, to_bytes
from adadiff.evaluation.features import digits_network
from adadiff.evaluation.frechet import FeatureStatistics
from adadiff.evaluation.images import open_images
from adadiff.evaluation.judges import CanvasesJudge, DigitsJudge, judge_of
from adadiff.evaluation.references import open_reference
from adadiff.evaluation.yardsticks import Yardstick
from adadiff.output.pictures import to_pixels
from sampler import shell
from sampler.shell import config, run, saved

tiny = shell.tiny


def pixels(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def write_pictures(folder: Path, arrays: np.ndarray, suffix: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"p{i:03d}.{suffix}")


def shown(arrays: np.ndarray) -> Tensor:
    """uint8 [n, H, W(, C)] -> float32 [n, C, H, W], one value at a time."""
    arrays = arrays.reshape(*arrays.shape[:3], -1)
    return torch.from_numpy(np.moveaxis(arrays, 3, 1).astype(np.float64) / 127.5 - 1).float()


# 5 images in pieces of 2 leave a last one alone; 3x4 pixels, so that rows cannot be mistaken for columns.
@pytest.mark.parametrize("channels", [(), (3,)], ids=["gray", "color"])
def test_pictures_are_read_as_they_were_written(
    channels: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "BATCH", 2)
    arrays = pixels(5, 3, 4, *channels)
    write_pictures(tmp_path / "a" / "deep", arrays[:3])
    write_pictures(tmp_path / "b", arrays[3:])
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    found = open_images(tmp_path)
    assert (found.count, found.shape, found.labels) == (5, (len(shown(arrays)[0]), 3, 4), None)
    torch.testing.assert_close(torch.cat(list(found.pieces())), shown(arrays), rtol=0, atol=1e-7)
    assert [len(piece) for piece in found.pieces()] == [2, 2, 1]


def test_gray_pictures_among_colored_ones_count_as_colored(tmp_path: Path) -> None:
    """ImageNet has some."""
    gray = pixels(1, 3, 4)
    write_pictures(tmp_path / "a", gray)
    write_pictures(tmp_path / "b", pixels(1, 3, 4, 3, seed=1))
    first, second = next(open_images(tmp_path).pieces())
    torch.testing.assert_close(first, shown(gray)[0].expand(3, -1, -1), rtol=0, atol=1e-7)
    assert not torch.equal(second[0], second[1])


@pytest.mark.parametrize("form", ["png", "npz"])
def test_drawn_folders_are_what_python_draws(form: str, tiny: str, tmp_path: Path) -> None:
    """Pictures without grid.png, or shards; labels cycle over the samples."""
    import adadiff

    out = tmp_path / form
    line = f"sample {tiny} --out {out} --n 7 --steps 1 --rule full --labels 3,1 --format {form}"
    assert run(line + (" --shard 3" if form == "npz" else "")) == 0
    images, _ = adadiff.sample(adadiff.load(tiny), 7, steps=1, labels=[3, 1, 3, 1, 3, 1, 3])
    found = open_images(out)
    assert found.labels.tolist() == [3, 1, 3, 1, 3, 1, 3]
    expected = torch.stack([torch.from_numpy(to_pixels(image).astype(np.float32)) for image in images])[:, None]
    difference = torch.cat(list(found.pieces())) - (expected / 127.5 - 1)
    assert float(difference.abs().max()) < 1.01 / 127.5  # shards are other batches, where a rounding may fall otherwise
    if form == "png":
        (out / "000004.png").unlink()
        with pytest.raises(ValueError, match="holds 6 of 7 pictures"):
            open_images(out)
    else:
        (out / "shard-00001.npz").unlink()
        with pytest.raises(ValueError, match="lacks 1 of 3 shards"):
            open_images(out)


def test_batches_of_guided_diffusion_are_read(tmp_path: Path) -> None:
    arrays, labels = pixels(5, 3, 4, 3), np.array([4, 0, 999, 7, 7], np.int32)
    np.savez(tmp_path / "s.npz", arrays, labels)  # arr_0, arr_1
    found = open_images(tmp_path / "s.npz")
    torch.testing.assert_close(torch.cat(list(found.pieces())), shown(arrays), rtol=0, atol=1e-7)
    assert found.labels.tolist() == labels.tolist()


def statistics(F: int, seed: int = 0) -> dict[str, np.ndarray]:
    features = np.random.default_rng(seed).normal(size=(50, F))
    return {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_published_files_are_taken_as_they_are(dtype: type, tmp_path: Path) -> None:
    """U-ViT's (mu, sigma), and guided-diffusion's, with spatial ones and images beside them."""
    given = {name: value.astype(dtype) for name, value in statistics(32).items()}
    np.savez_compressed(tmp_path / "uvit.npz", **given)
    extra = {"mu_s": np.zeros(7), "sigma_s": np.eye(7), "arr_0": pixels(9, 8, 8, 1)}
    np.savez(tmp_path / "adm.npz", **given, **extra)
    network = features_from("digits")
    uvit, adm = (open_reference(tmp_path / f"{name}.npz").read(network) for name in ("uvit", "adm"))
    for reference in (uvit, adm):
        assert reference.statistics.mean.numpy().tolist() == given["mu"].astype(np.float64).tolist()
        assert reference.statistics.covariance.numpy().tolist() == given["sigma"].astype(np.float64).tolist()
        assert reference.statistics.count is None
    assert uvit.features is None
    torch.testing.assert_close(adm.features, digits_network().features(shown(extra["arr_0"])))


def test_images_alone_give_their_own_statistics(tmp_path: Path) -> None:
    arrays = pixels(70, 8, 8)  # more than one piece
    write_pictures(tmp_path, arrays)
    reference = open_reference(tmp_path).read(features_from("digits"))
    features = digits_network().features(shown(arrays))
    torch.testing.assert_close(reference.features, features)
    torch.testing.assert_close(reference.statistics.covariance, torch.cov(features.double().T), rtol=1e-4, atol=1e-5)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of held-out canvases is read in no time."""
    monkeypatch.setattr(judges, "HELD_OUT", 140)


@pytest.mark.usefixtures("few")
def test_judges_by_shape_and_classes() -> None:
    assert judge_of((1, 8, 8), 10) == DigitsJudge()
    assert [judge_of((1, s, s), 14) for s in (16, 24)] == [CanvasesJudge(2), CanvasesJudge(3)]
    assert judge_of((1, 8, 8), 14) is judge_of((1, 16, 16), 10) is judge_of((3, 8, 8), 10) is None
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
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


def case(tmp_path: Path, name: str) -> Path:
    """A bad file or folder."""
    path = tmp_path / name
    if name == "sizes":
        write_pictures(path, pixels(2, 3, 4))
        Image.fromarray(pixels(1, 4, 4)[0]).save(path / "other.png")
    elif name == "alpha":
        write_pictures(path, pixels(1, 3, 4, 4))
    elif name == "torn":
        write_pictures(path, pixels(2, 64, 64, 3))
        file = path / "p001.png"
        file.write_bytes(file.read_bytes()[:300])
    elif name == "text":
        path.mkdir()
        (path / "a.png").write_text("no picture")
    elif name == "report":
        path.mkdir()
        (path / "report.json").write_text("[]")
    elif name == "none":
        path.mkdir()
        (path / "report.json").write_text(json.dumps({"configuration": {"n": 0}}))
    elif name == "empty":
        path.mkdir()
    elif name == "missing":
        pass
    elif name == "cut.npz":
        np.savez(path, mu=np.zeros(9), sigma=np.eye(9))
        path.write_bytes(path.read_bytes()[:-40])
    else:
        arrays = {
            "float.npz": {"arr_0": np.zeros((2, 4, 4, 3))},
            "first.npz": {"arr_0": pixels(2, 3, 8, 8)},
            "labels.npz": {"arr_0": pixels(2, 8, 8, 3), "arr_1": np.zeros(3, np.int64)},
            "other.npz": {"weights": np.zeros(3), "mu": np.zeros(3)},
            "sigma.npz": {"mu": np.zeros(3), "sigma": np.eye(4)},
            "nan.npz": {"mu": np.full(3, np.nan), "sigma": np.eye(3)},
            "object.npz": {"mu": np.array([None] * 3), "sigma": np.eye(3)},
        }
        np.savez(path, **arrays[name])
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no images at .*missing: expected a folder or a .npz file"),
        ("empty", "holds no pictures .* and no shards"),
        ("sizes", "must be of one size, but .* is 4x4, .* is 4x3; crop"),
        ("alpha", "has mode RGBA; convert it"),
        ("text", "a.png is no picture that can be read"),
        ("report", "is not a report of `adadiff sample`"),
        ("none", "holds no samples"),
        ("cut.npz", "no .npz file that can be read"),
        ("float.npz", r"uint8 \[n, H, W, 1 or 3\], got float64 \[2, 4, 4, 3\]"),
        ("first.npz", r"got uint8 \[2, 3, 8, 8\]"),
        ("labels.npz", r"labels, integers \[2\], got int64 \(3,\)"),
        ("other.npz", "holds mu, weights; a reference holds mu and sigma, or images as arr_0"),
        ("sigma.npz", r"got float64 \[3\] and float64 \[4, 4\]"),
        ("nan.npz", "NaN or infinity"),
        ("object.npz", "damaged"),
    ],
)
def test_what_is_no_reference_is_refused_before_work(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_reference(case(tmp_path, name))


def test_a_torn_picture_is_named_when_its_turn_comes(tmp_path: Path) -> None:
    found = open_images(case(tmp_path, "torn"))
    with pytest.raises(ValueError, match=r"p001.png is no picture that can be read"):
        list(found.pieces())


def test_latents_are_no_images(tmp_path: Path) -> None:
    latents = saved(tmp_path / "latents.safetensors", config(channels=4))
    assert run(f"sample {latents} --out {tmp_path / 'o'} --n 3 --steps 1 --rule full") == 0
    with pytest.raises(ValueError, match="holds latents; evaluation takes images"):
        open_images(tmp_path / "o")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
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
        ("digit", None, "no features 'digit'; there are digits, canvases, inception:FILE or the file"),
        ("inception:", None, "no features 'inception:'"),
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
