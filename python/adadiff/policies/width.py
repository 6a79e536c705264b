"""The width of the network by timestep (DDSM: Yang et al., ICLR 2024, arXiv 2310.03337)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from .joining import quoted


@dataclass(frozen=True)
class Width:
    """A lane at time t runs at widths[i] for the first i with t < times[i], and at widths[-1] if there is none.

    times: ascending, in the network's time, 0..1000; widths: shares of heads and MLP channels in (0, 1], one more than
    times. source: the file it was read from, for messages. network: the network it was searched for, see
    `adadiff.forward.narrow.network_of`; None: any. Spelled "width:FILE" and "width:0.5". Raises ValueError for other
    values.
    """

    times: tuple[float, ...]
    widths: tuple[float, ...]
    source: str | None = None
    network: str | None = None

    def __post_init__(self) -> None:
        numbers = (*self.times, *self.widths)
        if any(isinstance(v, bool) or not isinstance(v, Real) or not math.isfinite(v) for v in numbers):
            raise ValueError("times and widths of a width policy are finite numbers")
        if len(self.widths) != len(self.times) + 1:
            raise ValueError(f"{len(self.times)} times need {len(self.times) + 1} widths, got {len(self.widths)}")
        if list(self.times) != sorted(set(self.times)) or not all(0 <= t <= 1000 for t in self.times):
            raise ValueError(f"times must ascend within 0..1000, got {_few(self.times)}")
        if not all(0 < width <= 1 for width in self.widths):
            raise ValueError(f"widths must lie in (0, 1], got {_few(self.widths)}")

    def widths_at(self, t: np.ndarray) -> np.ndarray:
        """t: float [k], the network's times. Returns float64 [k]."""
        return np.array(self.widths)[np.searchsorted(np.array(self.times), t, side="right")]

    def __str__(self) -> str:
        if self.source is not None:
            return f"width:{quoted(self.source)}"
        return f"width:{self.widths[0]:g}" if len(self.widths) == 1 else f"width:{len(self.widths)} widths"


def _few(values: Sequence[float]) -> str:
    return f"{[float(v) for v in values[:8]]}"
