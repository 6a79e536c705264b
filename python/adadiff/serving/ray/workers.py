"""Code that runs in Ray's workers: an actor that draws shards, and a check of the machine."""

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

PACKAGES = ("adadiff_kernels", "torch")  # packages whose versions may change samples
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
    """Why this machine cannot draw for the driver, or None. expected: the driver's `versions`."""
    for name, found in versions().items():
        if found != expected[name]:
            return f"it has {name} {found}, and this machine {expected[name]}: samples could differ between machines"
    return fault_of_files(files)


class Drawer:
    """An actor. It loads the networks once; each call draws a shard in a separate sampling run.

    Shards do not share an engine, because their bits would depend on what else is in flight (unless batch-invariant),
    and their costs could not be separated. Failures of samples are returned as text, because Ray would retry a shard
    whose call raises.
    """

    def __init__(self, asked: Asked, manifest: Manifest, texts: Texts | None, files: Mapping[str, str]):
        if (wrong := fault_of_files(files)) is not None:  # Ray may start an actor on a machine that joined later
            raise ValueError(wrong)
        self._asked, self._manifest, self._texts = asked, manifest, texts
        self._networks = asked.load()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """batch: `shard`, int64 [1]. Returns a row with `shard`; `npz`, bytes of the shard's arrays, or `error`, a
        message, with `kind`, the type of exception; and `blocks` and `passes` as in `Report`."""
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
    """The exception for an `error` of a `Drawer`."""
    return FAILURES.get(kind, ValueError)(error)
