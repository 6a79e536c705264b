"""Input of a forward pass for lanes that may reuse features of their earlier steps."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from adadiff_kernels import upload

from ..policies.reuse import ReusePolicy
from .feature_store import NEVER, FeatureStore

NONE = -1  # value of `index` for a lane without a reuse policy


@dataclass(frozen=True)
class ReuseLanes:
    """B lanes; all tensors int64 [B], on the CPU. index: each lane's policy in `policies`, or NONE.

    entry: the lane's entry in `store`, where index is not NONE. step: the sample's step, from 0; steps_left: the number
    of steps after this one. network: a fixed number for the network that the lane runs now.
    """

    policies: Sequence[ReusePolicy]
    index: Tensor
    entry: Tensor
    step: Tensor
    steps_left: Tensor
    network: Tensor
    store: FeatureStore

    @cached_property
    def any(self) -> bool:
        """Whether any lane follows a reuse policy."""
        return bool((self.index != NONE).any())

    def take(self, lanes: Tensor) -> "ReuseLanes":
        """The lanes at `lanes`: int64 [k], on the CPU."""
        names = ("index", "entry", "step", "steps_left", "network")
        return replace(self, **{name: getattr(self, name)[lanes] for name in names})

    def without(self, refused: Sequence[bool]) -> "ReuseLanes":
        """A copy in which lanes of policy k reuse nothing if refused[k]."""
        if not any(refused):
            return self
        of_none = torch.tensor([*refused, True], dtype=torch.bool, device="cpu")[self.index]  # NONE is the last
        return replace(self, index=self.index.masked_fill(of_none, NONE))


class LaneEntries:
    """`ReuseLanes` on the device, with data of the store. int64 [B]: index, entry (0 if none), step, steps_left,
    network, age (steps since the entry was written, at least 1). bool [B]: valid, whether there is something to reuse,
    written by the same network."""

    def __init__(self, lanes: ReuseLanes, device: torch.device) -> None:
        given = (lanes.index, lanes.entry, lanes.step, lanes.steps_left, lanes.network)
        self.index, self.entry, self.step, self.steps_left, self.network = upload(torch.stack(given), device).unbind(0)
        self.entry = self.entry.clamp(min=0)
        made = lanes.store["made"].index_select(0, self.entry)
        same = lanes.store["network"].index_select(0, self.entry) == self.network
        self.valid = (self.index != NONE) & (made != NEVER) & same
        self.age = self.step - made


@cache
def log_not_captured() -> None:
    """Logs a warning, once per process."""
    logging.getLogger("adadiff").warning(
        "runner='captured': forward passes in which a sample reuses earlier steps are run eagerly"
    )
