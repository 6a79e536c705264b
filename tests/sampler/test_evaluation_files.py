"""Images and statistics from files: what lies on disk is what is measured, or it is refused by name."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adadiff.metrics import images as images_module
from adadiff.metrics.extractors import features_from
from adadiff.metrics.features import digits_network
from adadiff.metrics.images import open_images
from adadiff.metrics.references import open_reference
from adadiff.output.pictures import to_pixels
from sampler import guards, shell
from sampler.shell import config, error_line, run, saved

tiny = shell.tiny
no_hang, little_memory = guards.no_hang, guards.little_memory
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


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
@pytest.mark.filterwarnings("ignore:.*left out 1 file that is no picture")
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
    line = f"sample {tiny} --out {out} --n 7 --steps 1 --policy full --class-labels 3,1 --format {form}"
    assert run(line + (" --shard 3" if form == "npz" else "")) == 0
    images, _ = adadiff.sample(adadiff.load(tiny), 7, steps=1, class_labels=[3, 1, 3, 1, 3, 1, 3])
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
    assert run(f"sample {latents} --out {tmp_path / 'o'} --n 3 --steps 1 --policy full") == 0
    with pytest.raises(ValueError, match="holds latents; evaluation takes images"):
        open_images(tmp_path / "o")


# ---- .npz files that are not what they say ----


def npy(shape: tuple[int, ...], data: bytes, descr: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def pack(path: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def claim(path: Path, *sizes: int) -> None:
    """The directory of the archive says so of the unpacked sizes of its members."""
    data, at = bytearray(path.read_bytes()), 0
    for size in sizes:
        at = data.index(b"PK\x01\x02", at + 1)
        data[at + 24 : at + 28] = struct.pack("<I", size)
    path.write_bytes(data)


LARGE = 3 * 2**30  # bytes that nobody has packed


def untrue(path: Path, name: str) -> None:
    """A small file that says it is large, or something else than it is."""
    head = npy((LARGE // 768, 16, 16, 3), b"")
    if name == "array":
        pack(path, arr_0=head + bytes(768))
    elif name == "archive":
        pack(path, arr_0=head + bytes(768))
        claim(path, len(head) + LARGE)
    elif name == "sum":  # each is allowed, together they are not
        n = 33_000_000
        parts = [npy((n, 1, 1, 1), b""), npy((n,), b"", "<i8")]
        pack(path, arr_0=parts[0], arr_1=parts[1])
        claim(path, len(parts[0]) + n, len(parts[1]) + 8 * n)
    elif name == "labels":
        pack(path, arr_0=npy((2, 8, 8, 3), bytes(384)), arr_1=npy((2,), bytes(16), "<f8"))
    elif name == "lzma":
        pack(path, zipfile.ZIP_LZMA, arr_0=npy((1, 8, 8, 3), bytes(192)))
    elif name == "objects":
        np.savez(path, arr_0=np.array([None]))
    elif name == "no pixels":
        pack(path, arr_0=npy((2, 0, 8, 3), b""))
    elif name == "pixels":
        pack(path, arr_0=npy((1, 5000, 5000, 1), b""))
        claim(path, len(npy((1, 5000, 5000, 1), b"")) + 5000 * 5000)
    elif name == "text":
        path.write_text("no archive")
    elif name == "array alone":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif name == "empty":
        path.touch()
    elif name == "no arrays":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0", b"no array")
    elif name == "no header":
        pack(path, arr_0=b"\x93NUMPY\x01\x00\xff\xff")
    elif name == "nested":
        pack(path, arr_0=npy((1,), b"").replace(b"(1,)", b"(" * 40))
    elif name == "encrypted":
        pack(path, arr_0=npy((1, 8, 8, 3), bytes(192)))
        data = bytearray(path.read_bytes())
        for at in (6, data.index(b"PK\x01\x02") + 8):
            data[at] |= 1
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("array", "takes 3221225472 bytes, but 768 follow its header"),
        ("archive", r"[\d,]+ bytes unpack to 3,221,225,472, more than 100 times as many; save it uncompressed"),
        ("sum", "bytes unpack to 297,000,000"),
        ("labels", "must be labels"),
        ("lzma", "arr_0 is compressed as numpy never does"),
        ("objects", "arr_0|holds objects"),
        ("no pixels", r"got uint8 \[2, 0, 8, 3\]"),
        ("pixels", "images of 25000000 pixels; evaluation takes at most 16777216"),
        ("text", "not a zip file"),
        ("array alone", "not a zip file"),
        ("empty", "not a zip file"),
        ("no arrays", "holds nothing"),
        ("no header", "read"),
        ("nested", "read"),
        ("encrypted", "encrypted"),
    ],
)
def test_an_archive_is_what_it_says_or_is_refused(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture, little_memory: None
) -> None:
    path = tmp_path / "a.npz"
    untrue(path, name)
    with pytest.raises(ValueError, match=f"a.npz.*({message})"):
        open_reference(path)
    with pytest.raises(ValueError, match=f"a.npz.*({message})"):
        open_images(path)
    assert run(f"evaluate {path} --features digits") == 2
    assert "a.npz" in error_line(capsys.readouterr().err)


def test_large_arrays_that_compress_little_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than is free of the limit, for images do not compress by a hundred; zeros are taken uncompressed."""
    monkeypatch.setattr("adadiff.data.numpy_files.FREE", 1000)
    arrays, black = pixels(40, 8, 8, 3), np.zeros((900, 8, 8, 3), np.uint8)
    np.savez_compressed(tmp_path / "s.npz", arrays)
    torch.testing.assert_close(torch.cat(list(open_images(tmp_path / "s.npz").pieces())), shown(arrays))
    np.savez_compressed(tmp_path / "black.npz", black)
    with pytest.raises(ValueError, match="save it uncompressed"):
        open_images(tmp_path / "black.npz")
    np.savez(tmp_path / "black.npz", black)
    assert open_images(tmp_path / "black.npz").count == 900


