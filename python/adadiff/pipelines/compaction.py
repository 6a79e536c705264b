"""Compaction that is local to one block: its arguments without the rows that do not run, and its output back in place.

B lanes; a block's hidden states have R = B * r rows, lane by lane ([lane 0's r rows, lane 1's, ...]), r = 1 for most.
"""

import enum
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .families import Family

# Tables of positions are often [S, D], shared by all lanes, and S may be the number of rows by accident.
TABLE = re.compile(r"(?:^|[_.])(?:rotary|rope|freqs?|pos|positions?|positional|cos|sin)(?:$|[_.])")
PLAIN = (type(None), bool, int, float, str, bytes, complex, torch.dtype, torch.device, torch.Size, enum.Enum)


def version(value: Tensor) -> int | None:
    """None where in-place changes are not counted."""
    return None if value.is_inference() else value._version


class Rows:
    """The lanes that run, of B, and their rows in tensors of several layouts. lanes: int64 [n], on the CPU."""

    def __init__(self, lanes: Tensor, B: int):
        self.lanes, self.B, self._made = lanes, B, dict[tuple[int, bool, torch.device], Tensor]()

    def index(self, repeat: int, paired: bool, device: torch.device) -> Tensor:
        """int64 [n * repeat]. paired: [k * B] instead of lane by lane."""
        key = repeat, paired, device
        if key not in self._made:
            lanes, copies = self.lanes, torch.arange(repeat, device="cpu")
            index = copies[:, None] * self.B + lanes if paired else lanes[:, None] * repeat + copies
            self._made[key] = index.flatten().to(device)
        return self._made[key]


class Gather:
    """Takes rows out of arguments, each tensor once: what is shared by blocks is gathered for the first of them."""

    def __init__(self, rows: Rows, family: Family):
        self._rows, self._family = rows, family
        self._made: dict[int, tuple[Tensor, int, int, Tensor, int]] = {}

    def arguments(self, named: Mapping[str, Any], R: int) -> dict[str, Any]:
        return {name: self._take(value, name, R) for name, value in named.items()}

    def give(self, full: Tensor, compact: Tensor, dim: int) -> None:
        """compact: the rows of `full` that run. Blocks that are handed `full` get it, unless somebody changed it."""
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
        raise ValueError(f"a block takes {name}: {type(value).__name__}, of which nobody knows how it goes by sample")

    def _tensor(self, value: Tensor, name: str, R: int) -> Tensor:
        found = self.layout(value, name, R)
        if found is None:
            return value
        dim, repeat, paired = found
        kept = self._made.get(id(value))
        if kept is not None and kept[1:3] == (version(value), dim) and kept[4] == version(kept[3]):
            return kept[3]
        compact = value.index_select(dim, self._rows.index(repeat, paired, value.device))
        self._keep(value, dim, compact)
        return compact

    def _keep(self, value: Tensor, dim: int, compact: Tensor) -> None:
        versions = version(value), version(compact)
        if versions[0] is not None and versions[1] is not None:
            self._made[id(value)] = value, versions[0], dim, compact, versions[1]

    def layout(self, value: Tensor, name: str, R: int) -> tuple[int, int, bool] | None:
        """(dimension, repeats, paired) of a tensor that is by lane, None of a shared one."""
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
    """For a compiled block: tensors by lane may have another number of rows in the next call."""
    gather = Gather(rows, family)
    for name, value in named.items():
        found = gather.layout(value, name, R) if isinstance(value, Tensor) else None
        if found is not None:
            torch._dynamo.maybe_mark_dynamic(value, found[0])
