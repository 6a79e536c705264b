"""Evaluation of canvases (data/canvases.py): the digit in every cell, whether the rule holds, and features."""

from torch import Tensor

from ..data.canvases import BLANK, CELL, follows
from .features import digits_network

BLANK_MEAN = -0.85  # threshold: the mean of every scan is above -0.7, that of an empty cell is -1


def read(images: Tensor) -> Tensor:
    """The digits network's prediction for every cell of images [n, 1, H, W]: int64 [n, cells], BLANK if it is dark."""
    cells, n = _cells(images), len(images)
    digit = digits_network()(cells).argmax(1)
    return digit.where(cells.flatten(1).mean(1) > BLANK_MEAN, BLANK).view(n, -1)


def follow_rules(images: Tensor, labels: Tensor) -> Tensor:
    """bool [n]: whether each image [n, 1, H, W], read by `read`, follows the rule of its label, int64 [n].

    The reader makes errors on real canvases, too, so compare with `Canvases.draw(..., split="test")`.
    """
    return follows(read(images), labels)


def canvas_features(images: Tensor) -> Tensor:
    """images: float32 [n, 1, H, W]. Returns float32 [n, 32 * cells], features for distances: the digits network's
    features of all cells, concatenated, so that their covariance depends on which digits occur together."""
    return digits_network().features(_cells(images)).view(len(images), -1)


def _cells(images: Tensor) -> Tensor:
    """[n, 1, H, W] -> [n * cells, 1, 8, 8], clamped to [-1, 1] like a picture file."""
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3] or images.shape[2] % CELL:
        raise ValueError(f"canvases are [n, 1, H, H], H a multiple of {CELL}, got {list(images.shape)}")
    n, side = len(images), images.shape[2] // CELL
    cells = images.float().clamp(-1, 1).view(n, side, CELL, side, CELL).transpose(2, 3)
    return cells.reshape(n * side**2, 1, CELL, CELL)
