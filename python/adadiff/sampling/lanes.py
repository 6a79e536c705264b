"""The lanes of one forward pass: the samples they belong to, and their order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..policies.interface import ExitPolicy
from .ordering import ExpectedDepth
from .slots import SlotState


@dataclass(frozen=True)
class Lanes:
    """B lanes of k samples. sample: int64 [B], index of the lane's sample; half: int64 [B], 1 for unconditional lanes.

    conditional: int64 [k], each sample's conditional lane, None if these are 0..k-1; unconditional: int64 [k], each
    sample's unconditional lane or -1, None if no sample has one.
    policies: in use; policy_index: int64 [B] or None; partner: int64 [B] or None, `cfg_partner` of `forward`; may_exit:
    whether a lane may exit before the last layer.
    """

    sample: np.ndarray
    half: np.ndarray
    conditional: np.ndarray | None
    unconditional: np.ndarray | None
    policies: Sequence[ExitPolicy]
    policy_index: np.ndarray | None
    partner: np.ndarray | None
    may_exit: bool

    @property
    def in_order(self) -> bool:
        """Whether lane i is the conditional half of sample i, and there are no other lanes."""
        return self.conditional is None and self.unconditional is None


def lanes_of(
    state: SlotState,
    slots: np.ndarray,
    t: np.ndarray,
    kinds: Sequence[ExitPolicy],
    num_layers: int,
    expected: ExpectedDepth,
) -> Lanes:
    """The lanes of samples at slots: int64 [k] at times t: float32 [k], deepest expected exit first.

    kinds: all policies, by index.
    """
    k, guidance = len(slots), state.guidance[slots]
    sample, half, guided = np.arange(k), np.zeros(k, dtype=np.int64), None
    if np.count_nonzero(guidance):
        low, high = state.interval[slots].T
        guided = ((guidance != 0) & (low <= t) & (t <= high)).nonzero()[0]
        guided = guided if len(guided) else None
    if guided is not None:  # the unconditional lanes last
        sample = np.concatenate([sample, guided])
        half = np.concatenate([half, np.ones(len(guided), dtype=np.int64)])
    index, used = None, kinds
    if len(kinds) > 1:
        present, index = np.unique(state.policy[slots], return_inverse=True)
        used = [kinds[i] for i in present]
        index = None if len(used) == 1 else index[sample]
    may_exit = any(policy.exit_layers(num_layers) for policy in used)
    order, lane = None, sample
    if may_exit and len(sample) > 1:
        order = expected.order(t, slots, half) if guided is None else expected.order(t[sample], slots[sample], half)
        if not np.count_nonzero(order[1:] < order[:-1]):
            order = None  # already in order
    if order is not None or guided is not None:
        lane = np.arange(len(sample))
    if order is not None:
        lane[order] = lane.copy()  # the new lane of each
    partner = None
    if guided is not None and state.tied[slots[guided]].any():
        partner = np.arange(len(sample))
        both = state.tied[slots[guided]].nonzero()[0]
        partner[guided[both]], partner[k + both] = k + both, guided[both]
        partner = partner if order is None else lane[partner[order]]
    unconditional = None
    if guided is not None:
        unconditional = np.full(k, -1)
        unconditional[guided] = lane[k:]
    if order is not None:
        sample, half = sample[order], half[order]
        index = None if index is None else index[order]
    conditional = None if order is None else lane[:k]
    return Lanes(sample, half, conditional, unconditional, used, index, partner, may_exit)
