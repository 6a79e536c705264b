"""The judge of canvases (data/canvases.py): what every cell shows, whether the rule holds, features of all cells."""

from torch import Tensor

from ..data.canvases import BLANK, CELL, follows
from .features import digits_network

BLANK_MEAN = -0.85  # the mean of every scan lies above -0.7, that of an empty cell is -1


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
    """images: float32 [n, 1, H, W]. Returns float32 [n, 32 * cells] for distances: the digits network's features of
    every cell, side by side, so that their covariance sees which digits stand together."""
    return digits_network().features(_cells(images)).view(len(images), -1)


def _cells(images: Tensor) -> Tensor:
    """[n, 1, H, W] -> [n * cells, 1, 8, 8], clamped to [-1, 1] as when shown."""
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3] or images.shape[2] % CELL:
        raise ValueError(f"canvases are [n, 1, H, H], H a multiple of {CELL}, got {list(images.shape)}")
    n, side = len(images), images.shape[2] // CELL
    cells = images.float().clamp(-1, 1).view(n, side, CELL, side, CELL).transpose(2, 3)
    return cells.reshape(n * side**2, 1, CELL, CELL)
