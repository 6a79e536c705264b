"""Compaction around one block: gathers the rows of its arguments that run, and writes its output back in place.

B lanes; a block's hidden states have R = B * r rows, lane by lane ([lane 0's r rows, lane 1's, ...]); mostly r = 1.
"""

import enum
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import Family

# Names of position tables: often [S, D], shared by all lanes, where S may equal the number of rows by chance.
TABLE = re.compile(r"(?:^|[_.])(?:rotary|rope|freqs?|pos|positions?|positional|cos|sin)(?:$|[_.])")
PLAIN = (type(None), bool, int, float, str, bytes, complex, torch.dtype, torch.device, torch.Size, enum.Enum)


def version(value: Tensor) -> int | None:
    """PyTorch's count of in-place changes; None for inference tensors, which do not count them."""
    return None if value.is_inference() else value._version


def counted() -> AbstractContextManager:
    """Tensors created in this context count in-place changes, even if the caller is in inference mode."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@dataclass(frozen=True)
class Held:
    """A block's input that is read again after the block has run. version: at the time; None for a copy."""

    value: Tensor
    version: int | None = None

    @staticmethod
    def of(value: Tensor, stays: bool) -> "Held":
        """Holds `value`. stays: no in-place change is expected, so no copy is needed if changes are counted."""
        now = version(value) if stays else None
        return Held(value if now is not None else value.clone(), now)

    def get(self) -> Tensor:
        """The value. Raises ValueError if it was changed in place."""
        if self.version is not None and self.version != version(self.value):
            raise ValueError("inputs of its blocks were changed in place, unlike at its first call")
        return self.value


class Rows:
    """The running lanes, of B, and their rows in tensors of several layouts. lanes: int64 [n], on the CPU. views:
    contiguous rows are taken as views, not copies."""

    def __init__(self, lanes: Tensor, B: int, views: bool = True):
        self.lanes, self.B, self._made = lanes, B, dict[tuple[int, bool, torch.device], Tensor]()
        together = len(lanes) > 0 and bool((lanes.diff() == 1).all())
        self._start = int(lanes[0]) if views and together else None

    def index(self, repeat: int, paired: bool, device: torch.device) -> Tensor:
        """int64 [n * repeat]: the rows of the running lanes, with `repeat` rows per lane. paired: rows are ordered
        [k * B] (all lanes k times) instead of lane by lane."""
        key = repeat, paired, device
        if key not in self._made:
            lanes, copies = self.lanes, torch.arange(repeat, device="cpu")
            index = copies[:, None] * self.B + lanes if paired else lanes[:, None] * repeat + copies
            self._made[key] = index.flatten().to(device)
        return self._made[key]

    def take(self, value: Tensor, dim: int, repeat: int, paired: bool = False) -> Tensor:
        """The running rows of `value`; a view if they are contiguous."""
        if self._start is not None and dim == 0 and not paired:
            return value.narrow(0, self._start * repeat, len(self.lanes) * repeat)
        return value.index_select(dim, self.index(repeat, paired, value.device))

    def put(self, full: Tensor, dim: int, compact: Tensor) -> None:
        """Writes compact, the running rows, into `full`."""
        repeat = full.shape[dim] // self.B
        if self._start is not None and dim == 0:
            full.narrow(0, self._start * repeat, len(compact)).copy_(compact)
        else:
            full.index_copy_(dim, self.index(repeat, False, full.device), compact)


class Gather:
    """Gathers the running rows of arguments, once per tensor, even if several blocks take it."""

    def __init__(self, rows: Rows, family: Family):
        self._rows, self._family = rows, family
        self._made: dict[int, tuple[Tensor, int, int, Tensor, int | None]] = {}

    def arguments(self, named: Mapping[str, Any], R: int) -> dict[str, Any]:
        return {name: self._take(value, name, R) for name, value in named.items()}

    def give(self, full: Tensor, compact: Tensor, dim: int) -> None:
        """Registers compact, the running rows of `full`: blocks called with `full` get them unless it was changed."""
        self._keep(full, dim, compact)

    def _take(self, value: Any, name: str, R: int) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, name, R)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._take(one, name, R) for one in value))
        if isinstance(value, tuple | list):
            return type(value)(self._take(one, name, R) for one in value)
        if isinstance(value, Mapping):
            return {key: self._take(one, f"{name}.{key}", R) for key, one in value.items()}
        if isinstance(value, PLAIN):
            return value
        raise ValueError(f"a block takes {name}: {type(value).__name__}, which cannot be split by sample")

    def _tensor(self, value: Tensor, name: str, R: int) -> Tensor:
        found = self.layout(value, name, R)
        if found is None:
            return value
        dim, repeat, paired = found
        kept = self._made.get(id(value))
        if kept is not None and kept[1:3] == (version(value), dim) and kept[4] == version(kept[3]):
            return kept[3]
        with counted():
            compact = self._rows.take(value, dim, repeat, paired)
        self._keep(value, dim, compact)
        return compact

    def _keep(self, value: Tensor, dim: int, compact: Tensor) -> None:
        now = version(value)
        if now is not None:
            self._made[id(value)] = value, now, dim, compact, version(compact)

    def layout(self, value: Tensor, name: str, R: int) -> tuple[int, int, bool] | None:
        """(dimension, repeats, paired) of a tensor by lane; None for one that all lanes share."""
        B, family, part = self._rows.B, self._family, name.partition(".")[0]
        if value.ndim == 0 or part in family.shared:
            return None
        if value.ndim <= 2 and (value.is_floating_point() or value.is_complex()) and TABLE.search(name):
            return None
        if part in family.paired and value.shape[0] % B == 0:
            return 0, value.shape[0] // B, True
        dim = family.batch_dim if value.ndim > 2 else 0
        if value.shape[dim] == R:
            return dim, R // B, False
        return (0, 1, False) if value.shape[0] == B else None


def mark_dynamic(named: Mapping[str, Any], rows: Rows, family: Family, R: int) -> None:
    """Marks the rows of tensors by lane as dynamic for a compiled block, since their number changes between calls."""
    gather = Gather(rows, family)
    for name, value in named.items():
        found = gather.layout(value, name, R) if isinstance(value, Tensor) else None
        if found is not None:
            torch._dynamo.maybe_mark_dynamic(value, found[0])
