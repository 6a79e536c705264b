"""What a forward pass is told about lanes that may reuse what an earlier step of theirs has computed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from adadiff_kernels import upload

from ..policies.reuse import ReusePolicy
from .feature_store import NEVER, FeatureStore

NONE = -1  # of `index`: a lane that follows no policy of reuse


@dataclass(frozen=True)
class ReuseLanes:
    """B lanes; int64 [B] each, on the CPU. index: of each lane's policy among `policies`, NONE where it has none.

    entry: of the store, where index is not NONE. step: of the sample, from 0; steps_left: how many follow this one.
    network: by a number that stays, which network the lane runs now.
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
        """Some lane follows a policy."""
        return bool((self.index != NONE).any())

    def take(self, lanes: Tensor) -> "ReuseLanes":
        """Those at lanes: int64 [k], on the CPU."""
        names = ("index", "entry", "step", "steps_left", "network")
        return replace(self, **{name: getattr(self, name)[lanes] for name in names})

    def without(self, refused: Sequence[bool]) -> "ReuseLanes":
        """Lanes of policies k with refused[k] reuse nothing."""
        if not any(refused):
            return self
        of_none = torch.tensor([*refused, True], dtype=torch.bool, device="cpu")[self.index]  # NONE is the last
        return replace(self, index=self.index.masked_fill(of_none, NONE))


class LaneEntries:
    """`ReuseLanes` on the device, with what the store knows of each lane. int64 [B]: index, entry (0 where a lane has
    none), step, steps_left, network, age (steps since the entry was written, at least 1). bool [B]: valid, there is
    something to reuse, which the same network has made."""

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
    """Once for a process."""
    logging.getLogger("adadiff").warning(
        "runner='captured': forward passes in which a sample reuses earlier steps are run eagerly"
    )
