"""A first-block cache with one threshold per step, chosen for a budget by `adadiff.calibrate`."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor
from torch import tensor as make_tensor

from .reuse import GATES, ORDERS, ReuseContext, ReusePolicy

FORMAT, FORMAT_VERSION = "adadiff cache thresholds", 1
SAME_TIME = 0.01  # relative to the largest time: more than rounding, less than another resolution's shift


@dataclass(frozen=True)
class HeldOut:
    """A calibrated cache measured on held-out prompts. share: of the blocks that ran. error: mean over prompts of
    |x - x_full| / |x_full|, x the final latents (or images); low, high: its 95 % interval. prompts: their number, each
    drawn once."""

    share: float
    error: float
    low: float
    high: float
    prompts: int


@dataclass(frozen=True)
class CalibratedCache(ReusePolicy):
    """A lane reuses at step s where the gate's change is at most `thresholds[s]`; a negative threshold means never.

    t: the network's time at each step, as the pipeline passes it. budget: the intended share of the blocks.
    Thresholds are valid for one setting: transformer, scheduler: their class names; blocks: of the transformer; tied:
    whether the halves of a guided sample decide together.
    Raises ValueError for fields of the wrong kind, and when called in a run with other steps or times.
    """

    thresholds: tuple[float, ...]
    t: tuple[float, ...]
    transformer: str
    blocks: int
    scheduler: str
    budget: float
    held_out: HeldOut | None = None
    first: int = 1
    last: int = 0
    gate: str = "residual"
    order: int = 0
    tied: bool = False

    def __post_init__(self) -> None:
        if len(self.thresholds) != len(self.t) or len(self.t) < 2:
            raise ValueError(f"thresholds and times of 2 steps or more, got {len(self.thresholds)} and {len(self.t)}")
        for name in ("thresholds", "t"):
            values = getattr(self, name)
            if not all(isinstance(v, float | int) and not isinstance(v, bool) and math.isfinite(v) for v in values):
                raise ValueError(f"{name} must be finite numbers")
        for name, least in (("first", 1), ("last", 0), ("blocks", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")
        if not isinstance(self.budget, float | int) or not 0 < self.budget <= 1:
            raise ValueError(f"budget must be a share in (0, 1], got {self.budget!r}")
        if self.gate not in GATES or not isinstance(self.tied, bool):
            raise ValueError(f"gate must be one of {', '.join(GATES)} and tied a bool")
        if type(self.order) is not int or self.order not in ORDERS:
            raise ValueError(f"order must be 0 or 1, got {self.order!r}")

    @property
    def needs_steps_left(self) -> bool:
        return True

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        assert change is not None
        assert context.steps_left is not None
        steps = context.step + context.steps_left + 1
        if bool((steps != len(self.t)).any()):
            raise ValueError(f"{self} is for {len(self.t)} steps, this run has {int(steps[0])}; calibrate for those")
        wanted = make_tensor(self.t, dtype=context.t.dtype, device=context.t.device)[context.step]
        if bool(((context.t - wanted).abs() > SAME_TIME * max(map(abs, self.t))).any()):
            raise ValueError(
                f"{self} is for time {float(wanted[0]):g} at step {int(context.step[0])}, this run has "
                f"{float(context.t[0]):g}: another scheduler or size; calibrate for it"
            )
        return change <= make_tensor(self.thresholds, dtype=change.dtype, device=change.device)[context.step]

    def __str__(self) -> str:
        return f"cache:budget={self.budget:g}"

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "CalibratedCache":
        """Reads the text of `to_json`. Raises ValueError for anything else."""
        try:
            read = json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is no JSON: {error}") from None
        if not isinstance(read, dict) or read.pop("format", None) != FORMAT:
            raise ValueError(f"it does not hold {FORMAT!r}; `adadiff.calibrate` writes such files")
        if (version := read.pop("format_version", None)) != FORMAT_VERSION:
            raise ValueError(f"it has format version {version}, this adadiff reads {FORMAT_VERSION}")
        try:
            held_out = read.pop("held_out", None)
            return CalibratedCache(**_tuples(read), held_out=None if held_out is None else HeldOut(**held_out))
        except TypeError as error:  # a field too many, one missing, or of another kind
            raise ValueError(f"its fields are not those of such a file: {error}") from None


def _tuples(read: dict[str, Any]) -> dict[str, Any]:
    named = {field.name for field in fields(CalibratedCache)}
    if read.keys() - named:
        raise ValueError(f"it has unknown fields {', '.join(sorted(read.keys() - named))}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in read.items()}
