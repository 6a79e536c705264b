"""Data sets from small files in their published formats, made here; and what a wrong folder is told."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adadiff.data.datasets import NAMES, load
from sampler import guards

no_hang, little_memory = guards.no_hang, guards.little_memory
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
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 9218 bytes, expected a multiple of 3073"):
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


@pytest.mark.parametrize(
    "labels", [[1.5, 2], ["1", "2"], [None, 1], [10, 1], [-1, 1], [10**30, 1], [[1], [2]]], ids=str
)
def test_labels_of_cifar10_that_are_none(labels: list, tmp_path: Path) -> None:
    make_cifar(tmp_path, "py")
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({b"data": pixels(2, 3072), b"labels": labels}))
    with pytest.raises(ValueError, match=r"test_batch (must hold|has labels)"):
        load("cifar10", tmp_path, "test")


# Each opcode by hand: what unpickling it would allocate or run.
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
PICKLES = {
    "a memo index of 2^26": b"\x80\x02]r" + struct.pack("<I", 2**26) + b".",
    "an array of 1 GB": b"\x80\x02cnumpy\nndarray\n(J\x00\x00\x00\x40\x85tR.",
    "an array that is empty, of 1 GB": b"\x80\x02" + ARRAY + b"J\x00\x00\x00\x40\x85U\x01btR.",
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",
    "a number of 2^30 bytes": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"1.",
    "bytes of -1": b"\x80\x02T" + struct.pack("<i", -1) + b".",
    "a scalar of 2^30 bytes": b"\x80\x02cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x0bV1073741824tRtR.",
    "a dtype of many fields": b"\x80\x02cnumpy\ndtype\n(T" + struct.pack("<i", 600_000) + b"f8," * 200_000 + b"tR.",
    "another encoding": b"\x80\x02c_codecs\nencode\n(X"
    + struct.pack("<i", 3)
    + b"abcX"
    + struct.pack("<i", 4)
    + b"idnatR.",
    "a name below an allowed one": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
    "an extension": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "no end": b"\x80\x02]",
    "marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "an empty stack": b"\x80\x02.",
    "no such protocol": b"\x80\xff.",
    "text": b"no pickle",
    "a number of many digits": b"I" + b"9" * 100_000 + b"\n.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_cannot_take_memory_or_time(name: str, tmp_path: Path, little_memory: None, no_hang: None) -> None:
    make_cifar(tmp_path, "py")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(PICKLES[name])
    with pytest.raises(ValueError, match=r"test_batch (is not read|must hold)"):
        load("cifar10", tmp_path, "test")
    header = (
        np.lib.format.magic(1, 0) + struct.pack("<H", 54) + b"{'descr': '|O', 'fortran_order': False, 'shape': (2,)}"
    )
    (tmp_path / "0.npy").write_bytes(header + PICKLES[name])
    with pytest.raises(ValueError, match=r"0\.npy (is not read|holds list|must hold)"):
        load("imagenet256_features", tmp_path)


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


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["../000001.jpg 0"], "got '../000001.jpg 0'"),
        (["/dev/zero 0"], "got '/dev/zero 0'"),
        (["000001.jpg 01"], "got '000001.jpg 01'"),
        (["000001.jpg 3"], "got '000001.jpg 3'"),
        (["000001.jpg"], "got '000001.jpg'"),
        (["000001.jpg 0", "000001.jpg 0"], "lists a picture twice"),
        (["000001.jpg 0", "000009.jpg 0", "000002.jpg 0"], "lists 000009.jpg, but there is no .*000009.jpg"),
        (["000001.jpg 2"], "lists no picture of this split"),
        ([chr(0xE9) + ".jpg 0"], "can't decode byte"),
    ],
)
def test_a_list_of_celeba_names_its_own_pictures_once(lines: list[str], words: str, tmp_path: Path) -> None:
    make_celeba(tmp_path)
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines), encoding="latin1")
    with pytest.raises(ValueError, match=f"list_eval_partition.txt .*{words}"):
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


def write(path: Path, gray: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (64, 64), gray).save(path)


def labels_of(root: Path, split: str = "train") -> dict[str, int]:
    """By the name of the picture's file."""
    data = load("imagenet64", root, split)
    _, labels = data.batch(torch.arange(len(data)))
    return {path.name: label for path, label in zip(data.paths, labels.tolist(), strict=True)}


