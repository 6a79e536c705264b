"""The letters data set: A to Z, a to z and 0 to 9 of hundreds of free typefaces, 32x32 grey pixels, white on black.

Fonts are not part of this package. `letters_families.json` beside this file lists the families, their Debian packages
and licences, and the SHA-256 of every font file. `build` draws the data set from those files; with the releases of
Pillow and FreeType that the list names, it is identical bit for bit. Excluded families are listed, too, with the rule
of `glyph_rules` that they break.

A file holds the arrays images, uint8 [n, 1, 32, 32]; labels, uint8 [n], indices into `glyphs.CHARACTERS`; family and
font, int32 [n]; test, bool [n]; and metadata, JSON text. Training and test split are by family, not by image.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import features
from torch import Tensor

from ..reading import read_json
from ..writing import replace_file
from .glyphs import CHARACTERS, SIZE, draw_font
from .image_sets import Pixels
from .numpy_files import npz_headers, read_npz

LIST = Path(__file__).with_name("letters_families.json")
FORMAT_VERSION = 1
FOLDERS = tuple(Path("/usr/share") / name for name in ("fonts", "texmf", "texlive"))
SPLITS = ("train", "test")
MOST_NAMED = 12  # packages in an error


@dataclass(frozen=True)
class Font:
    """path: where the Debian package installs it. style: a key of `typefaces.STYLES`."""

    style: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Family:
    """A family of the data set. split: "train" or "test"."""

    name: str
    split: str
    package: str
    licence: str
    fonts: tuple[Font, ...]


@dataclass(frozen=True)
class Dropped:
    """An excluded family: the rule of `glyph_rules.RULES` that it breaks, and details."""

    name: str
    package: str
    rule: str
    detail: str


@dataclass(frozen=True)
class FamilyList:
    """Content of letters_families.json. packages: name -> version. images_sha256: of all images in order, drawn with
    these releases of Pillow and FreeType."""

    pillow: str
    freetype: str
    images_sha256: str
    packages: Mapping[str, str]
    families: tuple[Family, ...]
    dropped: tuple[Dropped, ...]

    @classmethod
    def read(cls, path: Path = LIST) -> "FamilyList":
        """Reads a list. Raises ValueError for any other file."""
        content = read_json(path)
        try:
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {content['format_version']!r}, this release reads {FORMAT_VERSION}")
            families = tuple(
                Family(name, split, package, licence, tuple(Font(*font) for font in fonts))
                for name, split, package, licence, fonts in content["families"]
            )
            if wrong := [family.name for family in families if family.split not in SPLITS or not family.fonts]:
                raise ValueError(f"families without split or fonts: {wrong[:5]}")
            dropped = tuple(Dropped(*row) for row in content["dropped"])
            texts = (content["made_with"]["pillow"], content["made_with"]["freetype"], content["images_sha256"])
            return cls(*texts, content["packages"], families, dropped)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no list of families: {error}") from None

    def write(self, path: Path = LIST) -> None:
        """Writes one line for each family, for readable diffs."""

        def rows(values: Iterable[Any]) -> str:
            return "[\n" + ",\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n]"

        families = (
            [f.name, f.split, f.package, f.licence, [list(asdict(o).values()) for o in f.fonts]] for f in self.families
        )
        dropped = (list(asdict(d).values()) for d in self.dropped)
        text = (
            f'{{"format_version": {FORMAT_VERSION},\n'
            f'"made_with": {json.dumps({"pillow": self.pillow, "freetype": self.freetype})},\n'
            f'"images_sha256": "{self.images_sha256}",\n'
            f'"packages": {json.dumps(dict(self.packages))},\n'
            f'"families": {rows(families)},\n"dropped": {rows(dropped)}}}\n'
        )
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@cache
def family_list() -> FamilyList:
    """The shipped list, read once."""
    return FamilyList.read()


@dataclass(frozen=True)
class Built:
    """Arrays of a data file, see above. exact: whether the images are those of the list, bit for bit."""

    arrays: Mapping[str, np.ndarray]
    exact: bool
    families: FamilyList

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **self.arrays)

        replace_file(path, write)


def releases() -> tuple[str, str]:
    """Versions of Pillow and of its FreeType, on which pixels depend."""
    return PIL.__version__, features.version("freetype2") or "none"


def find_fonts(families: FamilyList, root: Path = Path("/")) -> dict[str, Path]:
    """sha256 -> file for every font in the list. root: folder under which the packages are unpacked.

    Raises ValueError, which names the packages to install, if fonts are missing or differ from the list.
    """
    found, lacking, other = {}, {}, {}
    for family in families.families:
        for font in family.fonts:
            path = root / font.path.lstrip("/")
            if not path.is_file():
                lacking[family.package] = font.path
                continue
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == font.sha256:
                    found[font.sha256] = path
                else:
                    other[family.package] = font.path
    if lacking or other:
        raise ValueError(_missing(families, lacking, other))
    return found


def _missing(families: FamilyList, lacking: Mapping[str, str], other: Mapping[str, str]) -> str:
    parts = []
    if lacking:
        names = sorted(lacking)
        parts.append(
            f"fonts of {len(names)} Debian packages are missing, such as {lacking[names[0]]}; as root: apt-get install "
            f"--no-install-recommends {' '.join(names)}"
        )
    if other:
        names = [f"{name} {families.packages.get(name, '')}".strip() for name in sorted(other)]
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        parts.append(
            f"fonts of other releases of {len(names)} packages are installed, such as {other[sorted(other)[0]]}; the "
            f"list is of {', '.join(names[:MOST_NAMED])}{more}"
        )
    return "; ".join(parts)


def build(
    families: FamilyList | None = None,
    root: Path = Path("/"),
    draw: Callable[[Path], np.ndarray] = draw_font,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Built:
    """Draws every font of the list, by default the shipped one. Raises ValueError as `find_fonts` does."""
    families = family_list() if families is None else families
    files = find_fonts(families, root)
    images, family_of, test = [], [], []
    for index, family in enumerate(progress(families.families)):
        for font in family.fonts:
            images.append(draw(files[font.sha256]))
            family_of.append(index)
            test.append(family.split == "test")
    fonts, each = len(images), len(CHARACTERS)
    pixels = np.stack(images).reshape(fonts * each, 1, SIZE, SIZE)
    pillow, freetype = releases()
    exact = hashlib.sha256(pixels.tobytes()).hexdigest() == families.images_sha256
    metadata = {
        "format_version": FORMAT_VERSION,
        "characters": CHARACTERS,
        "made_with": {"pillow": pillow, "freetype": freetype},
        "exact": exact,
        "families": [family.name for family in families.families],
        "fonts": [[font.style, font.sha256] for family in families.families for font in family.fonts],
    }
    arrays = {
        "images": pixels,
        "labels": np.tile(np.arange(each, dtype=np.uint8), fonts),
        "family": np.repeat(np.array(family_of, np.int32), each),
        "font": np.repeat(np.arange(fonts, dtype=np.int32), each),
        "test": np.repeat(np.array(test, bool), each),
        "metadata": np.array(json.dumps(metadata)),
    }
    return Built(arrays, exact, families)


def load_letters(path: str | Path, split: str = "train") -> Pixels:
    """One split, "train" or "test", of a file that `adadiff data letters` wrote.

    Raises ValueError for another split, and for any other file.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}; `adadiff data letters --out {path}` writes it")
    headers = npz_headers(path)
    shapes = {"images": ("|u1", 4), "labels": ("|u1", 1), "test": ("|b1", 1)}
    for name, (kind, ndim) in shapes.items():
        if name not in headers or headers[name].dtype.str != kind or len(headers[name].shape) != ndim:
            raise ValueError(f"{path} holds no letters: it needs {name} as `adadiff data letters` writes it")
    n = headers["images"].shape[0]
    if headers["images"].shape[1:] != (1, SIZE, SIZE) or any(headers[k].shape != (n,) for k in ("labels", "test")):
        raise ValueError(f"{path} holds no letters: images are {list(headers['images'].shape)}, not [n, 1, 32, 32]")
    arrays = read_npz(path, shapes)
    chosen = arrays["test"] == (split == "test")
    if not chosen.any():
        raise ValueError(f"{path} holds no image of the split {split!r}")
    images = torch.from_numpy(arrays["images"][chosen])
    labels = torch.from_numpy(arrays["labels"][chosen].astype(np.int64))
    if int(labels.max()) >= len(CHARACTERS):
        raise ValueError(f"{path} has labels up to {int(labels.max())}, expected 0..{len(CHARACTERS) - 1}")
    return Pixels(images, labels, len(CHARACTERS))


def family_of(path: str | Path, split: str = "train") -> Tensor:
    """int64 [n]: index in the list of families, for each image that `load_letters` returns. Raises the same errors."""
    n = len(load_letters(path, split))
    headers = npz_headers(Path(path))
    if "family" not in headers or headers["family"].dtype.str != "<i4":
        raise ValueError(f"{path} holds no letters: it needs family as `adadiff data letters` writes it")
    arrays = read_npz(Path(path), ("family", "test"))
    family = torch.from_numpy(arrays["family"][arrays["test"] == (split == "test")].astype(np.int64))
    if len(family) != n:
        raise ValueError(f"{path} holds no letters: {len(family)} families for {n} images")
    return family
