"""Handles of requests, the report of an engine, and its exceptions."""

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..sampling.arriving import Arriving
from ..sampling.records import Learnt
from ..sampling.reports import RequestReport, Totals
from ..sampling.sample_batch import SampleBatch
from .admission import Kind
from .waking import SignalSafeCondition

if TYPE_CHECKING:
    from .engine import Engine

Result = TypeVar("Result")
LOCK_SECONDS = 0.1  # the longest that the engine waits for locks shared with clients


class EngineFull(RuntimeError):
    """The engine's queue is full; try again later."""


class EngineClosed(RuntimeError):
    """The engine accepts no more requests."""


class DeadlineExceeded(TimeoutError):
    """A request was not finished by its deadline."""


class _Callbacks(list):
    """Done callbacks. A second iteration continues the first, so that each is called once even if a signal interrupts
    the first."""

    def __init__(self) -> None:
        super().__init__()
        self._left = super().__iter__()

    def __iter__(self) -> Iterator:
        return self._left


class Handle(Future):
    """One request: a `concurrent.futures.Future` whose result is the image, float32 [C, H, W], on the CPU.

    `cancel` works until the image is done; a running request leaves its slot before the next tick.
    """

    def __init__(
        self,
        samples: SampleBatch,
        engine: "Engine",
        submitted: float,
        deadline: float,
        priority: int,
        on_step: Callable | None,
        lanes: float,
        kind: Kind | None = None,
    ):
        super().__init__()
        self._condition = SignalSafeCondition()  # shared with the engine's thread
        self._done_callbacks = _Callbacks()
        self.samples, self.submitted, self.deadline, self.priority = samples, submitted, deadline, priority
        self._engine, self._on_step, self._lanes = weakref.ref(engine), on_step, lanes
        self.kind, self._num_layers = kind, engine.model.num_layers
        self._steps: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]] = []  # exit layers, scores, reused by lane
        self._made = 0  # steps made
        self._judged: tuple[float, bool] | None = None  # score by a cascade's oracle, and whether the teacher goes on
        self._slot: tuple[int, int] | None = None  # slot and tenancy
        self._admitted: float | None = None
        self._ended: float | None = None
        self._counted = False  # in the engine's report

    @property
    def over(self) -> bool:
        """As `done`, without taking the lock."""
        return self._state not in ("PENDING", "RUNNING")

    @property
    def progress(self) -> tuple[int, int]:
        """Steps made, and steps in total; for a cascade the most there can be, until the oracle has accepted the
        image."""
        draft = self.samples.draft
        if draft is not None and self._judged is not None and not self._judged[1]:
            return self._made, draft.steps
        return self._made, int(self.samples.most_steps)

    @property
    def report(self) -> RequestReport:
        """The report of this request so far. Exit layers of a step become known with the next step."""
        began = self._admitted if self._admitted is not None else math.nan
        ended = self._ended if self._ended is not None else math.nan
        steps, scores, reused = list(self._steps), None, None
        exit_layer = np.array([layers for layers, _, _ in steps], dtype=np.uint8).reshape(-1, 1, 2)
        if self.samples.record_scores:
            none = np.full((2, self._num_layers), np.nan, dtype=np.float32)
            scores = np.array([none if own is None else own for _, own, _ in steps], dtype=np.float32)
            scores = torch.from_numpy(scores.reshape(-1, 1, *none.shape))
        if self.samples.parts.reuse is not None:
            reused = torch.from_numpy(np.array([own for _, _, own in steps], dtype=bool).reshape(-1, 1, 2))
        return RequestReport(
            exit_layer=torch.from_numpy(exit_layer),
            num_layers=self._num_layers,
            scores=scores,
            waited=began - self.submitted,
            seconds=ended - began,
            asks=self.samples.parts.asks,
            reused=reused,
            **self._oracle_said(),
        )

    def _oracle_said(self) -> dict[str, Tensor]:
        if self.samples.draft is None:
            return {}
        score, went_on = self._judged or (math.nan, False)
        return {
            "went_on": torch.tensor([went_on], dtype=torch.bool, device="cpu"),
            "oracle_scores": torch.tensor([score], dtype=torch.float32, device="cpu"),
        }

    def predicted_x0(self) -> Tensor:
        """x0 by the request's last prediction, float32 [C, H, W]; waits for the present tick.

        Raises ValueError before the first step and after the end.
        """
        return self.predicted_x0_later().read()

    def predicted_x0_later(self) -> Arriving:
        """As `predicted_x0`, for `on_step`: returns at once, with the copy to the host queued. Call `read()` of the
        result in another thread, which waits for it."""
        if (engine := self._engine()) is None:
            raise ValueError("this request is not in flight: its engine is gone")
        return engine._predicted_x0(self)

    def cancel(self) -> bool:
        return self._whole(super().cancel)

    def result(self, timeout: float | None = None) -> Tensor:
        """As `Future.result`. Raises RuntimeError where it would wait forever, as in a callback of the same engine."""
        self._check_wait(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `Future.exception`. Raises RuntimeError as `result` does."""
        self._check_wait(timeout)
        return super().exception(timeout)

    def _check_wait(self, timeout: float | None) -> None:
        engine = self._engine()
        if timeout is None and engine is not None and engine._is_above() and not self.over:
            raise RuntimeError(
                "this would wait for ever: the engine waits until the callback or signal handler returns"
            )

    def add_done_callback(self, fn: Callable[[Future], object]) -> None:
        """As `Future.add_done_callback`. Any exception in `fn`, even SystemExit, is logged and not propagated."""
        super().add_done_callback(partial(_contained, fn))

    def _end(self, now: float, image: Tensor | None = None, error: BaseException | None = None) -> None:
        """Ends the request with an image or an error; no effect if it has ended (was cancelled) in the meantime."""
        self._ended = now
        self._tell(partial(self.set_result, image) if error is None else partial(self.set_exception, error))

    def _end_late(self, now: float) -> None:
        made, steps = self.progress
        self._end(now, error=DeadlineExceeded(f"{made} of {steps} steps were made by the deadline"))

    def _tell(self, end: Callable[[], object]) -> None:
        """Calls `end`, which ends the handle. Clients in `concurrent.futures.wait` share locks with the handle that a
        signal can leave held; then another thread waits for them, and the engine goes on."""

        if not self._waiters and self._condition.acquire(timeout=LOCK_SECONDS):
            self._condition.release()
            self._whole(end)
        else:
            thread = threading.Thread(target=self._whole, args=(end,), name="adadiff-handle", daemon=True)
            thread.start()
            thread.join(LOCK_SECONDS)

    def _whole(self, end: Callable[[], Result]) -> Result | None:
        """Calls `end`. If a signal interrupts it, waiting threads are still woken and callbacks called."""
        try:
            return end()
        except InvalidStateError:  # cancelled in the meantime
            return None
        except BaseException:
            if self.over:
                with self._condition:
                    self._condition.notify_all()
                self._invoke_callbacks()
            raise

    def _invoke_callbacks(self) -> None:
        """Calls the callbacks of the engine, of `concurrent.futures.wait`, and of clients. A second call continues an
        interrupted one."""
        if (engine := self._engine()) is not None:
            engine._count(self)
        if self._state == "CANCELLED":
            self.set_running_or_notify_cancel()
        super()._invoke_callbacks()  # type: ignore[misc]

    def _begin_again(self) -> None:
        """Resets the request to its start; the seed gives the same image again."""
        self._steps.clear()
        self._judged = None
        self._made, self._slot, self._admitted, self._ended = 0, None, None, None

    def _end_in_child(self, error: Exception) -> None:
        """Fails the request in a forked process, where a thread that no longer exists may hold the lock. Callbacks and
        waiting threads belong to the parent."""
        self._condition = SignalSafeCondition()
        self._waiters, self._done_callbacks = [], []  # type: ignore[var-annotated]
        if not self.done():
            self.set_exception(error)

    def _learn(self, known: Learnt, i: int) -> None:
        scores = None if known.scores is None else known.scores[i]
        self._steps.append((known.exit_layer[i], scores, known.reused[i]))
        if known.judged is not None:
            self._judged = known.judged.of(i) or self._judged


def _contained(fn: Callable[[Future], object], handle: Future) -> None:
    """Calls a done callback. `Future` logs each `Exception`; other exceptions, such as SystemExit, are converted, since
    `Future` would let them through to the engine's thread."""
    try:
        fn(handle)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"a done callback raised {error!r}") from error


@dataclass(frozen=True)
class EngineReport:
    """Counters of an engine: requests by state. batch: forward passes, blocks, multiply-adds, rows moved."""

    waiting: int
    running: int
    finished: int
    failed: int
    cancelled: int
    batch: Totals

    @property
    def never_acted(self) -> bool:
        """Whether policies that may skip work have skipped none so far."""
        return self.batch.never_acted
