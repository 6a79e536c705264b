"""What runs in Ray's workers: an actor that draws shards, and a look at the machine beforehand."""

import io
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ...output.asked import Asked, Texts
from ...output.filling import shard_arrays
from ...output.shards import Manifest
from ...sampling.faults import is_memory_error
from .planning import fault_of_files

PACKAGES = ("adadiff_kernels", "torch")  # whose versions bits depend on
FAILURES = {"ValueError": ValueError, "FloatingPointError": FloatingPointError, "MemoryError": MemoryError}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def fault(files: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """Why this machine cannot draw what the driver asks for, if it cannot."""
    for name, own in versions().items():
        if own != expected[name]:
            return f"it has {name} {own}, and this machine {expected[name]}: bits would depend on who draws them"
    return fault_of_files(files)


class Drawer:
    """An actor. It loads the networks once; each call draws a shard, by a run of the sampler of its own.

    Not by an engine that several shards share: then bits would depend on what else is in flight, unless they are
    batch-invariant, and what a shard cost could not be told. Failures of samples come back as text: raised, Ray would
    try the shard again.
    """

    def __init__(self, asked: Asked, manifest: Manifest, texts: Texts | None, files: Mapping[str, str]):
        if (wrong := fault_of_files(files)) is not None:  # Ray may start an actor on a machine that came later
            raise ValueError(wrong)
        self._asked, self._manifest, self._texts = asked, manifest, texts
        self._networks = asked.load()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """batch: `shard`, int64 [1]. Returns beside it `npz`, the arrays of the shard as bytes, or an `error` of
        `kind`; `blocks` and `passes` as in `Report`."""
        number = int(batch["shard"][0])
        row = {"shard": number, "npz": b"", "blocks": 0, "passes": 0, "kind": "", "error": ""}
        try:
            run = self._asked.run(self._networks, self._manifest.slots(number), self._texts)
            arrays = shard_arrays(self._manifest, number, run)
        except (ValueError, FloatingPointError) as error:
            row |= {"kind": type(error).__name__, "error": str(error)}
        except (MemoryError, RuntimeError) as error:  # PyTorch's allocators raise both
            if not is_memory_error(error):
                raise
            row |= {"kind": "MemoryError", "error": str(error)}
        else:
            row |= {"npz": packed(arrays), "blocks": run.report.blocks, "passes": run.report.passes}
        return {name: [value] for name, value in row.items()}


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def unpacked(npz: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(npz), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def failure(kind: str, error: str) -> Exception:
    """What a `Drawer` told of."""
    return FAILURES.get(kind, ValueError)(error)
