"""Canvases: real digit scans in a square of cells, under a rule that the label sets. Judged in evaluation/canvases.py.

A harder data set than single digits that needs no download. Cells are read in rows. With `side` 2 there are 4 cells of
8x8 pixels, a canvas of 16x16; with 3, 9 cells and 24x24 pixels.

label      canvas
0..9       easy: that digit in the first cell, the others are empty
10 same    one digit in every cell, any digit, each a scan of its own
11 count   every cell shows the digit after the one before it, 0 after 9; any start
12 rising  digits grow strictly from cell to cell
13 sum     the last two cells are the sum of all others, tens first

To draw an easy canvas no cell needs to know of another. The others ask the network to settle what every cell shows and
to make them agree, a sum most of all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .digits import digits

DIGITS = 10
RULES = ("same", "count", "rising", "sum")
CLASSES = DIGITS + len(RULES)
NAMES = (*map(str, range(DIGITS)), *RULES)
BLANK = -1  # in place of a digit
CELL = 8  # pixels


@dataclass(frozen=True)
class Canvases:
    """side: cells in a row and in a column, 2 or 3. hard: share of the labels that are rules, in [0, 1]; the other
    labels, and the rules among themselves, are equally frequent."""

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
        """int64 [n] in 0..13."""
        easy = torch.randint(DIGITS, (n,), generator=generator)
        rule = DIGITS + torch.randint(len(RULES), (n,), generator=generator)
        return rule.where(torch.rand(n, generator=generator) < self.hard, easy)

    def contents(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """labels: int64 [n]. Returns the digits of every cell, int64 [n, cells], BLANK where it is empty."""
        _check_labels(labels)
        n, cells = len(labels), self.cells
        start = torch.randint(DIGITS, (n, 1), generator=generator)
        subset = torch.rand(n, DIGITS, generator=generator).argsort(1)[:, :cells].sort(1).values
        terms = torch.randint(DIGITS, (n, cells - 2), generator=generator)
        alone = torch.full((n, cells), BLANK)
        alone[:, 0] = labels
        kinds = torch.stack(
            [
                alone,
                start.expand(n, cells),
                (start + torch.arange(cells)) % DIGITS,
                subset,
                torch.cat([terms, _two_digits(terms.sum(1))], 1),
            ]
        )
        return kinds[(labels - DIGITS + 1).clamp(min=0), torch.arange(n)]

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
        contents = self.contents(labels, generator)
        by_class = classes.argsort(stable=True)
        count = torch.bincount(classes, minlength=DIGITS)
        first = count.cumsum(0) - count
        shown = contents.clamp(min=0)
        pick = (torch.rand(contents.shape, generator=generator, dtype=torch.float64) * count[shown]).long()
        cells = scans[by_class[first[shown] + pick], 0]  # [n, cells, 8, 8]
        cells[contents == BLANK] = -1
        images = cells.view(n, self.side, self.side, CELL, CELL).transpose(2, 3).reshape(n, *self.shape)
        return images, labels


def follows(contents: Tensor, labels: Tensor) -> Tensor:
    """bool [n]: whether contents, int64 [n, cells] with BLANK for empty, are what labels, int64 [n], ask for."""
    _check_labels(labels)
    first, rest = contents[:, :1], contents[:, 1:]
    full = (contents != BLANK).all(1)
    terms, last = contents[:, :-2], contents[:, -2:]
    kinds = torch.stack(
        [
            (first[:, 0] == labels) & (rest == BLANK).all(1),
            full & (rest == first).all(1),
            full & (contents.diff(dim=1) % DIGITS == 1).all(1),
            full & (contents.diff(dim=1) > 0).all(1),
            full & (last == _two_digits(terms.sum(1))).all(1),
        ]
    )
    return kinds[(labels - DIGITS + 1).clamp(min=0), torch.arange(len(labels))]


def _two_digits(number: Tensor) -> Tensor:
    """[n] -> [n, 2], tens and units."""
    return torch.stack([number // DIGITS, number % DIGITS], 1)


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [n], got {labels.dtype} {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < CLASSES:
        raise ValueError(f"labels must be in 0..{CLASSES - 1}, got {labels.tolist()[:8]}")
