"""Exit layers and scores of one forward pass, on their way from the device to the host."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..forward.output import ForwardOutput
from .arriving import Arriving
from .lanes import Lanes
from .reports import Report, Totals, asks_for_exits


class Learnt(NamedTuple):
    """exit_layer: uint8 [k, 2] by sample and half (conditional, unconditional), 0 where there is none; scores: float32
    [k, 2, L] or None, NaN where a sample's own policy did not ask. reused: bool [k, 2], lanes that reused what an
    earlier step computed."""

    exit_layer: np.ndarray
    scores: np.ndarray | None
    reused: np.ndarray


class PassRecord:
    """slots, tenancy, step: int64 [k], of the k samples that made a step, see `SlotState`. t: float32 [k]. recorded:
    bool [k], whose scores were asked for. reuses: bool [B], lanes whose policy reuses (None: no lane's).

    The copies to the host are queued at once; `read` waits for them.
    """

    def __init__(
        self,
        slots: np.ndarray,
        tenancy: np.ndarray,
        step: np.ndarray,
        t: np.ndarray,
        recorded: np.ndarray,
        lanes: Lanes,
        output: ForwardOutput,
        reuses: np.ndarray | None = None,
    ):
        self.slots, self.tenancy, self.step, self.t = slots, tenancy, step, t
        self.recorded, self.lanes = recorded, lanes
        self._costs, self._moved = output.costs, output.moved
        exit_layer = output.exit_layer
        if isinstance(self._moved, Tensor):
            exit_layer = torch.cat([exit_layer, self._moved])
        self._exit_layer, self._scores = Arriving(exit_layer), None
        self._reuses = reuses
        self._head_layer = None if output.head_layer is None else Arriving(output.head_layer)
        if output.scores is not None:
            self._scores, self._scored = Arriving(output.scores), _scored(lanes, len(output.scores))
        self._learnt: Learnt | None = None

    def read(self) -> Learnt:
        """Waits for the device where that is needed. Sets by_lane, integers [B], the exit layers; reused, bool [B];
        asks, bool [B]: lanes with a policy that may leave work out, of networks in which policies decide; macs,
        macs_full and rows_moved."""
        if self._learnt is not None:
            return self._learnt
        lanes, k = self.lanes, len(self.slots)
        self.by_lane = self._exit_layer.read().numpy()
        if isinstance(self._moved, Tensor):
            self._moved, self.by_lane = self.by_lane[-1], self.by_lane[:-1]
        head_layer = None if self._head_layer is None else self._head_layer.read().numpy()
        self.reused = self._costs.branches_reused(self.by_lane.tolist()) > 0
        if head_layer is not None:
            self.reused |= head_layer > 0
        self.macs = self._costs.total(self.by_lane.tolist(), None if head_layer is None else head_layer.tolist())
        self.asks = self._asks()
        self.macs_full, self.rows_moved = len(self.by_lane) * self._costs.plain, int(self._moved)
        exit_layer, scores = np.zeros((k, 2), dtype=np.uint8), None
        exit_layer[lanes.sample, lanes.half] = self.by_lane
        reused = np.zeros((k, 2), dtype=bool)
        reused[lanes.sample, lanes.half] = self.reused
        if self._scores is not None:
            scores = np.full((k, 2, self._scored.shape[1]), np.nan, dtype=np.float32)
            scores[lanes.sample, lanes.half] = np.where(self._scored, self._scores.read().numpy().T, np.nan)
            scores[~self.recorded] = np.nan
        self._learnt = Learnt(exit_layer, scores, reused)
        return self._learnt

    def _asks(self) -> np.ndarray:
        lanes, costs = self.lanes, self._costs
        exits = np.array([asks_for_exits(policy) for policy in lanes.policies])
        asks = exits[np.zeros(len(self.by_lane), dtype=np.int64) if lanes.policy_index is None else lanes.policy_index]
        if self._reuses is not None:
            asks |= self._reuses
        return asks if costs.network is None else asks & np.array(costs.asks)[list(costs.network)]


def _scored(lanes: Lanes, num_layers: int) -> np.ndarray:
    """bool [1 or B, L]: where a lane's own policy asks for a score. Others are computed for its mates."""
    asked = np.zeros((len(lanes.policies), num_layers), dtype=bool)
    for own, policy in zip(asked, lanes.policies, strict=True):
        if policy.needs_scores:
            own[[layer - 1 for layer in policy.exit_layers(num_layers)]] = True
    return asked if lanes.policy_index is None else asked[lanes.policy_index]


class RunRecord:
    """What a run of n samples, of at most so many steps, has told so far."""

    def __init__(self, steps: int, n: int, num_layers: int, record_scores: bool, reuses: bool = False):
        self._num_layers = num_layers
        self._exit_layer = np.zeros((steps, n, 2), dtype=np.uint8)
        self._scores = np.full((steps, n, 2, num_layers), np.nan, dtype=np.float32) if record_scores else None
        self._reused = np.zeros((steps, n, 2), dtype=bool) if reuses else None

    def add(self, record: PassRecord, index: np.ndarray) -> None:
        """index: int64 [k], which samples of the run those of the record are."""
        known = record.read()
        self._exit_layer[record.step, index] = known.exit_layer
        if known.scores is not None and self._scores is not None:
            self._scores[record.step, index] = known.scores
        if self._reused is not None:
            self._reused[record.step, index] = known.reused

    def report(self, done: Totals, seconds: float) -> Report:
        return Report(
            exit_layer=torch.from_numpy(self._exit_layer.copy()),
            num_layers=self._num_layers,
            scores=None if self._scores is None else torch.from_numpy(self._scores.copy()),
            macs=done.macs,
            macs_full=done.macs_full,
            rows_moved=done.rows_moved,
            seconds=seconds,
            asks=done.asked > 0,
            acted=done.exited > 0,
            reused=None if self._reused is None else torch.from_numpy(self._reused.copy()),
        )
