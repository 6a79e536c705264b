"""What an engine gives back: a handle for each request, a report, and its refusals."""

import math
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..sampling.records import Learnt
from ..sampling.reports import RequestReport, Totals, asks_for_exits
from ..sampling.sample_batch import SampleBatch
from .waking import SignalSafeCondition

if TYPE_CHECKING:
    from .engine import Engine


class EngineFull(RuntimeError):
    """As many requests wait as the engine holds; try again later."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class DeadlineExceeded(TimeoutError):
    """A request was not finished by its deadline."""


class Handle(Future):
    """One request: a `concurrent.futures.Future` whose result is the image, float32 [C, H, W].

    `cancel` works until the image is there; a running request leaves its slot before the next tick.
    """

    def __init__(
        self,
        samples: SampleBatch,
        engine: "Engine",
        submitted: float,
        deadline: float,
        priority: int,
        on_step: Callable | None,
    ):
        super().__init__()
        self._condition = SignalSafeCondition()  # the engine's thread takes it, too
        self.samples, self.submitted, self.deadline, self.priority = samples, submitted, deadline, priority
        self._engine, self._on_step, self._lanes = weakref.ref(engine), on_step, samples.lanes
        self._num_layers = engine.model.num_layers
        self._exits: list[tuple[np.ndarray, np.ndarray | None]] = []  # of the steps made, by lane, as far as known
        self._made = 0  # steps
        self._slot: tuple[int, int] | None = None  # and which of its samples
        self._admitted: float | None = None
        self._ended: float | None = None

    @property
    def over(self) -> bool:
        """As `done`, without its lock."""
        return self._state not in ("PENDING", "RUNNING")

    @property
    def progress(self) -> tuple[int, int]:
        """Steps made, and steps to make."""
        return self._made, int(self.samples.steps - self.samples.first)

    @property
    def report(self) -> RequestReport:
        """What has been done for this request so far. Exit layers of the last step come with the next one."""
        began = self._admitted if self._admitted is not None else math.nan
        ended = self._ended if self._ended is not None else math.nan
        exits, scores = list(self._exits), None
        exit_layer = np.array([layers for layers, _ in exits], dtype=np.uint8).reshape(-1, 1, 2)
        if self.samples.record_scores:
            none = np.full((2, self._num_layers), np.nan, dtype=np.float32)
            scores = np.array([none if own is None else own for _, own in exits], dtype=np.float32)
            scores = torch.from_numpy(scores.reshape(-1, 1, *none.shape))
        return RequestReport(
            exit_layer=torch.from_numpy(exit_layer),
            num_layers=self._num_layers,
            scores=scores,
            waited=began - self.submitted,
            seconds=ended - began,
            asks=asks_for_exits(self.samples.policy),
        )

    def predicted_x0(self) -> Tensor:
        """The image that the request's last prediction would end in, float32 [C, H, W]; waits for the tick under way.

        Raises ValueError before the first step and after the end.
        """
        if (engine := self._engine()) is None:
            raise ValueError("this request is not in flight: its engine is gone")
        return engine._predicted_x0(self)

    def add_done_callback(self, fn: Callable[[Future], object]) -> None:
        """As `Future.add_done_callback`. What `fn` raises is logged, whatever it is, and reaches nobody else."""
        super().add_done_callback(partial(_contained, fn))

    def _begin_again(self) -> None:
        """The steps made are forgotten; the same image comes of it, since it belongs to its seed."""
        self._exits.clear()
        self._made, self._slot, self._admitted, self._ended = 0, None, None, None

    def _end_in_child(self, error: Exception) -> None:
        """In a forked process, where a thread that is not there any more may hold the lock. Callbacks and who waits are
        the parent's."""
        self._condition = SignalSafeCondition()
        self._waiters, self._done_callbacks = [], []  # type: ignore[var-annotated]
        if not self.done():
            self.set_exception(error)

    def _learn(self, known: Learnt, i: int) -> None:
        self._exits.append((known.exit_layer[i], None if known.scores is None else known.scores[i]))


def _contained(fn: Callable[[Future], object], handle: Future) -> None:
    """`Future` logs exceptions of callbacks. Others, such as SystemExit, it would let through, into the thread that
    serves everybody."""
    try:
        fn(handle)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"a done callback raised {error!r}") from error


@dataclass(frozen=True)
class EngineReport:
    """What an engine did so far. batch: forward passes, blocks, multiply-adds, rows moved."""

    waiting: int
    running: int
    finished: int
    failed: int
    cancelled: int
    batch: Totals

    @property
    def never_acted(self) -> bool:
        """Policies that are there to let samples exit let none exit so far."""
        return self.batch.never_acted
