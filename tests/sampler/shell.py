"""Commands run as if typed, tiny models on disk, Ctrl-C at a chosen call, and what was written read back."""

import errno
import json
import os
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import adadiff
from adadiff import cli, writing
from adadiff.config import ModelConfig
from adadiff.models.uvit import UViTConfig
from adadiff.uem import ExitConfig
from sampler.tiny import scramble


def config(**changes: int) -> ModelConfig:
    """Three blocks, shaped like the digits."""
    network = {
        "image_size": 8,
        "channels": 1,
        "patch": 2,
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "num_classes": 11,
    }
    return ModelConfig(UViTConfig(**{**network, **changes}), "linear", null_label=10, exits=ExitConfig())


def saved(path: Path, config: ModelConfig) -> str:
    model = adadiff.Model(config)
    scramble(model, 0.15, seed=3)
    adadiff.save(model, path, {"train": {"steps": 7}})
    return str(path)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Jobs that a shell starts in the background are born deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "tiny.safetensors", config())


def run(line: str) -> int:
    return cli.main(shlex.split(line))


def interrupt_call(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> Callable[[], None]:
    """Ctrl-C just before the given call (from 1) of a method. Returns what undoes it."""
    original, calls = getattr(owner, name), []

    def method(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, method)
    return lambda: monkeypatch.setattr(owner, name, original)


def fill_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, after: int) -> None:
    """The first `after` files in the folder, or below it, are written; for others there is no room."""
    rename, done = writing._rename, []

    def renamed(temporary: Path, path: Path, force: bool) -> None:
        if folder in path.parents:
            done.append(path)
            if len(done) > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(temporary, path, force)

    monkeypatch.setattr(writing, "_rename", renamed)


def pixels(image: Tensor) -> np.ndarray:
    values = np.rint((np.clip(image.double().numpy(), -1, 1) + 1) * 127.5).astype(np.uint8)
    return values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def grid_cells(grid: np.ndarray, rows: int, columns: int) -> list[np.ndarray]:
    """Cells of 64 pixels by rows; all that is between them, 4 pixels wide, must be white."""
    assert grid.shape == (rows * 68 - 4, columns * 68 - 4)
    left = grid.copy()
    for i in range(rows * columns):
        y, x = 68 * (i // columns), 68 * (i % columns)
        left[y : y + 64, x : x + 64] = 255
    assert (left == 255).all()
    return [grid[68 * (i // columns) :, 68 * (i % columns) :][:64, :64] for i in range(rows * columns)]


def error_line(captured: str) -> str:
    """The last line, which must be all there is beside progress bars."""
    *others, last = captured.strip().splitlines()
    assert not [line for line in others if "it/s" not in line and "image" not in line and "step" not in line]
    assert last.startswith("adadiff: ")
    return last


def strict_json(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)
