"""Canvases: real digit scans arranged in a square of cells by a rule that the label gives; see metrics/canvases.py.

A harder data set than single digits that needs no download. Cells are in row order. With `side` 2 there are 4 cells of
8x8 pixels, a canvas of 16x16; with 3, 9 cells and 24x24 pixels.

label      canvas
0..9       alone (easy): that digit in the first cell, the others are empty
10..19     count (hard): label - 10 in the first cell, then the next digit in every further cell, 0 after 9

Most of an easy canvas is background. In a hard one, every cell has another digit to work out and to draw.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .digits import digits

DIGITS = 10
CLASSES = 2 * DIGITS
BLANK = -1  # in place of a digit
CELL = 8  # pixels


@dataclass(frozen=True)
class Canvases:
    """side: cells in a row and in a column, 2 or 3. hard: share of labels 10..19, in [0, 1]; labels of the same kind
    are equally frequent."""

    side: int = 2
    hard: float = 0.5

    def __post_init__(self) -> None:
        if self.side not in (2, 3) or isinstance(self.side, bool):
            raise ValueError(f"side must be 2 or 3 cells, got {self.side!r}")
        if isinstance(self.hard, bool) or not isinstance(self.hard, int | float) or not 0 <= self.hard <= 1:
            raise ValueError(f"hard must be a number in [0, 1], got {self.hard!r}")

    @property
    def cells(self) -> int:
        return self.side**2

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.side * CELL, self.side * CELL

    def labels(self, n: int, generator: torch.Generator) -> Tensor:
        """int64 [n] in 0..19."""
        first = torch.randint(DIGITS, (n,), generator=generator, device="cpu")
        return first + DIGITS * (torch.rand(n, generator=generator, dtype=torch.float32, device="cpu") < self.hard)

    def contents(self, labels: Tensor) -> Tensor:
        """labels: int64 [n]. Returns the digits of every cell, int64 [n, cells], BLANK where it is empty."""
        return contents(labels, self.cells)

    def draw(self, n: int, split: str = "train", seed: int = 0, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """n canvases from the scans of one split ("train" or "test", see `data.digits`); the same arguments give the
        same canvases.

        labels: int64 [n], by default drawn at random. Returns images float32 [n, 1, H, W] in [-1, 1] and labels int64
        [n]. Raises ValueError for an invalid n, seed, split or labels.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 0 or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"n and seed must be integers >= 0, got {n!r} and {seed!r}")
        if seed >= 2**62:
            raise ValueError("the seed of canvases must be below 2^62")
        if labels is not None and labels.shape != (n,):
            raise ValueError(f"labels must be int64 [{n}], got {labels.dtype} {list(labels.shape)}")
        scans, classes = digits(split)
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        drawn = self.labels(n, generator)
        labels = drawn if labels is None else labels
        contents = self.contents(labels)
        by_class = classes.argsort(stable=True)
        count = torch.bincount(classes, minlength=DIGITS)
        first = count.cumsum(0) - count
        shown = contents.clamp(min=0)
        pick = (
            torch.rand(contents.shape, generator=generator, dtype=torch.float64, device="cpu") * count[shown]
        ).long()
        cells = scans[by_class[first[shown] + pick], 0]  # [n, cells, 8, 8]
        cells[contents == BLANK] = -1
        images = cells.view(n, self.side, self.side, CELL, CELL).transpose(2, 3).reshape(n, *self.shape)
        return images, labels


def contents(labels: Tensor, cells: int) -> Tensor:
    """labels: int64 [n]. Returns the digits of every cell, int64 [n, cells], BLANK where it is empty."""
    _check_labels(labels)
    counted = (labels[:, None] + torch.arange(cells, device=labels.device)) % DIGITS
    counted[:, 1:].masked_fill_(labels[:, None] < DIGITS, BLANK)
    return counted


def follows(contents_read: Tensor, labels: Tensor) -> Tensor:
    """bool [n]: whether contents, int64 [n, cells] with BLANK for empty, follow the rule of labels, int64 [n]."""
    return (contents_read == contents(labels, contents_read.shape[1])).all(1)


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [n], got {labels.dtype} {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < CLASSES:
        raise ValueError(f"labels must be in 0..{CLASSES - 1}, got {labels.tolist()[:8]}")
