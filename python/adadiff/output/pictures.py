"""SampleBatch as PNG files: a folder of them that a later run can complete, and a grid."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..sampling.reports import Report

CHANNELS = (1, 3)  # of a picture; anything else is a latent
GRID_MOST = 100  # pictures in a grid
GRID_CELL = 64  # pixels; smaller pictures are enlarged by a whole factor
GRID_GAP = 4  # white pixels between two pictures; many have no border of their own
TOTALS = ("passes", "blocks", "blocks_full", "macs", "macs_full", "seconds")


def to_pixels(image: Tensor) -> np.ndarray:
    """image: float [C, H, W], C 1 or 3, from -1 (0) to 1 (255), what lies beyond is clamped.

    Returns uint8 [H, W] or [H, W, 3]. Raises ValueError for other channels and for NaN or infinity.
    """
    if image.ndim != 3 or image.shape[0] not in CHANNELS:
        raise ValueError(f"a picture has 1 or 3 channels, [C, H, W], got {list(image.shape)}")
    if not bool(image.isfinite().all()):
        raise ValueError("the sample holds NaN or infinity, so there is no picture of it")
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return pixels[..., 0] if image.shape[0] == 1 else pixels


def make_grid(pictures: list[np.ndarray], columns: int | None = None) -> np.ndarray:
    """pictures: one or more, uint8 [H, W] or [H, W, 3], all alike. Returns a grid by rows (default: near-square),
    GRID_GAP white pixels between them and none around."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    scale = max(1, GRID_CELL // max(pictures[0].shape[:2]))
    height, width = (side * scale + GRID_GAP for side in pictures[0].shape[:2])
    grid = np.full((rows, height, columns, width, *pictures[0].shape[2:]), 255, np.uint8)
    for i, picture in enumerate(pictures):
        grid[i // columns, :-GRID_GAP, i % columns, :-GRID_GAP] = picture.repeat(scale, 0).repeat(scale, 1)
    grid = grid.reshape(rows * height, columns * width, *pictures[0].shape[2:])
    return grid[:-GRID_GAP, :-GRID_GAP]


def write_png(path: Path, pixels: np.ndarray, rank: int = 0) -> None:
    """pixels: uint8 [H, W] or [H, W, 3]."""
    replace_file(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"), rank)


def write_json(path: Path, values: object, rank: int = 0) -> None:
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(values, indent=2) + "\n"), rank)


def replace_file(path: Path, write: Callable[[Path], object], rank: int = 0) -> None:
    """A reader, or a later run, never sees half a file; nor do processes of other ranks that write the same one."""
    temporary = path.with_name(f"{path.name}.{rank}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def no_totals(num_layers: int) -> dict[str, Any]:
    """What report.json tells of all runs together, before the first."""
    return {
        "num_layers": num_layers,
        "samples": 0,
        **dict.fromkeys(TOTALS, 0),
        "mean_exit_layer": None,
        "exit_layer_histogram": [0] * num_layers,  # lanes that exited after block 1, 2, ...
    }


def add_totals(totals: dict[str, Any], report: Report, samples: int) -> None:
    """A run that finished so many samples."""
    totals["samples"] += samples
    for name in TOTALS:
        totals[name] += getattr(report, name)
    ends = torch.bincount(report.exit_layer.flatten().long(), minlength=report.num_layers + 1)[1:].tolist()
    earlier = totals["exit_layer_histogram"]
    totals["exit_layer_histogram"] = [a + b for a, b in zip(earlier, ends, strict=True)]
    if totals["passes"]:
        totals["mean_exit_layer"] = totals["blocks"] / totals["passes"]


class PictureFolder:
    """One PNG per sample, named by its slot, and report.json: the configuration, what all runs did together.

    `configuration` must survive JSON unchanged. Raises ValueError where the folder cannot be written or holds
    pictures of another configuration.
    """

    def __init__(self, folder: Path, configuration: dict[str, Any], num_layers: int):
        self.folder, self._report = folder, folder / "report.json"
        self._content = {"configuration": configuration, **no_totals(num_layers)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.glob("*.png")):
                self._content = self._earlier(configuration)
            write_json(self._report, self._content)
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from error

    def _earlier(self, configuration: dict[str, Any]) -> dict[str, Any]:
        advice = "choose another folder, or empty this one"
        if not self._report.exists():
            raise ValueError(f"{self.folder} holds pictures but no report.json; {advice}")
        try:
            content = json.loads(self._report.read_text())
            theirs = content["configuration"]
            differing = [k for k in {**theirs, **configuration} if theirs.get(k) != configuration.get(k)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._report} is not a report of `adadiff sample`: {error}; {advice}") from None
        if differing:
            raise ValueError(f"{self.folder} holds pictures drawn with another {', '.join(differing)}; {advice}")
        return content

    def path(self, slot: int) -> Path:
        return self.folder / f"{slot:06d}.png"

    def missing(self, n: int) -> list[int]:
        """Slots in 0..n-1 without a picture."""
        return [slot for slot in range(n) if not self.path(slot).exists()]

    def add(self, slot: int, image: Tensor) -> None:
        """image: float [C, H, W]."""
        write_png(self.path(slot), to_pixels(image))

    def record(self, report: Report, samples: int) -> None:
        """Adds a run, finished or not; steps repeated after an interruption count again."""
        add_totals(self._content, report, samples)
        write_json(self._report, self._content)

    def write_grid(self, n: int) -> Path:
        """grid.png of the first GRID_MOST of n >= 1 pictures."""
        grid = self.folder / "grid.png"
        first = range(min(n, GRID_MOST))
        write_png(grid, make_grid([np.asarray(Image.open(self.path(slot))) for slot in first]))
        return grid
