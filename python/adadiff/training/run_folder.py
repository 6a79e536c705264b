"""The folder of a training: its configuration, its state, the averaged model, the log and pictures along the way."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..config import from_dict
from ..model import Model
from ..output.pictures import make_grid, to_pixels, write_json, write_png
from ..sampling.sampler import sample
from .config import FORMAT_VERSION, TrainConfig, versioned

STATE, MODEL, LOG, CONFIG = "state.safetensors", "model.safetensors", "log.jsonl", "config.json"
SAMPLES, TENSORBOARD = "samples", "tensorboard"
PICTURES, PICTURE_STEPS = 36, 20


class RunFolder:
    """Claims `path` for a configuration. Only the `main` process writes; all read.

    Raises ValueError where the folder holds a run of another configuration, or one that cannot be read.
    """

    def __init__(self, path: Path, config: TrainConfig, main: bool = True):
        self.path, self.config, self.main = path, config, main
        path.mkdir(parents=True, exist_ok=True)
        file = path / CONFIG
        if file.exists():
            try:
                theirs = from_dict(TrainConfig, versioned(json.loads(file.read_text()), str(file)), str(file))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} is not readable: {error}") from error
            if theirs != config:
                differing = [k for k, v in vars(config).items() if getattr(theirs, k) != v]
                raise ValueError(f"{path} holds a run with another {', '.join(differing)}; choose another folder")
        self._board = None
        if main:
            write_json(file, {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)})

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and numbers of the last checkpoint, if there is one. Raises ValueError for a damaged one."""
        file = self.path / STATE
        return checkpoint.read_tensors(file) if file.exists() else None

    def save(self, state: dict[str, Tensor], numbers: dict[str, Any], average: Model) -> None:
        """Both files whole or as they were. Raises FloatingPointError, with nothing written, where a value is not
        finite."""
        if not self.main:
            return
        broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
        if broken:
            raise FloatingPointError(
                f"{', '.join(broken[:3])} hold NaN or infinity at step {numbers['step']}; the last checkpoint is kept"
            )
        checkpoint.write_tensors(self.path / STATE, state, numbers)
        notes = {"train": dataclasses.asdict(self.config), **numbers, "seconds": round(numbers["seconds"])}
        checkpoint.save(average, self.path / MODEL, notes)

    def start_logs(self, step: int) -> None:
        """Logs go on from `step`; rows of updates that were lost to a kill, and will be made again, are dropped."""
        if not self.main:
            return
        file = self.path / LOG
        if file.exists():
            rows = file.read_text().split("\n")[:-1]  # a row without its end was being written
            kept = [row for row in rows if json.loads(row)["step"] <= step]
            file.write_text("".join(row + "\n" for row in kept))
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard = true needs it: pip install 'adadiff_kernels[tensorboard]'") from error
            self._board = SummaryWriter(self.path / TENSORBOARD, purge_step=step + 1)

    def log(self, step: int, row: dict[str, Any]) -> None:
        """row: numbers, or lists of one number per layer."""
        if not self.main:
            return
        with open(self.path / LOG, "a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        if self._board is not None:
            for name, value in row.items():
                for tag, number in _by_layer(name, value):
                    self._board.add_scalar(tag, number, step)

    def draw(self, step: int, model: Model) -> None:
        """A grid of the model's pictures, seeds 0, 1, ... and all classes in turn, full depth."""
        if not self.main:
            return
        classes = model.config.classes
        labels = [i % classes for i in range(PICTURES)] if classes else None
        images, _ = sample(model, PICTURES, steps=PICTURE_STEPS, class_labels=labels)
        if not bool(images.isfinite().all()):
            return  # weights so far off, early on, that there is nothing to see
        folder = self.path / SAMPLES
        folder.mkdir(exist_ok=True)
        write_png(folder / f"{step:08d}.png", make_grid([to_pixels(image) for image in images]))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _by_layer(name: str, value: float | list[float]) -> list[tuple[str, float]]:
    if isinstance(value, list):
        return [(f"{name}/{layer:02d}", number) for layer, number in enumerate(value, start=1)]
    return [(name, value)]
