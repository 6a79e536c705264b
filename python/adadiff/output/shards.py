"""Files of a folder of shards, and how to read them.

Shard i holds `shard` slots from i * shard on. Each is a separate sampling run, so its bits depend neither on the number
of processes, nor on which one draws it, nor on interruptions. Files are renamed to their final names when complete.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import from_dict
from ..data.numpy_files import read_npz
from ..model import Model
from ..reading import read_json
from ..sampling.sample_batch import whole
from .pictures import ADVICE, CHANNELS

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
COUNTS = ("macs", "macs_full", "rows_moved", "seconds")  # of a Report, kept with each shard
SHARD = re.compile(r"shard-(\d{5,})\.npz")
DTYPES = {"images": "uint8", "latents": "float32"}
MOST_SAMPLES = 10**7
PER_SHARD = 1000  # default number of samples in a shard


@dataclass(frozen=True)
class Manifest:
    """Content of a folder. configuration: the request, with `n` samples, `shard` of them in each shard. array:
    "images", uint8 [k, H, W, C], or "latents", float32 [k, C, H, W]; shape: of one of them. num_layers: blocks of the
    network. Raises ValueError for invalid values."""

    configuration: dict[str, Any]
    array: str
    shape: list[int]
    num_layers: int
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        whole("n", self.configuration.get("n"), 0, MOST_SAMPLES)
        whole("shard", self.configuration.get("shard"), 1)
        whole("num_layers", self.num_layers, 1)
        if self.array not in DTYPES:
            raise ValueError(f"array must be one of {', '.join(DTYPES)}, got {self.array!r}")
        if type(self.shape) is not list or len(self.shape) != 3:
            raise ValueError(f"shape must be three sizes, got {self.shape!r}")
        for size in self.shape:
            whole("shape", size, 1)

    @staticmethod
    def of(model: Model, configuration: dict[str, Any]) -> "Manifest":
        """The manifest for samples of `model`. configuration: must survive JSON unchanged."""
        channels, height, width = model.backbone.sample_shape
        if channels in CHANNELS:
            return Manifest(configuration, "images", [height, width, channels], model.num_layers)
        return Manifest(configuration, "latents", [channels, height, width], model.num_layers)

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Reads manifest.json. Raises ValueError if it is missing, invalid or of another format version."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} holds no {MANIFEST}")
        try:
            values: Any = read_json(path)
            version = values.get("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"its format version is {version!r}, this release reads {FORMAT_VERSION}")
            return from_dict(Manifest, values, MANIFEST)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no manifest that `adadiff sample` can use: {error}; {ADVICE}") from None

    @property
    def n(self) -> int:
        return self.configuration["n"]

    @property
    def shard(self) -> int:
        return self.configuration["shard"]

    @property
    def dtype(self) -> str:
        return DTYPES[self.array]

    @property
    def shards(self) -> int:
        return -(-self.n // self.shard)

    def slots(self, number: int) -> range:
        return range(number * self.shard, min(self.n, (number + 1) * self.shard))

    def differing(self, other: "Manifest") -> list[str]:
        ours, theirs = ({**dataclasses.asdict(m), **m.configuration, "configuration": None} for m in (self, other))
        return [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]


def read(folder: str | Path) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over the shards of a finished folder in slot order. The arrays of a shard:

    `images` uint8 [k, H, W, C] or `latents` float32 [k, C, H, W]; `slots`, `seeds` int64 [k]; `labels` int64 [k], if
    there are labels; `exit_layer` uint8 [steps, k, 2] as in `Report`; and its `macs`, `macs_full`, `rows_moved` and
    `seconds`. Raises ValueError at once if shards are missing, and for a damaged shard when it is read.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    found = present(folder, manifest)
    if missing := manifest.shards - len(found):
        first = shard_path(folder, next(i for i in range(manifest.shards) if i not in found)).name
        some = f"{missing} of {manifest.shards} shards, the first of them {first}"
        raise ValueError(f"{folder} lacks {some}; the command that began it draws them")
    return (read_shard(folder, manifest, i) for i in range(manifest.shards))


def present(folder: Path, manifest: Manifest) -> set[int]:
    """Numbers of the existing shards. Takes time in proportion to the files, however many shards the manifest has."""
    found = {int(name[1]) for entry in os.scandir(folder) if (name := SHARD.fullmatch(entry.name))}
    return {number for number in found if number < manifest.shards and shard_path(folder, number).exists()}


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npz"


def read_shard(folder: Path, manifest: Manifest, number: int) -> dict[str, np.ndarray]:
    """Arrays of a shard, see `read`. Raises ValueError if it is damaged or does not fit the manifest."""
    path, slots = shard_path(folder, number), manifest.slots(number)
    arrays = read_arrays(path)
    k, steps = len(slots), np.shape(arrays.get("exit_layer"))[:1]
    expected = {
        manifest.array: (manifest.dtype, (k, *manifest.shape)),
        "exit_layer": ("uint8", (*steps, k, 2)),
        **{name: ("float64" if name == "seconds" else "int64", ()) for name in COUNTS},
        **dict.fromkeys(("slots", "seeds", "labels"), ("int64", (k,))),
    }
    if manifest.configuration.get("class_labels") is None:
        del expected["labels"]
    found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    if found != expected or not np.array_equal(arrays["slots"], slots):
        raise ValueError(
            f"{path} is damaged: it does not hold the slots {slots.start} to {slots.stop - 1} as it should"
        )
    return arrays


def read_arrays(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of these names, or all, see `read_npz`."""
    return read_npz(path, names)
