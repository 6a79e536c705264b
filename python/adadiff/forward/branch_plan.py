"""Plans, on the host, which branches of a forward pass each lane computes, caches, or reuses from an earlier step.

Each entry of the store belongs to one lane, see feature_store.py. It holds the branch outputs; `BranchBook` holds the
step that wrote each of them. A branch is reused if the lane's policy reuses in this step and the same network wrote the
branch fewer than `every` steps ago; otherwise it is computed. So branches beyond an early exit, which are older, are
computed when the lane next reaches them.

A pass writes branch outputs to the store before it is known whether its tick succeeds; the book is updated only at the
end of the tick. A repeated pass therefore takes the same decisions and writes the same values again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import upload

from ..policies.reuse import Reuse, ReuseContext
from .decision import call_policy
from .feature_store import FeatureStore, Kind, StoreUpdate
from .reuse_lanes import ReuseLanes

NEVER = -1


@dataclass(frozen=True)
class Branches:
    """The branches of a network. units: the unit of each branch ("attention", "cross", "mlp"), by block; a block that
    does not expose its branches has none. macs: multiply-adds of each branch for one lane. J: most branches of a
    block."""

    units: tuple[tuple[str, ...], ...]
    macs: np.ndarray  # int64 [L, J]

    @staticmethod
    def of(blocks: Sequence[object], tokens: int) -> "Branches":
        shown = [getattr(block, "branches", ()) for block in blocks]
        macs = np.zeros((len(shown), max(map(len, shown), default=0)), dtype=np.int64)
        for row, branches in zip(macs, shown, strict=True):
            row[: len(branches)] = [branch.macs(tokens) for branch in branches]
        return Branches(tuple(tuple(branch.unit for branch in branches) for branches in shown), macs)

    def of_policy(self, policy: Reuse, lacking: bool = False) -> np.ndarray:
        """bool [L, J]: the branches that the policy reuses. Raises ValueError where the network lacks some of them,
        unless `lacking` allows it."""
        first, last = (1, len(self.units)) if policy.layers is None else policy.layers
        if last > len(self.units) and not lacking:
            raise ValueError(f"policy '{policy}' names layer {last}; this network has layers 1..{len(self.units)}")
        chosen = np.zeros(self.macs.shape, dtype=bool)
        for layer, units in enumerate(self.units[first - 1 : last], start=first):
            reused = [policy.unit in (None, unit) for unit in units]
            if not any(reused) and not lacking:
                what = "branches" if policy.unit is None else f"{policy.unit} branch"
                raise ValueError(f"policy '{policy}' reuses branches; block {layer} of this network exposes no {what}")
            chosen[layer - 1, : len(units)] = reused
        return chosen


def reuses_branches(policy: object) -> TypeGuard[Reuse]:
    return isinstance(policy, Reuse) and policy.level != "block"


@dataclass(frozen=True)
class BranchPlan:
    """Branch reuse in one forward pass of B lanes. takes: bool [L, J, B], branches a lane takes from the store; keeps:
    bool [L, J, B], branches it computes and stores. entry: int64 [B], the lane's entry, 0 without branch reuse.

    rows(layer, j): [entries, T, D], the stored outputs of branch j of block 1..L. macs: int64 [L, J], see `Branches`.
    lanes: int64 [k], the lanes whose policy reuses branches; for each of them step, network, full (whether this step
    computes all branches) and tenancy (how often its entry has changed lanes).
    """

    takes: np.ndarray
    keeps: np.ndarray
    entry: np.ndarray
    rows: Callable[[int, int], Tensor]
    macs: np.ndarray
    lanes: np.ndarray
    step: np.ndarray
    network: np.ndarray
    full: np.ndarray
    tenancy: np.ndarray

    @cached_property
    def _touched(self) -> list[list[bool]]:
        return (self.takes | self.keeps).any(2).tolist()

    def touches(self, layer: int, j: int | None = None) -> bool:
        """Whether any lane takes or stores branch j (None: any branch) of block `layer`."""
        touched = self._touched[layer - 1]
        return any(touched) if j is None else touched[j]

    @cached_property
    def alike(self) -> list[list[bool] | None]:
        """By block: which branches are taken, if all lanes take the same; else None."""
        same = (self.takes == self.takes[..., :1]).all((1, 2))
        first = self.takes[..., 0].tolist()
        return [taken if alike else None for taken, alike in zip(first, same.tolist(), strict=True)]

    @cached_property
    def reused(self) -> np.ndarray:
        """int64 [B, L + 1]: the number of branches a lane took, by the number of blocks it ran."""
        return _up_to_each_layer(self.takes.sum(1))

    @cached_property
    def saved(self) -> np.ndarray:
        """int64 [B, L + 1]: the multiply-adds of the branches a lane took, by the number of blocks it ran."""
        return _up_to_each_layer((self.takes * self.macs[:, :, None]).sum(1))


def _up_to_each_layer(values: np.ndarray) -> np.ndarray:
    """values: [L, B]. Returns int64 [B, L + 1], sums over the first 0..L layers."""
    sums = np.zeros((values.shape[1], len(values) + 1), dtype=np.int64)
    sums[:, 1:] = values.T.cumsum(1)
    return sums


def _by_lane(values: np.ndarray, lanes: np.ndarray, B: int) -> np.ndarray:
    """values: bool [k, L, J], of lanes int64 [k]. Returns bool [L, J, B], false for the other lanes."""
    found = np.zeros((*values.shape[1:], B), dtype=bool)
    found[..., lanes] = values.transpose(1, 2, 0)
    return found


class BranchBook:
    """For each entry of a store: the step that wrote each branch, the last full step, and the network that ran in
    them."""

    def __init__(self, num_layers: int, units: int) -> None:
        self._written = np.full((0, num_layers, units), NEVER, dtype=np.int32)
        self._full, self._network, self._tenancy = (np.zeros(0, dtype=np.int64) for _ in range(3))
        self._pending: list[tuple[BranchPlan, Tensor]] = []

    def forget(self, entries: np.ndarray) -> None:
        """Clears entries: int64 [k], which are given to other lanes."""
        self._grow(entries)
        self._written[entries], self._full[entries] = NEVER, NEVER
        self._tenancy[entries] += 1

    def plan(
        self, lanes: ReuseLanes, branches: Branches, t: Tensor, rows: Callable[[int, int], Tensor]
    ) -> BranchPlan | None:
        """The plan of one pass; None if no lane reuses branches. branches: of the network that the lanes run; t: float
        [B]. Waits for the device if exit layers of an earlier pass are still needed from it."""
        reusing = {k: policy for k, policy in enumerate(lanes.policies) if reuses_branches(policy)}
        index = lanes.index.numpy()
        follows = np.isin(index, list(reusing)).nonzero()[0]
        if not len(follows):
            return None
        self._settle()
        entry, step, network = (value.numpy()[follows] for value in (lanes.entry, lanes.step, lanes.network))
        self._grow(entry)
        L, J = branches.macs.shape
        written, last = np.full((len(follows), L, J), NEVER), self._full[entry]
        (most, units), table = self._written.shape[1:], self._written[entry, :L, :J]
        written[:, :most, :units] = table
        same = (last != NEVER) & (self._network[entry] == network)
        takes, keeps = np.zeros((2, len(follows), L, J), dtype=bool)
        full = np.ones(len(follows), dtype=bool)
        for k, policy in reusing.items():
            mine = (index[follows] == k).nonzero()[0]
            if not len(mine):
                continue
            chosen, at = branches.of_policy(policy, lacking=True), torch.from_numpy(follows[mine])
            chosen[most:], chosen[:, units:] = False, False  # a larger network than the store was made for
            context = ReuseContext(
                step=lanes.step[at],
                age=torch.from_numpy(step[mine] - last[mine]),
                steps_left=lanes.steps_left[at],
                t=t[upload(at, t.device)],
            )
            mask = call_policy(policy, policy.reuse_mask, None, context)
            full[mine] = ~(mask.numpy() & same[mine])
            age = step[mine, None, None] - written[mine]
            young = (written[mine] != NEVER) & (age < policy.every)
            takes[mine] = chosen & young & ~full[mine, None, None]
            later = (lanes.steps_left[at].numpy() > 0) & (policy.every > 1)
            keeps[mine] = chosen & ~takes[mine] & later[:, None, None]
        entries = np.zeros(len(index), dtype=np.int64)
        entries[follows] = entry
        return BranchPlan(
            takes=_by_lane(takes, follows, len(index)),
            keeps=_by_lane(keeps, follows, len(index)),
            entry=entries,
            rows=rows,
            macs=branches.macs,
            lanes=follows,
            step=step,
            network=network,
            full=full,
            tenancy=self._tenancy[entry],
        )

    def commit(self, plan: BranchPlan, exit_layer: Tensor, may_exit: bool) -> None:
        """Records a pass whose tick is complete. exit_layer: int32 [B], on any device; may_exit: whether lanes may exit
        before the last layer; if not, exit_layer is not read."""
        if not may_exit:
            self._write(plan, np.full(plan.takes.shape[2], len(plan.takes)))
        elif exit_layer.is_cpu:
            self._write(plan, exit_layer.numpy())
        else:
            self._pending.append((plan, exit_layer))

    def _settle(self) -> None:
        for plan, exit_layer in self._pending:
            self._write(plan, exit_layer.cpu().numpy())
        self._pending.clear()

    def _write(self, plan: BranchPlan, exit_layer: np.ndarray) -> None:
        mine = (self._tenancy[plan.entry[plan.lanes]] == plan.tenancy).nonzero()[0]
        lanes, step, network, full = plan.lanes[mine], plan.step[mine], plan.network[mine], plan.full[mine]
        entry, (L, J, _) = plan.entry[lanes], plan.takes.shape
        self._written[entry[self._network[entry] != network]] = NEVER
        reached = exit_layer[lanes][:, None] > np.arange(L)
        stored = plan.keeps[..., lanes].transpose(2, 0, 1) & reached[..., None]
        written, (L, J) = self._written[entry], np.minimum((L, J), self._written.shape[1:])
        written[:, :L, :J] = np.where(stored[:, :L, :J], step[:, None, None], written[:, :L, :J])
        self._written[entry] = written
        self._full[entry[full]], self._network[entry[full]] = step[full], network[full]

    def _grow(self, entries: np.ndarray) -> None:
        """Makes room for `entries`."""
        missing = max(entries.tolist(), default=-1) + 1 - len(self._full)
        if missing <= 0:
            return
        shape = missing, *self._written.shape[1:]
        self._written = np.concatenate([self._written, np.full(shape, NEVER, dtype=np.int32)])
        self._full = np.concatenate([self._full, np.full(missing, NEVER)])
        self._network = np.concatenate([self._network, np.full(missing, NEVER)])
        self._tenancy = np.concatenate([self._tenancy, np.zeros(missing, dtype=np.int64)])


def kinds_of_branches(chosen: np.ndarray, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Kind]:
    """The store values of a lane that reuses the branches `chosen`: bool [L, J]; shape: (T, D) of a branch."""
    return {_name(int(layer) + 1, int(j)): Kind(shape, dtype) for layer, j in zip(*chosen.nonzero(), strict=True)}


def _name(layer: int, j: int) -> str:
    return f"branch {j} of block {layer}"


def plan_branches(lanes: ReuseLanes, branches: Branches, t: Tensor) -> BranchPlan | None:
    """`BranchBook.plan` with the rows of the lanes' store; None if that holds no branches."""
    store = lanes.store
    if not isinstance(store.book, BranchBook):
        return None
    return store.book.plan(lanes, branches, t, lambda layer, j: store[_name(layer, j)])


def branch_update(store: FeatureStore, plan: BranchPlan, exit_layer: Tensor, may_exit: bool) -> StoreUpdate:
    """The update of the store's book after a pass by `plan`, to be applied once its tick is complete; the branches are
    already stored."""
    none = torch.zeros(0, dtype=torch.int64, device=store.device)
    return StoreUpdate(none, {}, partial(cast(BranchBook, store.book).commit, plan, exit_layer, may_exit))
