"""Judges: classifiers that decide whether images of digits, canvases or letters show what their labels say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..data.canvases import CLASSES, DIGITS, Canvases
from ..data.digits import digits
from ..data.glyphs import CHARACTERS, SIZE
from . import canvases, letters
from .features import CLASSES as DIGIT_CLASSES
from .features import digits_network

HELD_OUT = 5000  # canvases, drawn from 359 held-out scans


class Judge(Protocol):
    """name: also that of its features, see extractors.py. shape: C, H, W of an image; labels are in 0..classes - 1."""

    name: str
    shape: tuple[int, int, int]
    classes: int

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Real images, float32 [M, C, H, W], that were not used in training, and their labels, int64 [M]."""

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """bool [n]: whether each image [n, C, H, W] shows what its label, int64 [n], says. Raises ValueError for other
        shapes or labels."""

    def groups(self, labels: Tensor) -> Mapping[str, Tensor]:
        """name -> bool [n]: groups of samples whose accuracy is reported separately."""


@dataclass(frozen=True)
class DigitsJudge:
    name = "digits"
    shape = (1, 8, 8)
    classes = DIGIT_CLASSES

    def held_out(self) -> tuple[Tensor, Tensor]:
        return digits("test")

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        return hits(digits_network()(images), labels)

    def groups(self, labels: Tensor) -> Mapping[str, Tensor]:
        return {}


@dataclass(frozen=True)
class CanvasesJudge:
    """side: cells in a row."""

    side: int = 2
    name = "canvases"
    classes = CLASSES

    @property
    def shape(self) -> tuple[int, int, int]:
        return Canvases(self.side).shape

    def held_out(self) -> tuple[Tensor, Tensor]:
        return Canvases(self.side).draw(HELD_OUT, "test", labels=torch.arange(HELD_OUT, device="cpu") % CLASSES)

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        return canvases.follow_rules(images, labels)

    def groups(self, labels: Tensor) -> Mapping[str, Tensor]:
        return {"alone": labels < DIGITS, "count": labels >= DIGITS}


@dataclass(frozen=True)
class LettersJudge:
    name = "letters"
    shape = (1, SIZE, SIZE)
    classes = len(CHARACTERS)

    def held_out(self) -> tuple[Tensor, Tensor]:
        return letters.held_out()

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        return hits(letters.letters_logits(images), labels)

    def groups(self, labels: Tensor) -> Mapping[str, Tensor]:
        return letters.groups(labels)


JUDGES: tuple[Judge, ...] = (DigitsJudge(), CanvasesJudge(2), CanvasesJudge(3), LettersJudge())


def judge_of(shape: tuple[int, int, int], classes: int | None = None, name: str | None = None) -> Judge | None:
    """The judge of images of this shape and, if given, of this number of classes and this name; None if there is
    none."""
    fits = (j for j in JUDGES if j.shape == shape and classes in (None, j.classes) and name in (None, j.name))
    return next(fits, None)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """bool [n]: whether the largest logit is that of the label. logits: [n, classes]; labels: integers [n]. Raises
    ValueError for other shapes, dtypes or labels out of range."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(f"logits [N, classes] need labels [N], got {list(logits.shape)} and {list(labels.shape)}")
    if labels.dtype.is_floating_point or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be integers in 0..{logits.shape[1] - 1}, got {labels.dtype} {labels.tolist()[:5]}"
        )
    return logits.argmax(1) == labels