def test_the_class_is_the_folder_directly_below(tmp_path: Path) -> None:
    """Not the last folder, nor a hidden one; a folder is a class of its own if it is a link, too."""
    for name in (
        *("n1/images/a.png", "n2/images/b.png", "n2/images/more/c.png", "n2/d.png", "n3/e.png"),
        *(".cache/x.png", ".y.png", "n1/.thumbnails/z.png", "n1/._a.png"),
    ):
        write(tmp_path / "train" / name)
    write(tmp_path / "elsewhere" / "images" / "f.png")
    (tmp_path / "train" / "n0").symlink_to("../elsewhere")
    assert labels_of(tmp_path) == {"f.png": 0, "a.png": 1, "b.png": 2, "c.png": 2, "d.png": 2, "e.png": 3}
    assert load("imagenet64", tmp_path).classes == 4


def test_files_without_a_folder_are_classes_beside_folders(tmp_path: Path) -> None:
    for name in ("n00000002/a.png", "n00000001_5.png", "n00000002_7.png", "n00000003/n00000001_9.png"):
        write(tmp_path / "train" / name)
    assert labels_of(tmp_path) == {"a.png": 1, "n00000001_5.png": 0, "n00000002_7.png": 1, "n00000001_9.png": 2}


def test_the_training_classes_number_the_validation_set(tmp_path: Path) -> None:
    for name in ("train/n1/a.png", "train/n2/b.png", "train/n3_flat/c.png", "val/n3_flat/d.png", "val/n1/e.png"):
        write(tmp_path / name)
    write(tmp_path / "train" / ".hidden" / "x.png")
    assert labels_of(tmp_path, "test") == {"d.png": 2, "e.png": 0}
    assert load("imagenet64", tmp_path, "test").classes == 3
    (tmp_path / "train" / "n10").mkdir()
    with pytest.raises(ValueError, match="train/n10 holds no picture"):
        load("imagenet64", tmp_path, "test")
    write(tmp_path / "train" / "n10" / "f.png")
    write(tmp_path / "val" / "n4" / "g.png")
    with pytest.raises(ValueError, match=r"val holds the class n4, which .*train lacks"):
        load("imagenet64", tmp_path, "test")


def damage(path: Path, how: str) -> None:
    write(path)
    content = {"empty": b"", "text": b"no picture", "cut": path.read_bytes()[:-20]}
    path.write_bytes(content[how])


@pytest.mark.filterwarnings("ignore:.*left out")  # notes.txt
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("how", ["no file", "notes", "hidden", "empty", "text", "cut", "deep"])
def test_a_class_without_a_picture_that_is_read_is_refused(how: str, split: str, tmp_path: Path) -> None:
    write(tmp_path / split / "n1" / "a.png")
    folder = tmp_path / split / "n2"
    folder.mkdir()
    if how == "notes":
        (folder / "notes.txt").write_text("no picture")
    elif how == "hidden":
        write(folder / ".b.png")
    elif how == "deep":
        damage(folder / "images" / "b.png", "cut")
    elif how != "no file":
        damage(folder / "b.png", how)
    name = "train" if split == "train" else "test"
    with pytest.raises(ValueError, match=r"n2 (holds no picture|can be read)"):
        load("imagenet64", tmp_path, name)
    write(folder / "c.png")  # one is enough to begin with
    assert load("imagenet64", tmp_path, name).classes == 2


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
    with pytest.raises(ValueError, match=r"9_0\.npy is a context without moments: there is no .*9\.npy"):
        load("mscoco256_features", tmp_path)


