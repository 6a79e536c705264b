"""The features that lanes cache from one step to the next, for reuse policies.

One entry belongs to one lane: a sample's conditional or unconditional half. Values are stored by name, such as "rest",
and by entry. Memory is allocated when the first sample needs it, and grows with the samples in flight.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import upload

SPARE = 8  # the store grows by 1/8 at least, so that not every new sample reallocates it
NEVER = -1  # value of `made`: the entry has not been written since it was taken


class Kind(NamedTuple):
    """Shape and dtype of a value of one entry."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


# Every entry has these. made: the step that last wrote the entry, or NEVER; network: the network that ran in it.
ALWAYS = {"made": Kind((), torch.int64), "network": Kind((), torch.int64)}


def entry_bytes(kinds: Mapping[str, Kind]) -> int:
    """Bytes of one entry that holds `kinds`, including its share of spare entries."""
    each = sum(kind.bytes for kind in {**ALWAYS, **kinds}.values())
    return each + -(-each // SPARE)


class StoreUpdate(NamedTuple):
    """What one forward pass writes to the store once its tick is complete. entries: int64 [k], on the device, all
    different; values: by name, [k, ...]. then: called after the values are written."""

    entries: Tensor
    values: Mapping[str, Tensor]
    then: Callable[[], None] = lambda: None


class Book(Protocol):
    """What the host records about entries."""

    def forget(self, entries: np.ndarray) -> None:
        """Clears entries: int64 [k], which are given to other lanes."""


class FeatureStore:
    """values: by name, [entries, ...] on `device`; undefined before the first write, except `made`. book: notified when
    entries are given to lanes, or None.

    A forward pass only reads the store and returns a `StoreUpdate`, which `write` applies, so that a pass can be
    repeated. Taking an entry clears what an earlier sample left in it.
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

    @torch.inference_mode(False)  # a thread in another mode may write later
    def take(self, n: int, kinds: Mapping[str, Kind]) -> np.ndarray:
        """Allocates entries, int64 [n], for n lanes that store `kinds`; they are unwritten.

        Changes nothing if memory runs out. Raises ValueError for a name already in use with another shape or dtype.
        """
        self._reserve(n, kinds)
        entries = np.array(self._free[len(self._free) - n :][::-1], dtype=np.int64)
        self.values["made"][upload(torch.from_numpy(entries), self.device)] = NEVER
        if self.book is not None:
            self.book.forget(entries)
        del self._free[len(self._free) - n :]
        return entries

    def give_back(self, entries: np.ndarray) -> None:
        """Frees entries: int64 [k]."""
        self._free.extend(entries.tolist())

    def write(self, update: StoreUpdate) -> None:
        for name, rows in update.values.items():
            self.values[name].index_copy_(0, update.entries, rows)
        update.then()

    def _reserve(self, n: int, kinds: Mapping[str, Kind]) -> None:
        """Makes room for n more entries, and for `kinds` in all entries."""
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
