"""Results of a calibration's runs, kept in a folder, so that an interrupted calibration goes on where it stopped."""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..reading import read_json
from ..writing import drop_parts, replace_file

IDENTITY = "identity.json"
SUFFIX = ".safetensors"


def number(value: float) -> Tensor:
    """A number as a result: float64, which holds it exactly."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


class KeptRuns:
    """Results by name. folder: None keeps nothing; else it is made with the first result.

    identity: all that decides the results, as values of JSON; the same identity has the same runs. Raises ValueError
    for a folder that no calibration made, and for one of another identity; force: drops the runs of the latter.
    """

    def __init__(
        self, folder: Path | None = None, identity: Mapping[str, object] | None = None, force: bool = False
    ) -> None:
        self.folder, self._identity, self._keeps = folder, json.loads(json.dumps(identity or {})), True
        if folder is None or not folder.exists():
            return
        if folder.is_symlink() or not folder.is_dir():
            raise ValueError(f"cannot keep runs in {folder}: it is no folder")
        drop_parts(folder, rf"{re.escape(IDENTITY)}|.*{re.escape(SUFFIX)}")
        if not any(folder.iterdir()):
            return
        if not (folder / IDENTITY).exists():
            raise ValueError(f"{folder} holds no runs of a calibration; rename it")
        if differing := self._differing(folder / IDENTITY):
            if not force:
                raise ValueError(
                    f"{folder} holds runs with another {', '.join(differing)}; give --force to drop them, or name "
                    "another --out"
                )
            self.drop()

    def _differing(self, file: Path) -> list[str]:
        """Names of values that differ from those in the file."""
        try:
            theirs = read_json(file)
        except ValueError:
            theirs = None
        known = theirs if isinstance(theirs, dict) else {}
        return [name for name in {**self._identity, **known} if known.get(name) != self._identity.get(name)]

    @property
    def count(self) -> int:
        """The number of results in the folder."""
        return len(self._files())

    def run(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The result `name`, made by `make` unless it is kept; tensors on the CPU. One in a damaged file is made
        again. If one cannot be written, a warning says so, and no more are kept."""
        file = None if self.folder is None else self.folder / f"{name}{SUFFIX}"
        if file is not None and file.exists():
            with suppress(ValueError, OSError):
                tensors, notes = checkpoint.read_tensors(file)
                if notes.get("crc32") == checkpoint.checksum(tensors):
                    return tensors
        made = {key: value.cpu() for key, value in make().items()}
        if file is not None and self._keeps:
            try:
                self._write(file, made)
            except OSError as error:  # such as a full disk, which must not end the calibration
                warnings.warn(f"runs are not kept from now on: {error}", stacklevel=2)
                self._keeps = False
                with suppress(OSError):
                    file.parent.rmdir()  # if it is empty
        return made

    def _write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        file.parent.mkdir(exist_ok=True)
        if not (identity := file.parent / IDENTITY).exists():
            text = json.dumps(self._identity, indent=2) + "\n"
            replace_file(identity, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        checkpoint.write_tensors(file, tensors, {"crc32": checkpoint.checksum(tensors)})

    def drop(self) -> None:
        """Removes the results, and the folder unless it holds other files."""
        if self.folder is None or not self.folder.is_dir():
            return
        for file in (*self._files(), self.folder / IDENTITY):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob(f"*{SUFFIX}"))