def test_every_byte_of_an_archive_is_damage_or_changes_nothing(tmp_path: Path) -> None:
    path, arrays = tmp_path / "a.npz", pixels(2, 4, 4, 3)
    np.savez_compressed(path, arrays)
    whole, refused = path.read_bytes(), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x21]) + whole[at + 1 :])
        try:
            (piece,) = open_images(path).pieces()
        except ValueError:
            refused += 1
        else:
            torch.testing.assert_close(piece, shown(arrays))
    assert refused > len(whole) / 2


# ---- folders that `adadiff sample` did not finish, or did not write ----

REPORTS = {
    "not JSON": "{",
    "nested": "[" * 100_000,
    "a list": "[]",
    "no configuration": "{}",
    "a name": '{"configuration": "n"}',
    "text": '{"configuration": {"n": "3"}}',
    "half": '{"configuration": {"n": 2.5}}',
    "a truth": '{"configuration": {"n": true}}',
    "negative": '{"configuration": {"n": -1}}',
    "infinity": '{"configuration": {"n": 1e400}}',
    "many": '{"configuration": {"n": 1000000000}}',
    "more": '{"configuration": {"n": 1' + "0" * 100 + "}}",
    "digits": '{"configuration": {"n": 1' + "0" * 10_000 + "}}",
    "labels": '{"configuration": {"n": 1, "class_labels": [1e3]}}',
    "truths": '{"configuration": {"n": 1, "class_labels": [true]}}',
    "beyond": '{"configuration": {"n": 1, "class_labels": [1' + "0" * 30 + "]}}",
    "below": '{"configuration": {"n": 1, "class_labels": [-1]}}',
    "a number": '{"configuration": {"n": 1, "class_labels": 7}}',
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_is_none_is_refused(name: str, tmp_path: Path, little_memory: None) -> None:
    Image.fromarray(pixels(1, 8, 8)[0]).save(tmp_path / "000000.png")
    (tmp_path / "report.json").write_text(REPORTS[name])
    with pytest.raises(ValueError, match=str(tmp_path)):
        open_images(tmp_path)


@pytest.mark.parametrize("file", ["report.json", "000001.png"])
def test_a_drawn_folder_with_a_pipe_is_refused(file: str, tmp_path: Path, no_hang: None) -> None:
    write_pictures(tmp_path, pixels(2, 8, 8))
    for i in range(2):
        (tmp_path / f"p{i:03d}.png").rename(tmp_path / f"{i:06d}.png")
    (tmp_path / "report.json").write_text('{"configuration": {"n": 2}}')
    assert open_images(tmp_path).count == 2
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(ValueError, match=f"{file}.* is no regular file"):
        open_images(tmp_path)


def test_a_manifest_of_more_samples_than_its_shards_hold_is_refused(
    tiny: str, tmp_path: Path, little_memory: None
) -> None:
    assert run(f"sample {tiny} --out {tmp_path} --n 4 --shard 4 --steps 1 --class-labels 3 --format npz") == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["configuration"] |= {"n": 10**9, "shard": 10**9}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"too few|lacks|manifest|damaged"):
        open_images(tmp_path)
