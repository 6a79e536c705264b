"""Samples of a cascade, which are drawn in two stages: by a student, and, if its oracle asks for it, by the teacher.

A slot holds what its sample follows now. What it follows in the second stage waits here.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .cascades import Draft

INDICES = ("table", "policy", "choice")  # of sets that several samples share, see `SlotState`


@dataclass(frozen=True)
class Judged:
    """What oracles said of some of the k samples of a pass. index: int64 [j], which of them; scores: float32 [j];
    went_on: bool [j], the teacher takes over; macs: multiply-adds of the oracles."""

    index: np.ndarray
    scores: np.ndarray
    went_on: np.ndarray
    macs: int

    def of(self, i: int) -> tuple[float, bool] | None:
        """Score and whether it went on, of the i-th of the k samples; None where it was not judged."""
        place = (self.index == i).nonzero()[0]
        return (float(self.scores[place[0]]), bool(self.went_on[place[0]])) if len(place) else None


@dataclass(frozen=True)
class Switch:
    """Samples at slots: int64 [m] go on to their second stage, from x: float32 [m, C, H, W]."""

    judged: Judged
    slots: np.ndarray
    x: Tensor


class Slots(Protocol):
    """Of `SlotState`, what a stage consists of, by slot."""

    seed: np.ndarray
    step: np.ndarray
    steps: np.ndarray
    guidance: np.ndarray
    tied: np.ndarray
    context: Tensor | None

    def there(self, value: np.ndarray) -> Tensor: ...


class Stages:
    """By slot, of `capacity` slots. drafting: bool, the sample is in the first of two stages. before: int64, steps that
    its sample made in an earlier stage."""

    def __init__(self, capacity: int):
        self.drafting, self._tied = np.zeros((2, capacity), dtype=bool)
        self.before, self._steps = np.zeros((2, capacity), dtype=np.int64)
        self.then = {name: np.zeros(capacity, dtype=np.int64) for name in INDICES}
        self._guidance = np.zeros(capacity, dtype=np.float32)
        self._draft: list[Draft | None] = [None] * capacity

    def begin(self, state: Slots, slots: np.ndarray, draft: Draft | None, index: np.ndarray, then: np.ndarray) -> None:
        """New samples, index: int64 [k] of their request, at slots: int64 [k], whose values are those of the only or of
        the last stage: they wait, and the student's take their place. then: int64 [3, k], by INDICES, of the second
        stage."""
        self.drafting[slots], self.before[slots] = draft is not None, 0
        for slot in slots.tolist():
            self._draft[slot] = draft
        if draft is None:
            return
        for name, own in zip(INDICES, then, strict=True):
            self.then[name][slots] = own
        self._steps[slots] = draft.teacher_steps[torch.from_numpy(index)].numpy()
        self._guidance[slots], self._tied[slots] = state.guidance[slots], state.tied[slots]
        state.step[slots], state.steps[slots] = 0, draft.steps
        state.guidance[slots], state.tied[slots] = 0, False

    def judge(self, state: Slots, slots: np.ndarray, images: Tensor, one_by_one: bool) -> Switch | None:
        """Of samples at slots: int64 [k] that have made their next step and become images: float32 [k, C, H, W], who
        goes on. None where nobody has come to the end of a student's list. Waits for the device; writes nothing."""
        ends = (self.drafting[slots] & (state.step[slots] + 1 == state.steps[slots])).nonzero()[0]
        if not len(ends):
            return None
        drafts = [self._draft[slot] for slot in slots[ends].tolist()]
        scores, went_on, macs = np.zeros(len(ends), dtype=np.float32), np.zeros(len(ends), dtype=bool), 0
        x: dict[int, Tensor] = {}
        for draft in dict.fromkeys(drafts):
            assert draft is not None  # of those that are drafting
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
        """Their second stage begins. slots: int64 [m]."""
        self.before[slots] = state.steps[slots]
        for name in INDICES:
            getattr(state, name)[slots] = self.then[name][slots]
        state.step[slots], state.steps[slots] = 0, self._steps[slots]
        state.guidance[slots], state.tied[slots] = self._guidance[slots], self._tied[slots]
        self.drafting[slots] = False
