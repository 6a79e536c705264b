"""Evaluation of letters (data/letters.py): the shipped classifier and its features, and held-out images of letters.

The images are shipped as one picture, a sheet with a column for each of the 62 characters and a row for each image,
drawn at random from fonts of held-out families. `python -m adadiff.metrics.letters letters.npz` makes it.
"""

import argparse
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.glyph_rules import CAPITALS, DIGITS, LOWER
from ..data.glyphs import CHARACTERS, SIZE
from ..data.image_sets import Pixels
from ..data.letters import load_letters
from ..data.pictures import read_picture
from ..writing import replace_file
from .letters_network import letters_network

SHEET = Path(__file__).parents[1] / "checkpoints" / "letters_held_out.png"
ROWS = 80  # images of each character
PARTS = {"capitals": CAPITALS, "lower case": LOWER, "digits": DIGITS}


def letters_features(images: Tensor) -> Tensor:
    """images: float [n, 1, 32, 32]. Returns float32 [n, 64]. Raises ValueError for other shapes."""
    return letters_network().features(_shown(images))


def letters_logits(images: Tensor) -> Tensor:
    """images: float [n, 1, 32, 32]. Returns float32 [n, 62]. Raises ValueError for other shapes."""
    return letters_network()(_shown(images))


def groups(labels: Tensor) -> Mapping[str, Tensor]:
    """name -> bool [n]: capitals, lower case and digits."""
    return {name: (labels >= part.start) & (labels < part.stop) for name, part in PARTS.items()}


@cache
def held_out() -> tuple[Tensor, Tensor]:
    """The shipped images, float32 [80 * 62, 1, 32, 32] in [-1, 1], and their labels, int64: 0 to 61 in turn."""
    data = read_sheet(SHEET)
    return data.batch(torch.arange(len(data), device="cpu"))


def read_sheet(path: Path) -> Pixels:
    """The images of a sheet, in row order. Raises ValueError for any other file."""
    picture = read_picture(path)
    columns, rows = len(CHARACTERS), picture.height // SIZE
    if picture.mode != "L" or picture.size != (columns * SIZE, rows * SIZE) or not rows:
        raise ValueError(f"{path} is no sheet of letters: {picture.mode} {picture.size}")
    cells = np.array(picture).reshape(rows, SIZE, columns, SIZE).swapaxes(1, 2)
    images = torch.from_numpy(cells.reshape(rows * columns, 1, SIZE, SIZE).copy())
    return Pixels(images, torch.arange(columns, device="cpu").repeat(rows), columns)


def write_sheet(data: Pixels, path: Path, rows: int = ROWS, seed: int = 0) -> None:
    """Writes a sheet with `rows` images of each character, drawn without replacement. Raises ValueError if there are
    fewer."""
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for label in range(len(CHARACTERS)):
        found = (data.labels == label).nonzero().squeeze(1)
        if len(found) < rows:
            raise ValueError(f"{len(found)} images of {CHARACTERS[label]}, {rows} are needed")
        columns.append(data.images[found[torch.randperm(len(found), generator=generator, device="cpu")[:rows]], 0])
    cells = torch.stack(columns, 1)  # [rows, 62, 32, 32]
    sheet = cells.transpose(1, 2).reshape(rows * SIZE, len(CHARACTERS) * SIZE)
    picture = Image.fromarray(sheet.numpy())
    replace_file(path, lambda temporary: picture.save(temporary, "PNG", optimize=True))


def _shown(images: Tensor) -> Tensor:
    return images.float().clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m adadiff.metrics.letters", description=__doc__)
    parser.add_argument("data", type=Path, help="file that `adadiff data letters` wrote")
    parser.add_argument("--out", type=Path, default=SHEET, help="file to write (default: the shipped one)")
    options = parser.parse_args()
    write_sheet(load_letters(options.data, "test"), options.out)
    print(f"wrote {options.out}, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
