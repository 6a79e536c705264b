"""The folder of a training: configuration, state to resume from, averaged model, log, and samples drawn meanwhile."""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..config import from_dict
from ..model import Model
from ..output.pictures import make_grid, to_pixels, write_json, write_png
from ..reading import read_json
from ..sampling.sampler import sample
from ..writing import check_replaceable, check_space, drop_parts, replace_file, same_file
from .config import FORMAT_VERSION, TrainConfig, versioned

STATE, MODEL, LOG, CONFIG = "state.safetensors", "model.safetensors", "log.jsonl", "config.json"
SAMPLES, TENSORBOARD = "samples", "tensorboard"
PICTURES, PICTURE_STEPS = 36, 20
ADVICE = "choose another folder, or give --force to begin anew"


class RunFolder:
    """Opens `path` for a run of `config`. Only the `main` process writes; all read. Two launches must not use a folder
    at the same time: `adadiff train` locks it with `only_launch`.

    Raises ValueError if the folder holds a run of another configuration, an unreadable one, or files with these names
    that no run wrote. A run that ended before its first checkpoint does not count. force: replace all of these, and
    begin anew. `saved`: step of the last checkpoint, 0 before the first.
    """

    def __init__(self, path: Path, config: TrainConfig, main: bool = True, force: bool = False):
        self.path, self.config, self.main, self.saved = path, config, main, 0
        path.mkdir(parents=True, exist_ok=True)
        for name in (STATE, MODEL, LOG, CONFIG):
            check_replaceable(path / name)
        for name in (SAMPLES, TENSORBOARD):
            if (path / name).exists() and not (path / name).is_dir():
                raise ValueError(f"cannot write to {path / name}: it is no folder")
        if config.init and any(same_file(path / name, Path(config.init)) for name in (STATE, MODEL)):
            raise ValueError(f"cannot write {config.init}: this run begins with it; choose another folder")
        self._resumes = self._agrees(force)
        self._board = None
        if main:
            drop_parts(path, "|".join(map(re.escape, (STATE, MODEL, LOG, CONFIG))))
            if not self._resumes:
                for name in (STATE, MODEL, LOG):
                    (path / name).unlink(missing_ok=True)
            write_json(path / CONFIG, {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)})

    def _agrees(self, force: bool) -> bool:
        """Whether the folder holds a state of this configuration."""
        # Configuration before state: the main process may meanwhile remove the state, then replace the configuration.
        file = self.path / CONFIG
        try:
            if not file.exists():
                pictures = [f"{SAMPLES}/{path.name}" for path in (self.path / SAMPLES).glob("[0-9]" * 8 + ".png")]
                if found := [*(name for name in (STATE, MODEL, LOG) if (self.path / name).exists()), *pictures[:1]]:
                    raise ValueError(f"{self.path} holds {', '.join(found)} but no {CONFIG}; {ADVICE}")
                return False
            theirs = from_dict(TrainConfig, versioned(read_json(file), str(file)), str(file))
            differing = [k for k, v in vars(self.config).items() if getattr(theirs, k) != v]
            state = (self.path / STATE).exists()
            if state and not differing:
                return True
            if state or (self.path / MODEL).exists():
                what = f"a run with another {', '.join(differing)}" if differing else f"{MODEL} but no {STATE}"
                raise ValueError(f"{self.path} holds {what}; {ADVICE}")
        except ValueError:
            if not force:
                raise
        return False

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and numbers of the last checkpoint, or None. Raises ValueError for a damaged one."""
        if not self._resumes:
            return None
        tensors, numbers = checkpoint.read_tensors(self.path / STATE)
        check_state(tensors, numbers, self.config.steps, str(self.path / STATE))
        self.saved = numbers["step"]
        return tensors, numbers

    def save(self, state: dict[str, Tensor], numbers: dict[str, Any], average: Model) -> None:
        """Writes state and averaged model, each file atomically. Raises FloatingPointError, with nothing written, if a
        value of the state is not finite."""
        if not self.main:
            return
        broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
        if broken:
            raise FloatingPointError(
                f"{', '.join(broken[:3])} hold NaN or infinity at step {numbers['step']}; the last checkpoint is kept"
            )
        checkpoint.write_tensors(self.path / STATE, state, {**numbers, "crc32": checkpoint.checksum(state)})
        self.saved = numbers["step"]
        notes = {"train": dataclasses.asdict(self.config), **numbers, "seconds": round(numbers["seconds"])}
        checkpoint.save(average, self.path / MODEL, notes)

    def check_space(self, size: int) -> None:
        """OSError if the disk has no room for `size` bytes."""
        if self.main:
            check_space(self.path / STATE, size)

    def start_logs(self, step: int) -> None:
        """Opens the logs to continue after `step`. Drops rows of later steps, which a killed run logged but did not
        save, and, with a warning, damaged rows."""
        if not self.main:
            return
        file = self.path / LOG
        if file.exists():
            rows = file.read_bytes().split(b"\n")[:-1]  # an unfinished row has no line end
            steps = [_step_of(row) for row in rows]
            if damaged := [number for number, found in enumerate(steps, start=1) if found is None]:
                rows_of = "row, line" if len(damaged) == 1 else "rows, the first in line"
                warnings.warn(f"{file}: dropped {len(damaged)} damaged {rows_of} {damaged[0]}", stacklevel=2)
            kept = [row for row, found in zip(rows, steps, strict=True) if found is not None and found <= step]
            replace_file(file, lambda temporary: temporary.write_bytes(b"".join(row + b"\n" for row in kept)))
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard = true needs it: pip install 'adadiff_kernels[tensorboard]'") from error
            self._board = SummaryWriter(self.path / TENSORBOARD, purge_step=step + 1)

    def log(self, step: int, row: dict[str, Any]) -> None:
        """row: numbers, or lists with a number for each layer."""
        if not self.main:
            return
        with open(self.path / LOG, "a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        if self._board is not None:
            for name, value in row.items():
                for tag, number in _by_layer(name, value):
                    self._board.add_scalar(tag, number, step)

    def draw(self, step: int, model: Model) -> None:
        """Writes a grid of samples of the full network: seeds 0, 1, ..., all classes in turn."""
        if not self.main:
            return
        classes = model.config.classes
        labels = [i % classes for i in range(PICTURES)] if classes else None
        images, _ = sample(model, PICTURES, steps=PICTURE_STEPS, class_labels=labels)
        if not bool(images.isfinite().all()):
            return  # early in training, weights may be so far off that images overflow
        folder = self.path / SAMPLES
        folder.mkdir(exist_ok=True)
        write_png(folder / f"{step:08d}.png", make_grid([to_pixels(image) for image in images]))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def check_state(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], steps: int, file: str) -> None:
    """ValueError for a state that differs from what `RunFolder.save` wrote."""
    step: Any = numbers.get("step")
    seconds: Any = numbers.get("seconds")
    if type(step) is not int or not 0 <= step <= steps:
        raise ValueError(f"{file} is damaged: its step must be in 0..{steps}, got {step!r}")
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"{file} is damaged: its seconds must be a number >= 0, got {seconds!r}")
    if "crc32" in numbers and numbers["crc32"] != checkpoint.checksum(tensors):  # earlier releases wrote none
        raise ValueError(f"{file} is damaged: its tensors do not have the checksum that was written with them")


def _step_of(row: bytes) -> int | None:
    """The step of a row of the log; None for a damaged row."""
    try:
        step = json.loads(row)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def _by_layer(name: str, value: float | list[float]) -> list[tuple[str, float]]:
    if isinstance(value, list):
        return [(f"{name}/{layer:02d}", number) for layer, number in enumerate(value, start=1)]
    return [(name, value)]
