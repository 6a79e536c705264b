"""Samples as PNG files: a folder of them that a later run can complete, and a grid."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.pictures import read_picture
from ..reading import read_json, reason
from ..sampling.reports import Report
from ..writing import check_replaceable, drop_parts, replace_file

CHANNELS = (1, 3)  # of a picture; anything else is a latent
GRID_MOST = 100  # pictures in a grid
GRID_CELL = 64  # pixels; smaller pictures are enlarged by a whole factor
GRID_GAP = 4  # white pixels between two pictures
GRID = "grid.png"
MOST_LISTED = 10_000  # most pictures with lists by sample in report.json, which is rewritten every few pictures
ADVICE = "choose another folder, empty this one, or give --force"
TOTALS = ("passes", "blocks", "blocks_full", "macs", "macs_full", "seconds")


def to_pixels(image: Tensor) -> np.ndarray:
    """image: float [C, H, W], C 1 or 3; -1 becomes 0 and 1 becomes 255, other values are clamped.

    Returns uint8 [H, W] or [H, W, 3]. Raises ValueError for other channels and for NaN or infinity.
    """
    if image.ndim != 3 or image.shape[0] not in CHANNELS:
        raise ValueError(f"a picture has 1 or 3 channels, [C, H, W], got {list(image.shape)}")
    values = image.detach().float().cpu().numpy()  # NumPy takes a third of the time for the rest
    if not np.isfinite(values).all():
        raise ValueError("the sample holds NaN or infinity, so there is no picture of it")
    pixels = np.rint((values.clip(-1, 1) + 1) * np.float32(127.5)).astype(np.uint8).transpose(1, 2, 0)
    return pixels[..., 0] if image.shape[0] == 1 else pixels


def make_grid(pictures: list[np.ndarray], columns: int | None = None) -> np.ndarray:
    """pictures: one or more of the same shape, uint8 [H, W] or [H, W, 3]. Returns them in row order as one image of
    `columns` columns (default: about square), GRID_GAP white pixels apart."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    scale = max(1, GRID_CELL // max(pictures[0].shape[:2]))
    height, width = (side * scale + GRID_GAP for side in pictures[0].shape[:2])
    grid = np.full((rows, height, columns, width, *pictures[0].shape[2:]), 255, np.uint8)
    for i, picture in enumerate(pictures):
        grid[i // columns, :-GRID_GAP, i % columns, :-GRID_GAP] = picture.repeat(scale, 0).repeat(scale, 1)
    grid = grid.reshape(rows * height, columns * width, *pictures[0].shape[2:])
    return grid[:-GRID_GAP, :-GRID_GAP]


def write_png(path: Path, pixels: np.ndarray, rank: int = 0, flush: bool = True) -> None:
    """Writes a PNG file. pixels: uint8 [H, W] or [H, W, 3]. rank, flush: see `replace_file`."""
    replace_file(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"), rank, flush=flush)


def write_json(path: Path, values: object, rank: int | None = 0, force: bool = True) -> None:
    """Writes a JSON file. rank, force: see `replace_file`."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(values, indent=2) + "\n"), rank, force)


def no_totals(num_layers: int) -> dict[str, Any]:
    """Totals over all runs, as in report.json, before the first run."""
    return {
        "num_layers": num_layers,
        "samples": 0,
        **dict.fromkeys(TOTALS, 0),
        "mean_exit_layer": None,
        "exit_layer_histogram": [0] * num_layers,  # number of lanes that exited after block 1, 2, ...
    }


def add_totals(totals: dict[str, Any], report: Report, samples: int) -> None:
    """Adds a run that finished `samples` samples to totals."""
    totals["samples"] += samples
    for name in TOTALS:
        totals[name] += getattr(report, name)
    ends = torch.bincount(report.exit_layer.flatten().long(), minlength=report.num_layers + 1)[1:].tolist()
    earlier = totals["exit_layer_histogram"]
    totals["exit_layer_histogram"] = [a + b for a, b in zip(earlier, ends, strict=True)]
    if totals["passes"]:
        totals["mean_exit_layer"] = totals["blocks"] / totals["passes"]


class PictureFolder:
    """A folder with one PNG for each sample, named by its slot, and report.json: configuration, and totals of all runs.

    missing: slots without an intact picture. damaged: a message for each file that is to be drawn again.
    configuration: must survive JSON unchanged; its `n` is the number of pictures. shape: C, H, W of a picture.
    by_sample: names of lists in report.json with a value for each slot ("steps", "went_on"; null for missing pictures),
    for up to MOST_LISTED pictures. Raises ValueError if the folder cannot be written or holds anything else.
    """

    def __init__(
        self,
        folder: Path,
        configuration: dict[str, Any],
        num_layers: int,
        shape: tuple[int, int, int],
        by_sample: Sequence[str] = (),
    ):
        self.folder, self.shape, self.n = folder, shape, configuration["n"]
        listed = by_sample if self.n <= MOST_LISTED else ()
        self._lists: dict[str, list[Any]] = {name: [None] * self.n for name in listed}
        self._report = folder / "report.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            drop_parts(folder, r"[0-9]{6,}\.png|grid\.png|report\.json")
            for path in (self._report, folder / GRID):
                check_replaceable(path)
            self._before = {"configuration": configuration, **self._totals_before(configuration, num_layers)}
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
        self.missing, self.damaged = self._check()
        self.count = self.n - len(self.missing)
        try:
            write_json(self._report, self._with_lists({**self._before, "samples": self.count}))
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from error

    def _totals_before(self, configuration: dict[str, Any], num_layers: int) -> dict[str, Any]:
        drawn = any(self.folder.glob("*.png"))
        if not self._report.exists():
            if drawn:
                raise ValueError(f"{self.folder} holds pictures but no report.json; {ADVICE}")
            return no_totals(num_layers)
        try:
            content = read_json(self._report)
            theirs = content["configuration"]
            differing = [k for k in {**theirs, **configuration} if theirs.get(k) != configuration.get(k)]
            if not differing:
                self._lists = {name: _checked_list(content, name, self.n) for name in self._lists}
                return _checked_totals(content, num_layers)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._report} is not a report of `adadiff sample`: {reason(error)}; {ADVICE}") from None
        if drawn:
            raise ValueError(f"{self.folder} holds pictures drawn with another {', '.join(differing)}; {ADVICE}")
        return no_totals(num_layers)

    def _check(self) -> tuple[list[int], list[str]]:
        """Slots without an intact picture, and a message for each damaged one. ValueError for files of other origin."""
        missing, damaged = [], []
        for slot in range(self.n):
            path = self.path(slot)
            if not os.path.lexists(path):
                missing.append(slot)
                continue
            if not path.is_file():
                raise ValueError(f"{path} is no regular file; {ADVICE}")
            try:
                size = read_picture(path).size
            except ValueError as error:
                check_replaceable(path)
                missing.append(slot)
                damaged.append(str(error))
                continue
            if size != (self.shape[2], self.shape[1]):
                raise ValueError(
                    f"{path} is {size[0]}x{size[1]}, but the samples are {self.shape[2]}x{self.shape[1]}; {ADVICE}"
                )
        return missing, damaged

    def path(self, slot: int) -> Path:
        return self.folder / f"{slot:06d}.png"

    def add(self, slot: int, image: Tensor, **by_sample: Any) -> None:
        """Writes the picture of a slot. image: float [C, H, W]. by_sample: its values in the lists of report.json,
        which `record` writes."""
        write_png(self.path(slot), to_pixels(image), flush=False)  # a later run finds and redraws damaged ones
        self.count += 1
        for name, values in self._lists.items():
            values[slot] = by_sample[name]

    def _with_lists(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "by_sample": self._lists} if self._lists else values

    def record(self, report: Report) -> None:
        """Writes report.json with the totals of this run so far and of earlier runs; steps repeated after an
        interruption count again. Call it before adding pictures, so that the totals of a killed run include all of its
        pictures."""
        totals = dict(self._before)
        add_totals(totals, report, 0)
        write_json(self._report, self._with_lists({**totals, "samples": self.count}))

    def write_grid(self) -> Path:
        """grid.png of the first GRID_MOST of n >= 1 pictures."""
        grid = self.folder / GRID
        mode = "L" if self.shape[0] == 1 else "RGB"
        first = [read_picture(self.path(slot)).convert(mode) for slot in range(min(self.n, GRID_MOST))]
        write_png(grid, make_grid([np.asarray(picture) for picture in first]))
        return grid


def _checked_list(content: dict[str, Any], name: str, n: int) -> list[Any]:
    values = content["by_sample"][name]
    if type(values) is not list or len(values) != n or any(type(v) not in (int, bool, type(None)) for v in values):
        raise ValueError(f"its list {name!r} is not of {n} samples")
    return values


def _checked_totals(content: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The totals in a report that was read, with the keys of `no_totals`. Raises ValueError for invalid ones."""
    totals = {name: content[name] for name in no_totals(num_layers)}
    numbers = [*(totals[name] for name in ("samples", *TOTALS)), *totals["exit_layer_histogram"]]
    if any(type(v) not in (int, float) or not 0 <= v < 2**63 for v in numbers):
        raise ValueError("its totals are no numbers")
    if totals["num_layers"] != num_layers or len(totals["exit_layer_histogram"]) != num_layers:
        raise ValueError(f"its totals are not of {num_layers} layers")
    return {**totals, "mean_exit_layer": totals["blocks"] / totals["passes"] if totals["passes"] else None}
