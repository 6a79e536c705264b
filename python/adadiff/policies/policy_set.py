"""The policies of the samples in flight."""

import dataclasses
from typing import Generic, TypeVar

import numpy as np

from . import calibrated, exits
from .interface import ExitPolicy
from .reuse import ReusePolicy

Kind = TypeVar("Kind", ExitPolicy, ReusePolicy)

# These read thresholds from the context only, so policies that differ in nothing else are evaluated together. A user's
# policy may read `self.threshold`, so two of them are merged only if they are equal.
_MERGED = {
    *(exits.Full, exits.Threshold, exits.Patience, exits.BatchMean, exits.Depth, exits.Replay),
    *(calibrated.CalibratedThresholds, calibrated.CalibratedDepths),
}


class PolicySet(Generic[Kind]):
    """The policies in use, without duplicates (policies of one `_kind`)."""

    def __init__(self) -> None:
        self._index: dict[object, int] = {}
        self.kinds: list[Kind] = []

    def __len__(self) -> int:
        return len(self.kinds)

    def add(self, policy: Kind) -> int:
        """Adds a policy if its kind is new. Returns the index of its kind."""
        kind = _kind(policy)
        if kind not in self._index:
            self.kinds.append(policy)
            self._index[kind] = len(self.kinds) - 1
        return self._index[kind]

    def keep(self, used: np.ndarray) -> np.ndarray:
        """Drops all kinds but those in used: int64 [n]. Returns their new indices, int64 [n]."""
        kept, index = np.unique(used, return_inverse=True)
        self.kinds = [self.kinds[i] for i in kept]
        self._index = {_kind(policy): i for i, policy in enumerate(self.kinds)}
        return index


def _kind(policy: ExitPolicy | ReusePolicy) -> object:
    if type(policy) in _MERGED:
        settings = (getattr(policy, field.name) for field in dataclasses.fields(policy) if field.name != "threshold")
        return type(policy), *settings
    try:
        hash(policy)
    except TypeError:  # defines == but no hash
        return id(policy)
    return policy
