"""Data sets from small files in their published formats, made here; and what a wrong folder is told."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adadiff.data.datasets import NAMES, load

DRAW = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return DRAW.integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Colours that change slowly, so that JPEG keeps them."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 / height, x * 255 / width, (x + y) * 255 / (height + width)], -1).astype(np.uint8)


# ---- CIFAR-10 ----


def make_cifar(root: Path, kind: str) -> tuple[np.ndarray, list[int]]:
    """Three images in each of the six files. Returns the training ones, [15, 3, 32, 32], and their labels."""
    images, labels = pixels(18, 3, 32, 32), [i % 10 for i in range(18)]
    folder = root / f"cifar-10-batches-{kind}"
    folder.mkdir(parents=True)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        own, named = images[3 * k : 3 * k + 3].reshape(3, -1), labels[3 * k : 3 * k + 3]
        if kind == "bin":
            rows = np.concatenate([np.array(named, np.uint8)[:, None], own], 1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            content = {b"batch_label": b"x", b"labels": named, b"data": own, b"filenames": [b"a.png"] * 3}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return images[:15], labels[:15]


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("kind", ["py", "bin"])
def test_cifar10(kind: str, below: bool, tmp_path: Path) -> None:
    images, labels = make_cifar(tmp_path, kind)
    data = load("cifar10", tmp_path if below else tmp_path / f"cifar-10-batches-{kind}")
    assert (len(data), data.shape, data.classes, data.moments) == (15, (3, 32, 32), 10, False)
    index = torch.tensor([14, 0, 7])
    x, y = data.batch(index)
    torch.testing.assert_close(x, torch.from_numpy(images[index.numpy()]).float() / 127.5 - 1, rtol=0, atol=1e-6)
    assert y.tolist() == [labels[i] for i in index]
    assert len(load("cifar10", tmp_path, "test")) == 3


def test_cifar10_as_python_2_wrote_it(tmp_path: Path) -> None:
    """The published files: protocol 2, strings as bytes, numpy.core.multiarray. Its opcodes by hand."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = pixels(1, 3072)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x01M\x00\x0c\x86"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
        + data.tobytes()
        + b"tb"
    )
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x07eu.")
    x, y = load("cifar10", tmp_path, "test").batch(torch.tensor([0]))
    assert y.tolist() == [7]
    assert ((x.flatten() + 1) * 127.5).round().byte().tolist() == data[0].tolist()


class Harm:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_cifar(tmp_path, "py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps({b"data": Harm(), b"labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_2 is not read: it asks for posix\.mkdir, which is no array"):
        load("cifar10", tmp_path)
    np.save(tmp_path / "0.npy", np.array([Harm(), 0], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"0\.npy is not read: it asks for posix\.mkdir"):
        load("imagenet256_features", tmp_path)
    assert not (tmp_path / "harm").exists()


def test_damaged_cifar10(tmp_path: Path) -> None:
    make_cifar(tmp_path / "bin", "bin")
    file = tmp_path / "bin" / "cifar-10-batches-bin" / "data_batch_3.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 9218 bytes, expected some times 3073"):
        load("cifar10", tmp_path / "bin")
    file.write_bytes(b"\x0a" + content[1:])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has labels .*10.*, expected 0\.\.9"):
        load("cifar10", tmp_path / "bin")
    make_cifar(tmp_path / "py", "py")
    file = tmp_path / "py" / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="test_batch is not read"):
        load("cifar10", tmp_path / "py", "test")
    for content in ([1], {b"data": pixels(2, 3071), b"labels": [1, 2]}, {b"data": pixels(2, 3072), b"labels": [1]}):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"test_batch must hold b'data', uint8 \[n, 3072\]"):
            load("cifar10", tmp_path / "py", "test")


# ---- CelebA ----