@pytest.mark.parametrize(
    "label", [3.0, True, None, "7", [7], np.float64(7), np.bool_(True), -1, 10**400, np.arange(2)], ids=repr
)
def test_labels_of_features_that_are_none(label: object, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", pair(np.zeros((8, 32, 32), np.float32), label), allow_pickle=True)
    with pytest.raises(ValueError, match=r"0\.npy (must hold \(moments, label\)|has label)"):
        load("imagenet256_features", tmp_path)


@pytest.mark.parametrize("label", [7, np.int32(7), np.uint8(7), np.array(7), np.array([7])], ids=repr)
def test_labels_of_features_are_whole_numbers_of_any_kind(label: object, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", pair(np.zeros((8, 32, 32), np.float32), label), allow_pickle=True)
    assert load("imagenet256_features", tmp_path).batch(torch.tensor([0]))[1].tolist() == [7]


def test_features_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    make_mscoco(tmp_path)
    for file in ("train/0.npy", "train/0_0.npy", "empty_context.npy"):
        content = (tmp_path / file).read_bytes()
        value = np.load(tmp_path / file)
        value.flat[5] = np.nan
        np.save(tmp_path / file, value)
        (tmp_path / "train" / "0_1.npy").write_bytes((tmp_path / "train" / "0_0.npy").read_bytes())  # either is drawn
        with pytest.raises(ValueError, match=r"\.npy holds NaN or infinity"):
            load("mscoco256_features", tmp_path)
        (tmp_path / file).write_bytes(content)


def test_which_files_of_features_count(tmp_path: Path) -> None:
    """Contexts are numbered from 0 for each picture; other spellings of a number are other files."""
    make_mscoco(tmp_path)
    for name in ("007.npy", "00.npy", "\u0661.npy"):
        (tmp_path / "train" / name).touch()
    assert len(load("mscoco256_features", tmp_path)) == 3
    (tmp_path / "train" / "2_1.npy").unlink()
    with pytest.raises(ValueError, match=r"2\.npy lacks 2_1\.npy"):
        load("mscoco256_features", tmp_path)
    (tmp_path / "train" / "2_01.npy").touch()
    with pytest.raises(ValueError, match=r"2_01\.npy is a context without moments"):
        load("mscoco256_features", tmp_path)


def npy(shape: str, data: bytes = b"", descr: str = "'<f4'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return np.lib.format.magic(1, 0) + struct.pack("<H", len(header)) + header + data


NPY = {
    "more than there is": npy("(1000000000,)", bytes(100)),
    "less than there is": npy("(2,)", bytes(100)),
    "negative": npy("(-5, -5)", bytes(100)),
    "too many dimensions": npy("(" + "1," * 100 + ")", bytes(4)),
    "beyond 64 bits": npy("(2**70,)", bytes(100)).replace(b"2**70", str(2**70).encode()),
    "nested": npy("(" * 3000 + ")" * 3000),
    "no shape": npy("None"),
    "no dtype": npy("(1,)", bytes(4), "'nonsense'"),
    "no header": np.lib.format.magic(1, 0) + b"\xff\xff",
    "no version": b"\x93NUMPY\x09\x00" + bytes(100),
    "empty": b"",
    "text": b"no array",
}


@pytest.mark.parametrize("name", NPY)
def test_a_file_of_numpy_is_as_large_as_it_says(name: str, tmp_path: Path, little_memory: None, no_hang: None) -> None:
    make_mscoco(tmp_path)
    (tmp_path / "empty_context.npy").write_bytes(NPY[name])
    with pytest.raises(ValueError, match=r"empty_context\.npy (is no \.npy file|must hold)"):
        load("mscoco256_features", tmp_path)
    (tmp_path / "0.npy").write_bytes(NPY[name])
    with pytest.raises(ValueError, match=r"0\.npy (is no \.npy file|must hold)"):
        load("imagenet256_features", tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "zeros"])
def test_pipes_and_devices_among_features_are_refused(kind: str, tmp_path: Path, no_hang: None) -> None:
    make_mscoco(tmp_path)
    data = load("mscoco256_features", tmp_path)
    for name in ("1.npy", "1_0.npy"):
        file = tmp_path / "train" / name
        content = file.read_bytes()
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to("/dev/zero")
        with pytest.raises(ValueError, match=f"{name} is no regular file"):
            data.batch(torch.tensor([1]))
        file.unlink()
        file.write_bytes(content)


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
