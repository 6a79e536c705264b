"""The two stages of a cascade's samples: a student draws, and if the oracle's score is low, the teacher goes on.

A slot holds the settings of the sample's present stage; those of the second stage are kept here.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .cascades import Draft

INDICES = ("table", "policy", "choice")  # arrays of `SlotState` with numbers of shared objects


@dataclass(frozen=True)
class Judged:
    """Oracle scores of some of the k samples of a pass. index: int64 [j], these samples; scores: float32 [j]; went_on:
    bool [j], whether the teacher takes over; macs: multiply-adds of the oracles."""

    index: np.ndarray
    scores: np.ndarray
    went_on: np.ndarray
    macs: int

    def of(self, i: int) -> tuple[float, bool] | None:
        """The score of the i-th of the k samples and whether it went on; None if it was not scored."""
        found = (self.index == i).nonzero()[0]
        return (float(self.scores[found[0]]), bool(self.went_on[found[0]])) if len(found) else None


@dataclass(frozen=True)
class Switch:
    """Samples at slots: int64 [m] that begin their second stage, from x: float32 [m, C, H, W]."""

    judged: Judged
    slots: np.ndarray
    x: Tensor


class Slots(Protocol):
    """The arrays of `SlotState` that stages read and write."""

    seed: np.ndarray
    step: np.ndarray
    steps: np.ndarray
    guidance: np.ndarray
    tied: np.ndarray
    context: Tensor | None

    def there(self, value: np.ndarray) -> Tensor: ...


class Stages:
    """Stages by slot. drafting: bool, the sample is in the first of two stages. before: int64, the steps that the
    sample made in its first stage, 0 during it."""

    def __init__(self, capacity: int):
        self.drafting, self._tied = np.zeros((2, capacity), dtype=bool)
        self.before, self._steps = np.zeros((2, capacity), dtype=np.int64)
        self.then = {name: np.zeros(capacity, dtype=np.int64) for name in INDICES}
        self._guidance = np.zeros(capacity, dtype=np.float32)
        self._draft: list[Draft | None] = [None] * capacity

    def begin(self, state: Slots, slots: np.ndarray, draft: Draft | None, index: np.ndarray, then: np.ndarray) -> None:
        """Starts samples index: int64 [k] of their request at slots: int64 [k]. `state` holds values of the last stage;
        with a draft they are set aside and replaced by the student's. then: int64 [3, k], by INDICES, of the second
        stage."""
        self.drafting[slots], self.before[slots] = draft is not None, 0
        for slot in slots.tolist():
            self._draft[slot] = draft
        if draft is None:
            return
        for name, numbers in zip(INDICES, then, strict=True):
            self.then[name][slots] = numbers
        self._steps[slots] = draft.teacher_steps[torch.from_numpy(index)].numpy()
        self._guidance[slots], self._tied[slots] = state.guidance[slots], state.tied[slots]
        state.step[slots], state.steps[slots] = 0, draft.steps
        state.guidance[slots], state.tied[slots] = 0, False

    def judge(self, state: Slots, slots: np.ndarray, images: Tensor, one_by_one: bool) -> Switch | None:
        """Scores samples whose student has finished, and returns which go on to the teacher; None if none has finished.
        slots: int64 [k], samples that have just made a step; images: float32 [k, C, H, W], their new states. Waits for
        the device; changes nothing."""
        drafting = self.drafting[slots]
        if not np.count_nonzero(drafting):
            return None
        ends = (drafting & (state.step[slots] + 1 == state.steps[slots])).nonzero()[0]
        if not len(ends):
            return None
        drafts = [self._draft[slot] for slot in slots[ends].tolist()]
        scores, went_on, macs = np.zeros(len(ends), dtype=np.float32), np.zeros(len(ends), dtype=bool), 0
        x: dict[int, Tensor] = {}
        for draft in dict.fromkeys(drafts):
            assert draft is not None  # since the sample is drafting
            own = np.array([i for i, other in enumerate(drafts) if other is draft])
            there = state.there(ends[own])
            labels = None
            if state.context is not None and not state.context.is_floating_point():
                labels = state.context[state.there(slots[ends[own]])]
            found = draft.scores(images[there], labels, one_by_one).cpu().numpy()
            scores[own], went_on[own] = found, draft.asks_for_more(found)
            macs += len(own) * draft.file.oracle.macs
            on = own[went_on[own]]
            if len(on):
                again = draft.begin_again(
                    images[state.there(ends[on])], torch.from_numpy(state.seed[slots[ends[on]]]), one_by_one
                )
                x |= dict(zip(on.tolist(), again, strict=True))
        judged = Judged(ends, scores, went_on, macs)
        begun = torch.stack([x[i] for i in sorted(x)]) if x else images[:0]
        return Switch(judged, slots[ends[went_on]], begun)

    def switch(self, state: Slots, slots: np.ndarray) -> None:
        """Starts the second stage of samples at slots: int64 [m]."""
        self.before[slots] = state.steps[slots]
        for name in INDICES:
            getattr(state, name)[slots] = self.then[name][slots]
        state.step[slots], state.steps[slots] = 0, self._steps[slots]
        state.guidance[slots], state.tied[slots] = self._guidance[slots], self._tied[slots]
        self.drafting[slots] = False