def make_celeba(root: Path, size: tuple[int, int] = (218, 178)) -> None:
    (root / "img_align_celeba").mkdir(parents=True)
    parts = [0, 0, 1, 2, 0]
    for i in range(5):
        picture = Image.fromarray(smooth(*size) // (i + 1))
        picture.save(root / "img_align_celeba" / f"{i + 1:06d}.jpg", quality=100, subsampling=0)
    lines = [f"{i + 1:06d}.jpg {part}" for i, part in enumerate(parts)]
    (root / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("below", [True, False])
def test_celeba(below: bool, tmp_path: Path) -> None:
    """Rows 57..184 and columns 25..152 (cy - 64 and cx - 64 with cx = 89, cy = 121), at half the size."""
    make_celeba(tmp_path / "celeba")
    data = load("celeba64", tmp_path if below else tmp_path / "celeba")
    assert (len(data), data.shape, data.classes) == (3, (3, 64, 64), 0)
    x, y = data.batch(torch.tensor([0, 2]))
    assert y is None
    for got, divisor in zip(x, (1, 5), strict=True):
        cut = (smooth(218, 178) // divisor)[57:185, 25:153].astype(np.float64)
        halved = cut.reshape(64, 2, 64, 2, 3).mean((1, 3)).transpose(2, 0, 1)  # as good as bilinear, where it is smooth
        assert np.abs((got.numpy() + 1) * 127.5 - halved).max() < 4
    assert len(load("celeba64", tmp_path, "test")) == 1


def test_wrong_celeba(tmp_path: Path) -> None:
    make_celeba(tmp_path / "small", size=(64, 64))
    with pytest.raises(ValueError, match=r"aligned pictures of CelebA are 178 x 218, got \(64, 64\)"):
        load("celeba64", tmp_path / "small").batch(torch.tensor([0]))
    make_celeba(tmp_path / "celeba")
    (tmp_path / "celeba" / "img_align_celeba" / "000005.jpg").unlink()
    with pytest.raises(ValueError, match=r"lists 000005\.jpg, but there is no .*000005\.jpg"):
        load("celeba64", tmp_path)
    (tmp_path / "celeba" / "img_align_celeba" / "000003.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000003\.jpg is no picture that can be read"):
        load("celeba64", tmp_path, "test").batch(torch.tensor([0]))
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("202599\n")
    with pytest.raises(ValueError, match=r"must hold lines such as '000001\.jpg 0'"):
        load("celeba64", tmp_path)


# ---- ImageNet ----


def make_imagenet(root: Path, flat: bool) -> None:
    for i, name in enumerate(["n02000000", "n01440764", "n02000000", "n01500000"]):
        folder = root / "train" / ("" if flat else name)
        folder.mkdir(parents=True, exist_ok=True)
        height, width = [(70, 90), (200, 130), (64, 64), (33, 40)][i]
        Image.fromarray(smooth(height, width)).save(folder / f"{name}_{i}.JPEG", quality=100, subsampling=0)


@pytest.mark.parametrize("flat", [False, True])
def test_imagenet(flat: bool, tmp_path: Path) -> None:
    make_imagenet(tmp_path, flat)
    data = load("imagenet64", tmp_path)
    assert (len(data), data.shape, data.classes) == (4, (3, 64, 64), 3)
    x, y = data.batch(torch.arange(4))
    assert y.tolist() == [0, 1, 2, 2]  # classes in the order of their names
    sizes = [(200, 130), (33, 40), (70, 90), (64, 64)]
    for got, (height, width) in zip(x, sizes, strict=True):
        # the middle square, whose shorter side becomes 64
        side = min(height, width)
        rows = (np.arange(64) + 0.5) * side / 64 + (height - side) / 2 - 0.5
        columns = (np.arange(64) + 0.5) * side / 64 + (width - side) / 2 - 0.5
        y_, x_ = np.meshgrid(rows, columns, indexing="ij")
        wanted = np.stack([y_ * 255 / height, x_ * 255 / width, (x_ + y_) * 255 / (height + width)])
        error = np.abs((got.numpy() + 1) * 127.5 - wanted)[:, 2:-2, 2:-2]
        assert error.max() < 6


def test_large_pictures_are_halved_by_averages(tmp_path: Path) -> None:
    """Twice from 256 to 64; nothing is left to do for the bicubic step."""
    (tmp_path / "val" / "noise").mkdir(parents=True)
    noise = pixels(256, 256, 3)
    Image.fromarray(noise).save(tmp_path / "val" / "noise" / "1.png")
    x, _ = load("imagenet64", tmp_path, "test").batch(torch.tensor([0]))
    wanted = noise.astype(float).reshape(64, 4, 64, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs((x[0].numpy() + 1) * 127.5 - wanted).max() < 2.01  # across, then down, each rounded


def test_pictures_of_other_kinds_become_colours(tmp_path: Path) -> None:
    (tmp_path / "val" / "grey").mkdir(parents=True)
    Image.fromarray(np.full((80, 64), 200, np.uint8)).save(tmp_path / "val" / "grey" / "1.png")
    x, _ = load("imagenet64", tmp_path, "test").batch(torch.tensor([0]))
    assert ((x + 1) * 127.5).round().unique().tolist() == [200]


def test_wrong_imagenet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no ImageNet: expected .*train with a folder of pictures for each"):
        load("imagenet64", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="train must hold a folder of pictures"):
        load("imagenet64", tmp_path)
    Image.fromarray(smooth(64, 64)).save(tmp_path / "train" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match=r"ILSVRC2012_val_00000001\.JPEG has no class"):
        load("imagenet64", tmp_path)


# ---- extracted features ----


def pair(first: object, second: object) -> np.ndarray:
    """As numpy makes it of a tuple of different things."""
    made = np.empty(2, dtype=object)
    made[0], made[1] = first, second
    return made


def test_imagenet_features(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet256_features"
    folder.mkdir()
    moments = DRAW.standard_normal((3, 8, 32, 32)).astype(np.float32)
    for i, label in enumerate((0, 999, 7)):
        np.save(folder / f"{i}.npy", pair(moments[i], np.int64(label)), allow_pickle=True)
    for path in (tmp_path, folder):
        data = load("imagenet256_features", path)
        assert (len(data), data.shape, data.classes, data.moments) == (3, (8, 32, 32), 1000, True)
        x, y = data.batch(torch.tensor([2, 0, 2]))
        assert torch.equal(x, torch.from_numpy(moments[[2, 0, 2]]))
        assert y.tolist() == [7, 0, 7]
    with pytest.raises(ValueError, match=r"0\.npy must hold moments, float \[8, 64, 64\], got \(8, 32, 32\)"):
        load("imagenet512_features", folder)
    with pytest.raises(ValueError, match="take split='train'"):
        load("imagenet256_features", tmp_path, "test")
    np.save(folder / "0.npy", pair(moments[0], np.int64(1000)), allow_pickle=True)
    with pytest.raises(ValueError, match=r"0\.npy has label 1000, expected 0\.\.999"):
        load("imagenet256_features", tmp_path)
    np.save(folder / "0.npy", moments[0])
    with pytest.raises(ValueError, match=r"0\.npy must hold \(moments, label\), got float32"):
        load("imagenet256_features", tmp_path)
    (folder / "0.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"0\.npy is no \.npy file that can be read"):
        load("imagenet256_features", tmp_path)
    (folder / "1.npy").unlink()
    with pytest.raises(ValueError, match=r"lacks 1\.npy of 0\.npy\.\.2\.npy"):
        load("imagenet256_features", tmp_path)


def make_mscoco(root: Path) -> tuple[np.ndarray, dict[tuple[int, int], np.ndarray], np.ndarray]:
    """Moments of three pictures, with two, one and three captions."""
    moments = DRAW.standard_normal((3, 8, 32, 32)).astype(np.float32)
    contexts = {}
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for i, count in enumerate((2, 1, 3)):
            np.save(root / split / f"{i}.npy", moments[i])
            for k in range(count):
                contexts[i, k] = DRAW.standard_normal((77, 6)).astype(np.float32)
                np.save(root / split / f"{i}_{k}.npy", contexts[i, k])
    empty = DRAW.standard_normal((77, 6)).astype(np.float32)
    np.save(root / "empty_context.npy", empty)
    return moments, contexts, empty


def test_mscoco_features(tmp_path: Path) -> None:
    moments, contexts, empty = make_mscoco(tmp_path)
    data = load("mscoco256_features", tmp_path, "test")
    assert (len(data), data.shape, data.classes, data.moments) == (3, (8, 32, 32), 0, True)
    assert torch.equal(data.empty_context, torch.from_numpy(empty))
    met = set()
    for _ in range(30):
        x, context = data.batch(torch.arange(3))
        assert torch.equal(x, torch.from_numpy(moments))
        for i, one in enumerate(context):
            met |= {(i, k) for (j, k), own in contexts.items() if j == i and np.array_equal(one.numpy(), own)}
    assert met == set(contexts)  # every caption is drawn now and then, and only its own picture's


@pytest.mark.parametrize("gone", ["train/0.npy", "train/0_0.npy", "empty_context.npy"])
def test_mscoco_features_that_are_not_there(gone: str, tmp_path: Path) -> None:
    make_mscoco(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(ValueError, match=f"holds no features of MS-COCO: expected .*{gone}"):
        load("mscoco256_features", tmp_path)


def test_wrong_mscoco_features(tmp_path: Path) -> None:
    make_mscoco(tmp_path)
    np.save(tmp_path / "train" / "0_1.npy", np.zeros((77, 5), np.float32))
    (tmp_path / "train" / "0_0.npy").write_bytes((tmp_path / "train" / "0_1.npy").read_bytes())  # the other one, too
    with pytest.raises(ValueError, match=r"must hold a context, float \[77, 6\], got \[77, 5\]"):
        load("mscoco256_features", tmp_path)
    (tmp_path / "train" / "1_0.npy").unlink()
    with pytest.raises(ValueError, match=r"1\.npy has no context; expected 1_0\.npy"):
        load("mscoco256_features", tmp_path)
    np.save(tmp_path / "train" / "9_0.npy", np.zeros((77, 6), np.float32))
    with pytest.raises(ValueError, match=r"9_0\.npy is a context of no 9\.npy"):
        load("mscoco256_features", tmp_path)


def test_names_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no data set 'mnist'; there are {', '.join(NAMES)}"):
        load("mnist", tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'all'"):
        load("cifar10", tmp_path, "all")
    for name in NAMES:
        with pytest.raises(ValueError, match=r"no such folder: .*nowhere"):
            load(name, tmp_path / "nowhere")
        with pytest.raises(ValueError, match=f"{tmp_path} holds no .*: expected "):
            load(name, tmp_path)
