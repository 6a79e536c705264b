"""What samples in flight reuse: by slot, which policy each follows and where its lanes keep what they computed."""

from dataclasses import dataclass

import numpy as np
import torch

from ..forward.branch_plan import BranchBook, reuses_branches
from ..forward.feature_store import FeatureStore, Kind
from ..forward.rest_of_network import kinds_of
from ..forward.reuse_lanes import NONE, ReuseLanes
from ..forward.structure import structure_of
from ..model import Model
from ..policies.policy_set import PolicySet
from ..policies.reuse import ReusePolicy
from .lanes import Lanes
from .network_set import NetworkSet
from .sample_batch import SampleBatch


@dataclass(frozen=True)
class Reserved:
    """For k samples that are about to begin. policy: a number, NONE without one; entry: int64 [k, 2], by half, NONE
    where a sample has no such lane."""

    policy: int
    entry: np.ndarray


class ReuseSlots:
    """By slot, of `capacity`. policy: int64 [capacity], of `policies`, NONE where a sample reuses nothing. entry:
    int64 [capacity, 2], of the store, by half. begun: int64 [capacity], the step that the sample began at."""

    def __init__(self, capacity: int, model: Model, device: torch.device) -> None:
        self._model, self.store, self.policies = model, FeatureStore(device), PolicySet[ReusePolicy]()
        self.policy = np.full(capacity, NONE, dtype=np.int64)
        self.entry = np.full((capacity, 2), NONE, dtype=np.int64)
        self.begun = np.zeros(capacity, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.policies)

    def reserve(self, samples: SampleBatch, index: np.ndarray) -> Reserved | None:
        """For samples index: int64 [k] of `samples`; None where they reuse nothing. Memory may run out here; then
        nothing has changed."""
        policy = samples.parts.reuse
        if policy is None:
            return None
        halves = np.ones((len(index), 2), dtype=bool)
        halves[:, 1] = samples.guidance.numpy()[index] != 0
        entry = np.full((len(index), 2), NONE, dtype=np.int64)
        entry[halves] = self.store.take(int(halves.sum()), self._kinds(policy))
        return Reserved(self.policies.add(policy), entry)

    def _kinds(self, policy: ReusePolicy) -> dict[str, Kind]:
        """What a lane of `policy` keeps."""
        backbone = self._model.backbone
        if reuses_branches(policy) and self.store.book is None:
            self.store.book = BranchBook(*structure_of(backbone).branches.macs.shape)
        return kinds_of(policy, backbone, next(self._model.parameters()).dtype)

    def give_back(self, reserved: Reserved | None) -> None:
        """Of samples that could not begin."""
        if reserved is not None:
            self.store.give_back(reserved.entry[reserved.entry != NONE])

    def begin(self, slots: np.ndarray, reserved: Reserved | None, first: np.ndarray) -> None:
        """They have these slots now: int64 [k]. first: int64 [k], the step that each begins at."""
        self.begun[slots] = first
        if reserved is not None:
            self.policy[slots], self.entry[slots] = reserved.policy, reserved.entry

    def release(self, slots: np.ndarray) -> None:
        """What they have kept is given up."""
        entry = self.entry[slots]
        self.policy[slots], self.entry[slots] = NONE, NONE
        self.store.give_back(entry[entry != NONE])

    def owns(self, slots: np.ndarray, policy: object) -> np.ndarray:
        """bool [k]: who of slots: int64 [k] follows `policy`."""
        wanted = [number for number, own in enumerate(self.policies.kinds) if own is policy]
        return np.isin(self.policy[slots], wanted)

    def keep(self, used: np.ndarray) -> np.ndarray:
        """Forgets all policies but those used: int64 [n]. Returns their new numbers, int64 [n]."""
        now = used.copy()
        now[used != NONE] = self.policies.keep(used[used != NONE])
        return now

    def of_lanes(
        self,
        lanes: Lanes,
        slot: np.ndarray,
        step: np.ndarray,
        steps: np.ndarray,
        network: np.ndarray | None,
        networks: NetworkSet,
    ) -> ReuseLanes | None:
        """slot, step, steps: int64 [B], by lane: its slot, the step it is at, how many its sample makes. network: int64
        [B] or None, of `networks`. None where nobody reuses."""
        index = self.policy[slot]
        if (index == NONE).all():
            return None
        now = np.zeros_like(slot) if network is None else network
        fits = np.array([self._fits(one.model) for one in networks.networks])
        index = np.where(fits[now], index, NONE)
        return ReuseLanes(
            tuple(self.policies.kinds),
            index=torch.from_numpy(index),
            entry=torch.from_numpy(self.entry[slot, lanes.half]),
            step=torch.from_numpy(step - self.begun[slot]),
            steps_left=torch.from_numpy(steps - step - 1),
            network=torch.from_numpy(networks.keys[now]),
            store=self.store,
        )

    def _fits(self, model: Model) -> bool:
        """Whether a network's hidden states have the shape of those that are kept."""
        own, other = self._model.backbone, model.backbone
        names = ("tokens", "dim", "num_prefix_tokens")
        return all(getattr(own, name) == getattr(other, name) for name in names)
