"""Reuse state of samples in flight, by slot: the reuse policy of each, and the store entries of its lanes."""

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
    """Store entries reserved for k new samples. policy: its number; entry: int64 [k, 2], by half, NONE where a sample
    has no such lane."""

    policy: int
    entry: np.ndarray


class ReuseSlots:
    """Reuse state by slot. policy: int64 [capacity], number in `policies`, NONE without reuse. entry: int64
    [capacity, 2], entry of the store, by half. begun: int64 [capacity], the step at which the sample began."""

    def __init__(self, capacity: int, model: Model, device: torch.device) -> None:
        self._model, self.store, self.policies = model, FeatureStore(device), PolicySet[ReusePolicy]()
        self.policy = np.full(capacity, NONE, dtype=np.int64)
        self.entry = np.full((capacity, 2), NONE, dtype=np.int64)
        self.begun = np.zeros(capacity, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.policies)

    def reserve(self, samples: SampleBatch, index: np.ndarray) -> Reserved | None:
        """Reserves entries for samples index: int64 [k] of `samples`; None if they reuse nothing. If memory runs out,
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
        """The store values of a lane of `policy`."""
        backbone = self._model.backbone
        if reuses_branches(policy) and self.store.book is None:
            self.store.book = BranchBook(*structure_of(backbone).branches.macs.shape)
        return kinds_of(policy, backbone, next(self._model.parameters()).dtype)

    def give_back(self, reserved: Reserved | None) -> None:
        """Frees the entries of samples that could not begin."""
        if reserved is not None:
            self.store.give_back(reserved.entry[reserved.entry != NONE])

    def begin(self, slots: np.ndarray, reserved: Reserved | None, first: np.ndarray) -> None:
        """Assigns slots: int64 [k] to new samples. first: int64 [k], the step at which each begins."""
        self.begun[slots] = first
        if reserved is not None:
            self.policy[slots], self.entry[slots] = reserved.policy, reserved.entry

    def release(self, slots: np.ndarray) -> None:
        """Frees the entries of slots: int64 [k]."""
        entry = self.entry[slots]
        self.policy[slots], self.entry[slots] = NONE, NONE
        self.store.give_back(entry[entry != NONE])

    def owns(self, slots: np.ndarray, policy: object) -> np.ndarray:
        """bool [k]: slots: int64 [k] whose reuse policy is `policy`."""
        wanted = [number for number, known in enumerate(self.policies.kinds) if known is policy]
        return np.isin(self.policy[slots], wanted)

    def keep(self, used: np.ndarray) -> np.ndarray:
        """Drops all policies but those in used: int64 [n]. Returns their new numbers, int64 [n]."""
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
        """The reuse input of a forward pass; None if no lane reuses. slot, step, steps: int64 [B], by lane: its slot,
        present step, and number of steps. network: int64 [B], index into `networks`, or None."""
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
        """Whether a network's hidden states have the shape of the cached ones."""
        ours, other = self._model.backbone, model.backbone
        names = ("tokens", "dim", "num_prefix_tokens")
        return all(getattr(ours, name) == getattr(other, name) for name in names)
