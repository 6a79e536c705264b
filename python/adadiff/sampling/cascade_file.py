"""The file of a cascade, written by `adadiff distill`: a student, an oracle, and default settings."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import COLUMNS

from ..checkpoint import built, read_tensors, write_tensors
from ..config import ModelConfig, from_dict
from ..diffusion.schedules import NoiseSchedule
from ..diffusion.solvers import solver_from
from ..forward.networks import Network
from ..model import Model
from ..policies.cascade import LEAST_SHARE, MODES, check_share, check_sigma
from ..weights import cast, check_weights
from .oracle import Oracle, OracleConfig

QUANTILES = 99  # 1 % to 99 %


@dataclass(frozen=True)
class CascadeSettings:
    """steps, solver: the student's. share, mode, sigma: defaults of `Cascade`. quantiles: of the oracle's scores on
    held-out images of the student, at 1 %, ..., 99 %. Raises ValueError for invalid values."""

    steps: int
    solver: str
    share: float
    mode: str
    sigma: float
    quantiles: tuple[float, ...]

    def __post_init__(self) -> None:
        if type(self.steps) is not int or not 1 <= self.steps <= 1000:
            raise ValueError(f"steps of a student must be an integer from 1 to 1000, got {self.steps!r}")
        if not isinstance(self.solver, str):
            raise ValueError(f"the solver of a student is text, got {self.solver!r}")
        solver_from(self.solver, own=False)  # from a file of others
        check_share(self.share)
        check_sigma(self.sigma)
        if self.mode not in MODES:
            raise ValueError(f"mode must be {' or '.join(MODES)}, got {self.mode!r}")
        if not isinstance(self.quantiles, Sequence) or len(self.quantiles) != QUANTILES:
            raise ValueError(f"a cascade has {QUANTILES} quantiles, those of 1 % to 99 %")
        if any(type(value) is not float for value in self.quantiles):
            raise ValueError("quantiles are numbers")
        values = np.array(self.quantiles)
        if not np.isfinite(values).all() or (np.diff(values) < 0).any():
            raise ValueError("quantiles are finite and ascend")
        object.__setattr__(self, "quantiles", tuple(self.quantiles))

    def threshold(self, share: float) -> float:
        """The score below which a share of the student's images lies, interpolated between quantiles."""
        if share in (0, 1):
            return -np.inf if share == 0 else np.inf
        shares = np.linspace(LEAST_SHARE, 1 - LEAST_SHARE, QUANTILES)
        return float(np.interp(share, shares, np.array(self.quantiles)))


@dataclass(frozen=True, eq=False)
class Student:
    """A `NetworkChoice`: the student at all times. Policies do not apply in it."""

    model: Model

    @cached_property
    def networks(self) -> tuple[Network]:
        return (Network(self.model, asks=False),)

    def choose(self, t: np.ndarray) -> np.ndarray:
        return np.ones(len(t), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class CascadeFile:
    """The content of a cascade file. student: a network without exits; oracle: float32."""

    student: Model
    oracle: Oracle
    settings: CascadeSettings

    @cached_property
    def choice(self) -> Student:
        return Student(self.student)


def write_cascade(
    path: Path, student: Model, oracle: Oracle, settings: CascadeSettings, notes: Mapping[str, object] | None = None
) -> None:
    """Writes the file atomically. Raises ValueError for weights that are not finite."""
    tensors = {f"student.{key}": value for key, value in student.state_dict().items()}
    tensors |= {f"oracle.{key}": value for key, value in oracle.state_dict().items()}
    check_weights(tensors, str(path))
    cascade = {"student": student.config.to_dict(), "oracle": oracle.config.to_dict(), **asdict(settings)}
    write_tensors(path, tensors, {"cascade": cascade, "notes": dict(notes or {})})


def read_cascade(path: Path, device: torch.device, dtype: torch.dtype) -> CascadeFile:
    """Reads a cascade file, with the student in `dtype`. Unchanged files are cached. Raises ValueError for a damaged
    file, or one without a cascade."""
    stat = os.stat(path)
    return _read(str(path), stat.st_mtime_ns, stat.st_size, device, dtype)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # callers in any mode share the weights
def _read(path: str, mtime: int, size: int, device: torch.device, dtype: torch.dtype) -> CascadeFile:
    tensors, metadata = read_tensors(Path(path))
    values = metadata.get("cascade")
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no cascade; `adadiff distill` writes one")
    try:
        config, oracle_config, settings = _described(dict(values))
    except ValueError as error:
        raise ValueError(f"cannot use {path}: {error}") from None
    check_weights(tensors, path)
    groups: dict[str, dict[str, Tensor]] = {"student": {}, "oracle": {}}
    for key, value in tensors.items():
        group, _, name = key.partition(".")
        if group not in groups:
            raise ValueError(f"{path} is no cascade: unexpected {key}")
        groups[group][name] = value
    student = built(lambda: Model(config), cast(groups["student"], dtype, path), f"the student in {path}", device)
    oracle = built(
        lambda: Oracle(oracle_config), cast(groups["oracle"], torch.float32, path), f"the oracle in {path}", device
    )
    return CascadeFile(student.eval().requires_grad_(False), oracle.eval().requires_grad_(False), settings)


def _described(values: dict[str, Any]) -> tuple[ModelConfig, OracleConfig, CascadeSettings]:
    if missing := [name for name in ("student", "oracle") if name not in values]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    config = ModelConfig.from_dict(values.pop("student"))
    oracle = from_dict(OracleConfig, values.pop("oracle"), "the oracle")
    settings = from_dict(CascadeSettings, values, "the cascade")
    if config.exits is not None:
        raise ValueError("its student has exits; a student has none")
    shape, sees = (config.network.channels, config.network.image_size), (oracle.channels, oracle.image_size)
    if shape != sees or oracle.classes not in (0, config.classes):
        raise ValueError("its oracle is for other image shapes or classes than its student draws")
    table = solver_from(settings.solver).table(NoiseSchedule(config.schedule), settings.steps)
    if bool(table.coefficients[:, COLUMNS.index("noise")].any()):
        raise ValueError(f"its student's solver {settings.solver!r} adds noise; the student needs one without, as ddim")
    return config, oracle, settings
