"""Which files of a folder are pictures, and what is read of each: the same for training and for evaluation."""

import os
import re
import socket
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adadiff.data.datasets import load
from adadiff.data.pictures import find_pictures, picture_size, read_picture
from adadiff.metrics import images as images_module
from adadiff.metrics.images import open_images
from sampler import guards

no_hang, little_memory = guards.no_hang, guards.little_memory
DRAW = np.random.default_rng(7)
GRAY, COLOR = (DRAW.integers(0, 256, (64, 64, *channels), dtype=np.uint8) for channels in ((), (3,)))
DEEP = DRAW.integers(0, 2**16, (64, 64), dtype=np.uint16)
DEEP[0, 0] = 0x4000
OPAQUE = np.full((64, 64), 255, np.uint8)
SCALED = np.rint(DEEP / 257).astype(np.uint8)
INDEXED = Image.fromarray(COLOR).quantize(16)
INDEXED_RGB = np.asarray(INDEXED.convert("RGB"))


def saved(pixels: np.ndarray | Image.Image, **options: object) -> Callable[[Path], None]:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return lambda path: picture.save(path, **options)


def big_endian(path: Path) -> None:
    Image.frombytes("I;16B", (64, 64), DEEP.astype(">u2").tobytes()).save(path)


def png(width: int, height: int, depth: int = 8, color: int = 0) -> bytes:
    """A PNG whose header says so, with no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


# EXIF values from 1 on, and what a viewer does with the stored rows and columns.
TURNED = (
    COLOR,
    COLOR[:, ::-1],
    COLOR[::-1, ::-1],
    COLOR[::-1],
    COLOR.transpose(1, 0, 2),
    np.rot90(COLOR, -1),
    np.rot90(COLOR, 2).transpose(1, 0, 2),
    np.rot90(COLOR),
)

# name: how the file is made, and its pixels
READ: dict[str, tuple[Callable[[Path], None], np.ndarray]] = {
    "gray.png": (saved(GRAY), GRAY),
    "bilevel.png": (saved(GRAY > 99), np.where(GRAY > 99, 255, 0)),
    "deep.png": (saved(DEEP), SCALED),
    "deep.tif": (saved(DEEP), SCALED),
    "deep_big_endian.tif": (big_endian, SCALED),
    "deep.pgm": (saved(DEEP), SCALED),
    "color.png": (saved(COLOR), COLOR),
    "color.bmp": (saved(COLOR), COLOR),
    "color.ppm": (saved(COLOR), COLOR),
    "color.webp": (saved(COLOR, lossless=True), COLOR),
    "palette.png": (saved(INDEXED), INDEXED_RGB),
    "palette.gif": (saved(INDEXED), INDEXED_RGB),
    "palette_transparency_unused.png": (saved(INDEXED, transparency=200), INDEXED_RGB),
    "gray.gif": (saved(GRAY), GRAY),
    "gray.bmp": (saved(GRAY), GRAY),
    "gray.webp": (saved(GRAY, lossless=True), GRAY),
    "gray_palette.png": (saved(Image.fromarray(GRAY).convert("P")), GRAY),
    "gray_opaque.webp": (saved(np.dstack([GRAY, GRAY, GRAY, OPAQUE]), lossless=True), GRAY),
    "gray_in_color.png": (saved(np.dstack([GRAY, GRAY, GRAY])), np.dstack([GRAY, GRAY, GRAY])),
    "opaque_gray.png": (saved(Image.merge("LA", [*map(Image.fromarray, (GRAY, OPAQUE))])), GRAY),
    "opaque.png": (saved(np.dstack([COLOR, OPAQUE])), COLOR),
    "opaque.webp": (saved(np.dstack([COLOR, OPAQUE]), lossless=True), COLOR),
    "cmyk.tif": (
        saved(Image.merge("CMYK", [*map(Image.fromarray, (*(255 - COLOR.transpose(2, 0, 1)), 0 * GRAY))])),
        COLOR,
    ),
    **{f"turned_{i}.png": (saved(COLOR, exif=orientation(i)), pixels) for i, pixels in enumerate(TURNED, 1)},
    **{f"turned_{i}.tif": (saved(COLOR, exif=orientation(i)), pixels) for i, pixels in enumerate(TURNED, 1)},
    "damaged_exif.webp": (saved(COLOR, exif=b"Exif\0\0II*\0nonsense", lossless=True), COLOR),
}


@pytest.mark.parametrize("name", READ)
def test_training_and_evaluation_read_the_same_pixels(name: str, tmp_path: Path) -> None:
    """Of 64 x 64 pixels, nothing is cut for ImageNet 64."""
    make, pixels = READ[name]
    (tmp_path / "train" / "n1").mkdir(parents=True)
    path = tmp_path / "train" / "n1" / name
    make(path)
    read = np.asarray(read_picture(path))
    np.testing.assert_array_equal(read, pixels)
    assert picture_size(path) == ("L" if read.ndim == 2 else "RGB", (64, 64))
    expected = (
        torch.from_numpy(np.array(np.broadcast_to(np.atleast_3d(read), (64, 64, 3)))).permute(2, 0, 1) / 127.5 - 1
    )
    trained, _ = load("imagenet64", tmp_path).batch(torch.tensor([0]))
    torch.testing.assert_close(trained[0], expected, rtol=0, atol=1e-6)
    (evaluated,) = open_images(path.parent).pieces()
    torch.testing.assert_close(evaluated[0].expand(3, -1, -1), expected, rtol=0, atol=1e-6)


def test_turned_pictures_have_the_size_that_is_shown(tmp_path: Path) -> None:
    for i in range(1, 9):
        for ending in ("png", "jpg", "tif", "webp"):
            path = tmp_path / f"{i}.{ending}"
            Image.fromarray(COLOR[:40]).save(path, exif=orientation(i))
            size = (64, 40) if i < 5 else (40, 64)
            assert (picture_size(path)[1], read_picture(path).size) == (size, size)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "transparent.png": (saved(np.dstack([COLOR, GRAY])), "not every pixel is opaque and it has mode RGBA"),
    "transparent_gray.png": (saved(GRAY, transparency=int(GRAY[3, 3])), "not every pixel is opaque"),
    "transparent_color.png": (saved(COLOR, transparency=tuple(map(int, COLOR[3, 3]))), "not every pixel is opaque"),
    "transparent_palette.gif": (
        saved(INDEXED, transparency=int(np.asarray(INDEXED)[0, 0])),
        "not every pixel is opaque",
    ),
    "transparent.webp": (saved(np.dstack([COLOR, GRAY])), "not every pixel is opaque"),
    "deep_transparent.png": (saved(DEEP, transparency=5), "mode I;16"),
    "float.tif": (saved(GRAY.astype(np.float32)), "it has mode F; convert it"),
    "integers.tif": (saved(GRAY.astype(np.int32)), "it has mode I; convert it"),
    "frames.gif": (saved(GRAY, save_all=True, append_images=[Image.fromarray(255 - GRAY)]), "several frames"),
    "frames.png": (saved(GRAY, save_all=True, append_images=[Image.fromarray(255 - GRAY)]), "several frames"),
    "pages.tif": (saved(GRAY, save_all=True, append_images=[Image.fromarray(255 - GRAY)]), "several frames"),
    "text.png": (lambda path: path.write_text("no picture"), "cannot identify"),
    "empty.png": (lambda path: path.touch(), "cannot identify"),
    "many_pixels.png": (lambda path: path.write_bytes(png(9000, 9000)), "9000 x 9000 pixels"),
    "warned_of.png": (lambda path: path.write_bytes(png(11000, 11000)), "11000 x 11000 pixels"),
    "bomb.png": (lambda path: path.write_bytes(png(60000, 60000)), "exceeds limit"),
    "long_bomb.png": (lambda path: path.write_bytes(png(2**31 - 1, 1)), "exceeds limit"),
    "no_size.bmp": (lambda path: path.write_bytes(b"BM" + bytes(60)), "BMP header"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path, little_memory: None) -> None:
    """Without a warning: one line says all."""
    make, words = REFUSED[name]
    path = tmp_path / name
    make(path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for refuse in (read_picture, picture_size):
            with pytest.raises(ValueError, match=f"{name} is no picture that can be read: .*{re.escape(words)}"):
                refuse(path)
        with pytest.raises(ValueError, match=f"{name} is no picture that can be read"):
            open_images(tmp_path)
    assert not warned


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif", "gif", "ppm", "jp2"])
def test_a_cut_picture_is_refused_wherever_it_is_cut(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    Image.fromarray(COLOR).save(path)
    whole = path.read_bytes()
    # the decoder needs no more than the pixels of formats without checksums or an end
    most = len(whole) - (0 if ending == "png" else 400)
    for length in {*range(0, most, max(1, most // 50)), *(range(most - 12, most) if ending == "png" else ())}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"a\.{ending} is no picture that can be read"):
            read_picture(path)


def test_no_byte_of_a_png_changes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GRAY[:8, :8]).save(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"a\.png is no picture that can be read"):
            read_picture(path)


# ---- which files count ----


def write(path: Path, format: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOR).save(path, format=format)


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_pictures(folder).pictures]


def test_all_pictures_count_whatever_they_are_called(tmp_path: Path) -> None:
    made = {
        **{f"a.{ending}": "PNG" for ending in ("png", "PNG", "Png")},
        **{f"b.{ending}": "JPEG" for ending in ("jpg", "JPG", "jpeg", "JPEG", "jpe", "jfif")},
        "c.webp": "WEBP",
        "c.bmp": "BMP",
        "c.gif": "GIF",
        "c.tif": "TIFF",
        "c.TIFF": "TIFF",
        "c.ppm": "PPM",
        "d": "PNG",
        "d.": "JPEG",
        "n01440764_18": "JPEG",
        "d.img": "WEBP",
        "d.txt": "PNG",
        "e/f/g.dat": "TIFF",
    }
    for name, format in made.items():
        write(tmp_path / name, format)
    assert names(tmp_path) == sorted(made, key=lambda name: Path(name))
    found = open_images(tmp_path)
    assert found.count == len(made) == sum(len(piece) for piece in found.pieces())


def test_a_gray_set_is_gray_in_every_format(tmp_path: Path) -> None:
    """So that digits are measured as digits, some formats having no gray of their own."""
    for ending in ("png", "jpg", "bmp", "gif", "tif", "pgm", "webp", "avif", "jp2"):
        Image.fromarray(GRAY).save(tmp_path / f"a.{ending}")
    found = open_images(tmp_path)
    assert (found.count, found.shape) == (9, (1, 64, 64))


def test_other_files_are_left_out_with_a_word(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "model").touch()
    with pytest.warns(UserWarning, match=r"left out 2 files that are no picture .*such as .*deep/model"):
        assert open_images(tmp_path).count == 1


def test_hidden_files_and_folders_do_not_count(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", "._a.png", ".thumbnails/c.png", "deep/.ipynb_checkpoints/d.png", "deep/e.png"):
        write(tmp_path / name)
    (tmp_path / ".DS_Store").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(tmp_path) == ["a.png", "deep/e.png"]
        assert names(tmp_path / ".thumbnails") == ["c.png"]  # asked for by name


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "deep" / "a.png")
    write(tmp_path / "b.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b.png").symlink_to("../b.png")
    assert names(folder) == ["b.png", "linked/deep/a.png"]
    assert open_images(folder).count == 2


NO_FILE, ABOVE = "is no regular file", "is a link to a folder above it"
SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, NO_FILE),
    "socket": (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), NO_FILE),
    "zeros": (lambda path: path.symlink_to("/dev/zero"), NO_FILE),
    "nothing": (lambda path: path.symlink_to("/dev/null"), NO_FILE),
    "dead": (lambda path: path.symlink_to("nowhere"), NO_FILE),
    "itself": (lambda path: path.symlink_to("."), ABOVE),
    "above": (lambda path: path.symlink_to(".."), ABOVE),
    "far above": (lambda path: path.symlink_to("../../.."), ABOVE),
    "root": (lambda path: path.symlink_to("/"), ABOVE),
}


@pytest.mark.parametrize("ending", [".png", "", ".txt"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused(
    kind: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hang: None
) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket has at most 108 bytes
    write(tmp_path / "train" / "n1" / "a.png")
    make, words = SPECIAL[kind]
    make(Path("train", "n1", f"x{ending}"))
    for opening in (lambda: open_images("train/n1"), lambda: open_images("train"), lambda: load("imagenet64", ".")):
        with pytest.raises(ValueError, match=f"x{ending} {words}"):
            opening()


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "x.png").symlink_to("x.png")
    with pytest.raises((ValueError, OSError), match=r"x\.png"):
        open_images(tmp_path)
    (tmp_path / "x.png").unlink()
    for one, other in ("xy", "yx"):
        (tmp_path / one).mkdir()
        (tmp_path / one / "z").symlink_to(f"../{other}")
    with pytest.raises(ValueError, match="/z is a link to a folder above it"):
        open_images(tmp_path)


def test_a_pipe_that_takes_a_pictures_place_is_refused(tmp_path: Path, no_hang: None) -> None:
    write(tmp_path / "a.png")
    found = open_images(tmp_path)
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is no regular file"):
        list(found.pieces())


# ---- sizes ----


def test_evaluation_takes_images_of_a_size_that_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "a.png").write_bytes(png(5000, 5000))
    with pytest.raises(ValueError, match="images of 25000000 pixels; evaluation takes at most 16777216"):
        open_images(tmp_path / "large")
    for i in range(5):
        write(tmp_path / "small" / f"{i}.png")
    monkeypatch.setattr(images_module, "MOST_VALUES", 2 * 64 * 64 * 3)
    assert [len(piece) for piece in open_images(tmp_path / "small").pieces()] == [2, 2, 1]


def test_a_picture_too_narrow_for_a_square_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "n1").mkdir(parents=True)
    Image.new("RGB", (1, 60000)).save(tmp_path / "train" / "n1" / "a.png")
    data = load("imagenet256", tmp_path)
    with pytest.raises(ValueError, match=r"a\.png: 1 x 60000 pixels are too narrow"):
        data.batch(torch.tensor([0]))
