"""Exit layers and scores of forward passes, copied from the device to the host asynchronously."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..forward.output import ForwardOutput
from .arriving import Arriving
from .lanes import Lanes
from .reports import Report, Totals, asks_for_exits
from .stages import Judged


class Learnt(NamedTuple):
    """Results of one pass over k samples. exit_layer: uint8 [k, 2] by sample and half (conditional, unconditional), 0
    where there is no lane; scores: float32 [k, 2, L] or None, NaN at layers that the sample's own policy does not
    score. reused: bool [k, 2], lanes that reused features of an earlier step. judged: scores of cascade oracles, if
    any."""

    exit_layer: np.ndarray
    scores: np.ndarray | None
    reused: np.ndarray
    judged: Judged | None


class PassRecord:
    """Record of one pass over k samples with B lanes. slots, tenancy: int64 [k], see `SlotState`; step: int64 [k], the
    step's index, counted through both stages of a cascade. t: float32 [k]. recorded: bool [k], samples whose scores are
    recorded. reuses: bool [B], lanes whose policy reuses (None: no lane). narrowing: bool [2, B], lanes with a width
    policy, and lanes at a width below 1 (None: no lane). judged: see `Learnt`.

    The copies to the host are queued on construction; `read` waits for them.
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
        narrowing: np.ndarray | None = None,
    ):
        self.slots, self.tenancy, self.step, self.t = slots, tenancy, step, t
        self.recorded, self.lanes = recorded, lanes
        self._costs, self._moved = output.costs, output.moved
        exit_layer = output.exit_layer
        if isinstance(self._moved, Tensor):
            exit_layer = torch.cat([exit_layer, self._moved])
        self._exit_layer, self._scores = Arriving(exit_layer), None
        self._reuses, self._narrowing = reuses, narrowing
        self._head_layer = None if output.head_layer is None else Arriving(output.head_layer)
        if output.scores is not None:
            self._scores, self._scored = Arriving(output.scores), _scored(lanes, len(output.scores))
        self.judged: Judged | None = None
        self._learnt: Learnt | None = None

    def read(self) -> Learnt:
        """Waits for the copies. Sets by_lane, int [B]: exit layers; reused, bool [B]; asks, bool [B]: lanes with a
        policy that may skip work, in networks in which policies apply; parts: the counts by part of `Totals`; macs
        (including oracles), macs_full and rows_moved."""
        if self._learnt is not None:
            return self._learnt
        lanes, k = self.lanes, len(self.slots)
        self.by_lane = self._exit_layer.read().numpy()
        if isinstance(self._moved, Tensor):
            self._moved, self.by_lane = self.by_lane[-1], self.by_lane[:-1]
        head_layer = None if self._head_layer is None else self._head_layer.read().numpy()
        layers = self.by_lane.tolist()
        self.reused = self._costs.reused_branches(layers)
        if head_layer is not None:
            self.reused |= head_layer > 0
        self.macs = self._costs.total(layers, None if head_layer is None else head_layer.tolist())
        self.macs += 0 if self.judged is None else self.judged.macs
        exits, reuses = self._asks()
        self.asks = exits | reuses
        early = self.by_lane < len(self._costs.by_exit_layer[0]) - 1
        left = early if head_layer is None else early & (head_layer == 0)
        counted = {"asked_exit": exits, "left": exits & left, "asked_reuse": reuses}
        if self._narrowing is not None:
            counted |= dict(zip(("asked_width", "narrow"), self._narrowing, strict=True))
        self.parts = {name: int(np.count_nonzero(lanes)) for name, lanes in counted.items()}
        self.macs_full, self.rows_moved = len(self.by_lane) * self._costs.plain, int(self._moved)
        exit_layer, scores = np.zeros((k, 2), dtype=np.uint8), None
        exit_layer[lanes.sample, lanes.half] = self.by_lane
        reused = np.zeros((k, 2), dtype=bool)
        reused[lanes.sample, lanes.half] = self.reused
        if self._scores is not None:
            scores = np.full((k, 2, self._scored.shape[1]), np.nan, dtype=np.float32)
            scores[lanes.sample, lanes.half] = np.where(self._scored, self._scores.read().numpy().T, np.nan)
            scores[~self.recorded] = np.nan
        self._learnt = Learnt(exit_layer, scores, reused, self.judged)
        return self._learnt

    def _asks(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [B] each: lanes whose policies may let them exit, and reuse."""
        lanes, costs = self.lanes, self._costs
        if lanes.policy_index is None:
            exits = np.full(len(self.by_lane), asks_for_exits(lanes.policies[0]))
        else:
            exits = np.array([asks_for_exits(policy) for policy in lanes.policies])[lanes.policy_index]
        reuses = np.zeros_like(exits) if self._reuses is None else self._reuses
        if costs.network is not None:
            asks = np.array(costs.asks)[list(costs.network)]
            exits, reuses = exits & asks, reuses & asks
        return exits, reuses


def _scored(lanes: Lanes, num_layers: int) -> np.ndarray:
    """bool [1 or B, L]: layers that a lane's own policy scores. Other layers are scored for its batch-mates only."""
    asked = np.zeros((len(lanes.policies), num_layers), dtype=bool)
    for layers, policy in zip(asked, lanes.policies, strict=True):
        if policy.needs_scores:
            layers[[layer - 1 for layer in policy.exit_layers(num_layers)]] = True
    return asked if lanes.policy_index is None else asked[lanes.policy_index]


class RunRecord:
    """The results so far of a run of n samples with at most `steps` steps. cascade: whether a student draws first."""

    def __init__(
        self,
        steps: int,
        n: int,
        num_layers: int,
        record_scores: bool,
        reuses: bool = False,
        cascade: bool = False,
    ):
        self._num_layers = num_layers
        self._went_on = np.zeros(n, dtype=bool) if cascade else None
        self._oracle_scores = np.full(n, np.nan, dtype=np.float32) if cascade else None
        self._exit_layer = np.zeros((steps, n, 2), dtype=np.uint8)
        self._scores = np.full((steps, n, 2, num_layers), np.nan, dtype=np.float32) if record_scores else None
        self._reused = np.zeros((steps, n, 2), dtype=bool) if reuses else None

    def add(self, record: PassRecord, index: np.ndarray) -> None:
        """Adds a record. index: int64 [k], the run's samples that the record's samples are."""
        known = record.read()
        self._exit_layer[record.step, index] = known.exit_layer
        if known.scores is not None and self._scores is not None:
            self._scores[record.step, index] = known.scores
        if self._reused is not None:
            self._reused[record.step, index] = known.reused
        if (judged := known.judged) is not None and self._went_on is not None and self._oracle_scores is not None:
            scored = index[judged.index]
            self._went_on[scored], self._oracle_scores[scored] = judged.went_on, judged.scores

    def report(self, done: Totals, seconds: float) -> Report:
        return Report(
            exit_layer=torch.from_numpy(self._exit_layer.copy()),
            num_layers=self._num_layers,
            scores=None if self._scores is None else torch.from_numpy(self._scores.copy()),
            macs=done.macs,
            macs_full=done.macs_full,
            rows_moved=done.rows_moved,
            seconds=seconds,
            asks=done.asked > 0 or done.asked_width > 0,
            acted=not done.never_acted,
            idle=done.idle,
            reused=None if self._reused is None else torch.from_numpy(self._reused.copy()),
            went_on=None if self._went_on is None else torch.from_numpy(self._went_on.copy()),
            oracle_scores=None if self._oracle_scores is None else torch.from_numpy(self._oracle_scores.copy()),
        )
