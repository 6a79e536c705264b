"""Canvases: real digit scans in a square of cells, which ones, the label says; judged by machine.

A harder data set than single digits that needs no download. Cells are read in rows. With `side` 2 there are 4 cells of
8x8 pixels, a canvas of 16x16; with 3, 9 cells and 24x24 pixels.

label      canvas
0..9       alone: that digit in the first cell, the others are empty
10..19     count: every cell is filled, the first with label - 10, each other with the digit after the one before it, 0
           after 9

Most of an easy canvas is one colour. Of the hard ones every cell has a digit of its own to find out and to draw.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation.features import digits_network
from .digits import digits

DIGITS = 10
CLASSES = 2 * DIGITS
BLANK = -1  # in place of a digit
CELL = 8  # pixels
BLANK_MEAN = -0.85  # the mean of every scan lies above -0.7, that of an empty cell is -1


@dataclass(frozen=True)
class Canvases:
    """side: cells in a row and in a column, 2 or 3. hard: share of the labels that count, in [0, 1]; within both
    kinds labels are equally frequent."""

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
        first = torch.randint(DIGITS, (n,), generator=generator)
        return first + DIGITS * (torch.rand(n, generator=generator) < self.hard)

    def contents(self, labels: Tensor) -> Tensor:
        """labels: int64 [n]. Returns the digits of every cell, int64 [n, cells], BLANK where it is empty."""
        return contents(labels, self.cells)

    def draw(self, n: int, split: str = "train", seed: int = 0, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """n canvases out of the scans of one split ("train" or "test", see `data.digits`), a function of the arguments.

        labels: int64 [n], by default drawn. Returns images float32 [n, 1, H, W] in [-1, 1] and labels int64 [n].
        Raises ValueError for anything that does not fit.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 0 or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"n and seed must be integers >= 0, got {n!r} and {seed!r}")
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
        pick = (torch.rand(contents.shape, generator=generator, dtype=torch.float64) * count[shown]).long()
        cells = scans[by_class[first[shown] + pick], 0]  # [n, cells, 8, 8]
        cells[contents == BLANK] = -1
        images = cells.view(n, self.side, self.side, CELL, CELL).transpose(2, 3).reshape(n, *self.shape)
        return images, labels


def contents(labels: Tensor, cells: int) -> Tensor:
    """labels: int64 [n]. Returns the digits of every cell, int64 [n, cells], BLANK where it is empty."""
    _check_labels(labels)
    counted = (labels[:, None] + torch.arange(cells)) % DIGITS
    counted[:, 1:].masked_fill_(labels[:, None] < DIGITS, BLANK)
    return counted


def follows(contents_read: Tensor, labels: Tensor) -> Tensor:
    """bool [n]: whether contents, int64 [n, cells] with BLANK for empty, are what labels, int64 [n], ask for."""
    return (contents_read == contents(labels, contents_read.shape[1])).all(1)


def read(images: Tensor) -> Tensor:
    """What the digits network reads in every cell of images [n, 1, H, W]: int64 [n, cells], BLANK where it is dark."""
    cells, n = _cells(images), len(images)
    digit = digits_network()(cells).argmax(1)
    return digit.where(cells.flatten(1).mean(1) > BLANK_MEAN, BLANK).view(n, -1)


def follow_rules(images: Tensor, labels: Tensor) -> Tensor:
    """bool [n]: whether each image [n, 1, H, W], as `read`, is what its label asks for.

    Not every held-out canvas is: the reader errs, so compare with `Canvases.draw(..., split="test")`.
    """
    return follows(read(images), labels)


def canvas_features(images: Tensor) -> Tensor:
    """images: float32 [n, 1, H, W]. Returns float32 [n, 32 * cells] for Fréchet distances: the digits network's
    features of every cell, side by side, so that their covariance sees which digits stand together."""
    return digits_network().features(_cells(images)).view(len(images), -1)


def _cells(images: Tensor) -> Tensor:
    """[n, 1, H, W] -> [n * cells, 1, 8, 8], clamped to [-1, 1] as when shown."""
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3] or images.shape[2] % CELL:
        raise ValueError(f"canvases are [n, 1, H, H], H a multiple of {CELL}, got {list(images.shape)}")
    n, side = len(images), images.shape[2] // CELL
    cells = images.float().clamp(-1, 1).view(n, side, CELL, side, CELL).transpose(2, 3)
    return cells.reshape(n * side**2, 1, CELL, CELL)


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [n], got {labels.dtype} {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < CLASSES:
        raise ValueError(f"labels must be in 0..{CLASSES - 1}, got {labels.tolist()[:8]}")
