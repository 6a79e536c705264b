"""Pictures on disk, for training and evaluation: which files of a folder count, and how their pixels are read.

Files that count: every regular file in the folder or below it that has a picture's extension, or, whatever its name, a
picture of one of FORMATS as content. Hidden files and folders are skipped, and links are followed. Other files are left
out with a warning. A pipe, a device, a dead link or a link to a folder above it is refused.

Pixels: 8 bits, gray or RGB, as a viewer shows them.

in the file                        read as
gray of 1, 2, 4 or 8 bits          gray
gray of 16 bits                    gray, divided by 257 and rounded: 0x4000 becomes 64
RGB, CMYK, YCbCr                   RGB; Pillow converts, colour profiles are ignored
palette, WebP, AVIF                gray if every pixel is (these formats have no gray mode), else RGB
alpha channel or transparency      gray or RGB if every pixel is opaque, else refused
EXIF orientation                   the picture is turned upright; damaged EXIF data is ignored
several frames                     refused; of MPO, the first
anything else (float, 32 bits)     refused
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..reading import check_regular, of_system, reason

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM")
ENDINGS = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".jp2", ".j2k"),
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
}
MOST_PIXELS = 2**26  # of a picture; the largest one in ImageNet has 61 million

MODES = {
    **dict.fromkeys(("1", "L", "LA", "La"), "L"),
    **dict.fromkeys(("RGB", "RGBX", "RGBA", "RGBa", "P", "PA", "CMYK", "YCbCr"), "RGB"),
}
SIXTEEN_BITS = {"I;16", "I;16B", "I;16L", "I;16N", "I"}
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
BLACK_IS_ZERO = 1
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
ORIENTATION = 0x0112  # EXIF tag
TURNS = {  # its values, 1 being upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING = {TURNS[value] for value in (5, 6, 7, 8)}  # turns that swap height and width


@dataclass(frozen=True)
class Found:
    """pictures, others (files that are no pictures): each sorted by path."""

    pictures: list[Path]
    others: list[Path]


def find_pictures(folder: Path) -> Found:
    """The pictures in a folder and below it, as described above. Warns if there are other files."""
    pictures: list[Path] = []
    others: list[Path] = []
    for path in _files(folder):
        (pictures if is_picture(path) else others).append(path)
    if others:
        some = f"{len(others)} file{'s' if len(others) > 1 else ''} that {'are' if len(others) > 1 else 'is'}"
        warnings.warn(
            f"{folder}: left out {some} no picture ({', '.join(FORMATS)}), such as {min(others)}", stacklevel=2
        )
    return Found(sorted(pictures), sorted(others))


def is_picture(path: Path) -> bool:
    """Whether the extension or the content is a picture's. By extension, a damaged picture counts, too, so that reading
    it fails instead of leaving it out."""
    if path.suffix.lower() in ENDINGS:
        return True
    try:
        with _opened(path):
            return True
    except Exception:
        return False


def read_picture(path: Path) -> Image.Image:
    """The picture in mode L or RGB. Raises ValueError, with the file's name, for pictures that are refused as described
    above, and OSError if the system cannot read the file."""
    try:
        with _opened(path) as picture:
            if picture.format == "PNG":
                picture.verify()  # checksums; decoding alone accepts a damaged end
                _check_end(path)
        with _opened(path) as picture:
            target = _target(picture)
            picture.load()
            turn = _turn(picture)  # PNG may have its EXIF data after the pixels
            pixels = _eight_bits(picture) if picture.mode in SIXTEEN_BITS else _opaque(picture, target)
            if _has_no_gray(picture) and _is_gray(pixels):
                pixels = pixels.convert("L")
            return pixels if turn is None else pixels.transpose(turn)
    except Exception as error:  # Pillow's decoders raise many types
        raise _refusal(path, error) from None


def picture_size(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode (L or RGB) and size (width, height) of the picture that `read_picture` returns, from the header if possible.

    Raises ValueError as `read_picture` does, except for damage beyond the header.
    """
    try:
        with _opened(path) as picture:
            mode, size = _target(picture), picture.size
            if not picture.has_transparency_data and not _has_no_gray(picture):
                return mode, size[::-1] if _turn(picture) in SWAPPING else size
    except Exception as error:
        raise _refusal(path, error) from None
    read = read_picture(path)
    return read.mode, read.size


