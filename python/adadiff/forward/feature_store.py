"""What lanes keep of the network from one of their steps to the next, for policies that reuse.

An entry is one lane's: a sample's conditional half, or its unconditional one. Values are by entry and by name, such as
"rest". Memory is made when the first sample needs it, and grows with the samples in flight.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import upload

SPARE = 8  # one entry in so many is made beyond those that are needed, so that not every sample makes the store anew
NEVER = -1  # of `made`: the entry has not been written since it was taken


class Kind(NamedTuple):
    """Of one entry's value."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


# Every entry has these. made: the lane's step that wrote the entry last, NEVER before; network: which network that ran.
ALWAYS = {"made": Kind((), torch.int64), "network": Kind((), torch.int64)}


def entry_bytes(kinds: Mapping[str, Kind]) -> int:
    """Of one entry that holds `kinds`, and its part of those to spare."""
    each = sum(kind.bytes for kind in {**ALWAYS, **kinds}.values())
    return each + -(-each // SPARE)


class StoreUpdate(NamedTuple):
    """What one forward pass writes, once the tick is complete. entries: int64 [k], on the device, none twice; values:
    by name, [k, ...]. then: called once they are written."""

    entries: Tensor
    values: Mapping[str, Tensor]
    then: Callable[[], None] = lambda: None


class Book(Protocol):
    """What the host knows of entries beside the store."""

    def forget(self, entries: np.ndarray) -> None:
        """entries: int64 [k], which other lanes take now."""


class FeatureStore:
    """values: by name, [entries, ...] on `device`. What an entry holds before it is written is undefined, but `made`.
    book: told who takes entries; None: there is none.

    A forward pass reads; it returns a `StoreUpdate`, which `write` applies, so that a pass that is made again finds
    everything as it was. What a sample leaves behind in an entry is forgotten when another one takes it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.values: dict[str, Tensor] = {}
        self.book: Book | None = None
        self._kinds: dict[str, Kind] = dict(ALWAYS)
        self._size = 0
        self._free: list[int] = []

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    @property
    def taken(self) -> int:
        """Entries in use."""
        return self._size - len(self._free)

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())

    @torch.inference_mode(False)  # whatever mode the caller is in, another thread may write
    def take(self, n: int, kinds: Mapping[str, Kind]) -> np.ndarray:
        """Entries for n lanes that keep `kinds`, int64 [n]; nothing is written in them.

        Changes nothing where memory runs out. ValueError for a name that is known with another shape or dtype.
        """
        self._reserve(n, kinds)
        entries = np.array(self._free[len(self._free) - n :][::-1], dtype=np.int64)
        self.values["made"][upload(torch.from_numpy(entries), self.device)] = NEVER
        if self.book is not None:
            self.book.forget(entries)
        del self._free[len(self._free) - n :]
        return entries

    def give_back(self, entries: np.ndarray) -> None:
        """Entries that no lane uses any more: int64 [k]."""
        self._free.extend(entries.tolist())

    def write(self, update: StoreUpdate) -> None:
        for name, rows in update.values.items():
            self.values[name].index_copy_(0, update.entries, rows)
        update.then()

    def _reserve(self, n: int, kinds: Mapping[str, Kind]) -> None:
        """Room for n more entries, and for `kinds` in all of them."""
        for name, kind in kinds.items():
            if self._kinds.get(name, kind) != kind:
                raise ValueError(f"{name!r} is kept as {self._kinds[name]} already, which is not {kind}")
        wanted, size = self._kinds | dict(kinds), self._size
        if n > len(self._free):
            size = max(self.taken + n, self._size + self._size // SPARE)
        fresh: dict[str, Tensor] = {}
        for name, kind in wanted.items():
            if name in self.values and size == self._size:
                continue
            fresh[name] = torch.empty(size, *kind.shape, dtype=kind.dtype, device=self.device)
            if name in self.values:
                fresh[name][: self._size] = self.values[name]
        self.values |= fresh
        self._free[:0] = range(self._size, size)[::-1]
        self._kinds, self._size = wanted, size
