"""What an engine gives back: a handle for each request, a report, and its refusals."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from ..sampling.reports import RequestReport, Totals
from ..sampling.samples import SampleBatch


class EngineFull(RuntimeError):
    """As many requests wait as the engine holds; try again later."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class DeadlineExceeded(TimeoutError):
    """A request was not finished by its deadline."""


class Handle(Future):
    """One request: a `concurrent.futures.Future` whose result is the image, float32 [C, H, W].

    `cancel` works until the image is there; a running request leaves its place before the next tick.
    """

    def __init__(self, samples: SampleBatch, layers: int, submitted: float, deadline: float, on_step: Callable | None):
        super().__init__()
        self.samples, self.submitted, self.deadline = samples, submitted, deadline
        self._on_step, self._layers, self._lanes = on_step, layers, samples.lanes
        self._exits: list[list[int]] = []  # of the steps made, by lane
        self._admitted: float | None = None
        self._ended: float | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """Steps made, and steps to make."""
        return len(self._exits), int(self.samples.steps - self.samples.first)

    @property
    def report(self) -> RequestReport:
        """What has been done for this request so far."""
        began = self._admitted if self._admitted is not None else math.nan
        ended = self._ended if self._ended is not None else math.nan
        exits = list(self._exits)
        exit_layer = torch.tensor(exits, dtype=torch.uint8).view(len(exits), 1, 2)
        return RequestReport(exit_layer, self._layers, began - self.submitted, ended - began)


@dataclass(frozen=True)
class EngineReport:
    """What an engine did so far. batch: evaluations, blocks, multiply-adds, rows moved."""

    waiting: int
    running: int
    finished: int
    failed: int
    cancelled: int
    batch: Totals
