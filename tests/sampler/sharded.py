"""One folder of shards for the tests: how it is drawn, and what of it must be equal."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sampler.shell import run

# Eleven samples in shards of 4, the last of 3; in a shard three at a time, in runs of 3 and 4 steps.
SETTINGS = "--steps 3,4 --solver ddim:0.5 --seed 5 --class-labels 0,7,2 --guidance-scale 2.5 --tied --batch 3"


def line(model: str, out: Path, more: str = "") -> str:
    return f"sample {model} --out {out} --n 11 --shard 4 --format npz --policy exit:0.4 {SETTINGS} {more}"


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def content(folder: Path) -> dict[str, object]:
    """All that is promised to be equal: files but for the seconds in them."""
    values = {path.name: load(path) if path.suffix == ".npz" else path.read_bytes() for path in folder.iterdir()}
    for name, value in values.items():
        if name.endswith(".npz"):
            assert value.pop("seconds") > 0
    values["report.json"] = {k: v for k, v in json.loads(values["report.json"]).items() if k != "seconds"}
    return values


def assert_equal(folder: Path, other: Path) -> None:
    np.testing.assert_equal(content(folder), content(other))


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


@pytest.fixture(scope="module")
def whole(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(line(tiny, folder)) == 0
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))