def _refusal(path: Path, error: Exception) -> Exception:
    return error if of_system(error) else ValueError(f"{path} is no picture that can be read: {reason(error)}")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture of one of FORMATS, its header read. Raises any exception of Pillow, and ValueError for its size."""
    check_regular(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures, which are refused here, and of damaged EXIF data
        with Image.open(path, formats=_installed()) as picture:
            width, height = picture.size
            if not 0 < width * height <= MOST_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels; there must be 1 to {MOST_PIXELS:,}")
            yield picture


@cache
def _installed() -> tuple[str, ...]:
    """The FORMATS that this Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _target(picture: Image.Image) -> str:
    """The mode to read it in, L or RGB. Raises ValueError for pictures that their header rules out."""
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        raise ValueError("it has several frames; save each as a picture of its own")
    if picture.mode in SIXTEEN_BITS and _spans_sixteen_bits(picture) and not picture.has_transparency_data:
        return "L"
    if picture.mode not in MODES:
        raise ValueError(f"it has mode {picture.mode}; convert it to gray or RGB, 8 bits each")
    return MODES[picture.mode]


def _spans_sixteen_bits(picture: Image.Image) -> bool:
    """Whether 0 is black and 65535 white. Other formats use the same modes for 12 bits or signed numbers."""
    if picture.format == "TIFF":
        tags = getattr(picture, "tag_v2", {})
        return tags.get(BITS_PER_SAMPLE) == (16,) and tags.get(PHOTOMETRIC) == BLACK_IS_ZERO and picture.mode != "I"
    return picture.format in ("PNG", "PPM")


def _eight_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _opaque(picture: Image.Image, mode: str) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert(mode)
    with_alpha = picture.convert(f"{mode}A")
    if with_alpha.getchannel("A").getextrema() != (255, 255):
        raise ValueError(f"not every pixel is opaque and it has mode {picture.mode}; convert it to gray or RGB")
    return with_alpha.convert(mode)


def _has_no_gray(picture: Image.Image) -> bool:
    return picture.mode in ("P", "PA") or picture.format in ("WEBP", "AVIF")


def _is_gray(picture: Image.Image) -> bool:
    """Whether all pixels are gray, up to the rounding of lossy WebP."""
    pixels = np.asarray(picture.convert("RGB"))
    return bool((pixels.max(-1) - pixels.min(-1) <= 1).all())


def _check_end(path: Path) -> None:
    """ValueError if the last chunk of a PNG, which Pillow does not read, is missing. Other data may follow it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        if PNG_END not in file.read():
            raise ValueError("its end is missing")


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """The transposition that turns the picture upright, or None."""
    if picture.format == "TIFF":
        return None  # Pillow turns TIFF itself
    try:
        return TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data, which some pictures of ImageNet have
        return None


def _files(folder: Path) -> Iterator[Path]:
    """Regular files below a folder, in no order. Raises ValueError for a link to a folder above it, and for pipes,
    devices and dead links."""
    waiting = [(folder, frozenset(map(_identity, folder.resolve().parents)))]
    while waiting:
        current, above = waiting.pop()
        identity = _identity(current)
        if identity in above:
            raise ValueError(f"{current} is a link to a folder above it; remove the link")
        with os.scandir(current) as entries:
            for entry in entries:
                path = current / entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append((path, above | {identity}))
                elif entry.is_file():
                    yield path
                else:
                    raise ValueError(f"{path} is no regular file; remove it")


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
