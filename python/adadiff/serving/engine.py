"""Continuous batching: requests arrive at any time, share every evaluation, and end one by one."""

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from numbers import Real

import torch
from torch import Tensor

from ..forward.counts import Counts
from ..forward.forward import ForwardOutput
from ..forward.two_stage import two_stage
from ..model import Model
from ..sampling.batch import Batch, Tick
from ..sampling.capacity import capacity_of
from ..sampling.samples import SampleBatch, whole
from .handles import DeadlineExceeded, EngineClosed, EngineFull, EngineReport, Handle
from .request_queue import RequestQueue

MOST_PRIORITY = 100
EXIT_SECONDS = 60.0  # that the end of the interpreter waits for the tick that is under way


class Engine:
    """Draws samples for requests that come from any thread.

    capacity: lanes evaluated together (a guided request takes two), or the bytes they may take as "512MiB" or "2GiB".
    queue: requests that may wait. patience: seconds, see request_queue.py. batch_invariant: an image and its exits are
    the same bits whatever else runs, at some cost. counts: how the host learns who still runs; compiled: blocks go
    through torch.compile, see `evaluate`.
    shallow_model, t_switch: another network at the noisy timesteps of all requests, see `SamplerRun`.
    start=False: no thread of its own, `step` makes each tick.
    clock: seconds, for tests and simulations; evaluate: see `Batch`.
    As a context manager it drains at the end, and aborts after an exception.
    """

    def __init__(
        self,
        model: Model,
        capacity: int | str = 64,
        *,
        queue: int = 1024,
        patience: float = 60.0,
        batch_invariant: bool = False,
        counts: Counts | str | None = None,
        compiled: bool = False,
        shallow_model: Model | None = None,
        t_switch: float | None = None,
        start: bool = True,
        clock: Callable[[], float] = time.monotonic,
        evaluate: Callable[..., ForwardOutput] | None = None,
    ):
        whole("queue", queue, 1)
        _check_seconds("patience", patience)
        switch = two_stage(model, shallow_model, t_switch)
        if switch is not None and evaluate is not None:
            raise ValueError("shallow_model and evaluate both say how to evaluate; give one")
        self.model, self.queue = model, queue
        self.capacity = min(capacity_of(one, capacity) for one in (model, shallow_model) if one is not None)
        self._clock = clock
        own = {"batch_invariant": batch_invariant, "counts": counts, "compiled": compiled}
        self._batch = Batch(model, self.capacity, **own, evaluate=switch or evaluate)
        self._changed = threading.Condition()  # guards everything below
        self._waiting = RequestQueue(float(patience))
        self._at: dict[int, Handle] = {}  # place -> request
        self._closing = self._aborting = False
        self._broken: BaseException | None = None  # what ended the thread
        self._ended = {"finished": 0, "failed": 0, "cancelled": 0}
        self._stepping = threading.RLock()  # one step at a time
        self._inside: int | None = None  # the thread that makes it
        self._thread: threading.Thread | None = None
        if start:
            self._thread = threading.Thread(target=self._work, name="adadiff-engine", daemon=True)
            self._thread.start()
            _running.add(self)

    def submit(
        self,
        *,
        seed: int,
        label: int | None = None,
        context: Tensor | None = None,
        start: Tensor | None = None,
        priority: int = 0,
        deadline: float | None = None,
        on_step: Callable[[Handle], object] | None = None,
        wait: float = 0.0,
        **settings: object,
    ) -> Handle:
        """Asks for one sample; further settings are those of `SampleBatch.of` (steps, solver, rule, guidance, ...).

        context: [N, E] for text models; start: [C, H, W]. priority: 0 to 100, the more the earlier. deadline: seconds
        from now, after which the request fails. on_step: called with the handle after each of its steps, in the
        engine's thread; what it raises fails this request. wait: seconds to wait for room in the queue.
        Raises ValueError for what does not fit, EngineFull, EngineClosed.
        """
        whole("priority", priority, 0)
        if priority > MOST_PRIORITY:
            raise ValueError(f"priority must be at most {MOST_PRIORITY}, got {priority}")
        if deadline is not None:
            _check_seconds("deadline", deadline)
        if on_step is not None and not callable(on_step):
            raise ValueError(f"on_step must be callable with a handle, got {on_step!r}")
        if not (isinstance(wait, Real) and wait >= 0):
            raise ValueError(f"wait must be a number of seconds >= 0, got {wait!r}")
        samples = SampleBatch.of(
            self.model,
            1,
            seeds=[seed],
            labels=None if label is None else [label],
            context=_one("context", context),
            start=_one("start", start),
            **settings,
        )
        if samples.lanes > self.capacity:
            raise ValueError(f"a guided request takes {samples.lanes} lanes, but the capacity is {self.capacity}")
        with self._changed:
            until = time.monotonic() + wait
            while self._waiting.count >= self.queue and not self._closing:
                left = until - time.monotonic()
                if left <= 0 or self._inside == threading.get_ident():  # who would make room?
                    raise EngineFull(f"{self._waiting.count} requests wait already, the most this engine holds")
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            if self._closing:
                raise EngineClosed("this engine is closed") from self._broken
            now = self._clock()
            end = math.inf if deadline is None else now + deadline
            handle = Handle(samples, self.model.layers, now, end, on_step)
            self._waiting.add(handle, priority)
            handle.add_done_callback(self._on_end)
            self._changed.notify_all()
        return handle

    def step(self) -> bool:
        """One tick of an engine without a thread: admits who waits, makes a step for all. False if nobody is there."""
        if self._thread is not None and threading.current_thread() is not self._thread:
            raise RuntimeError("this engine has a thread of its own; `step` is for start=False")
        if self._inside == threading.get_ident():
            raise RuntimeError("`step` was called from within a step, by a callback")
        with self._stepping:
            self._inside = threading.get_ident()
            try:
                self._leave_early()
                self._admit()
                if not self._batch.count:
                    return False
                self._deliver(self._batch.tick())
                return True
            finally:
                self._inside = None
                if self._aborting and self._thread is None:
                    self._abort()

    @property
    def report(self) -> EngineReport:
        with self._changed:
            return EngineReport(self._waiting.count, len(self._at), **self._ended, batch=self._batch.totals)

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests; finishes those it has (drain), or cancels them after the tick that is under way.

        Waits until that is done. Raises TimeoutError after `timeout` seconds; then call it again.
        """
        with self._changed:
            self._closing = True
            self._aborting = self._aborting or not drain
            self._changed.notify_all()
        if self._inside == threading.get_ident() or self._thread is threading.current_thread():
            return  # a callback asks; what is under way comes first
        if self._thread is None:
            until = math.inf if timeout is None else time.monotonic() + timeout
            while not self._aborting and self.step():
                if time.monotonic() >= until:
                    raise TimeoutError(f"the engine was not done after {timeout} seconds")
            with self._stepping:
                self._abort()
        else:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"the engine was not done after {timeout} seconds")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(drain=kind is None)

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._waiting.count and not self._at and not self._closing:
                        self._changed.wait()
                    if self._aborting or (self._closing and not self._waiting.count and not self._at):
                        break
                self.step()
        except BaseException as error:  # a defect of ours; nobody must wait for ever
            self._fail_all(error)
            raise
        finally:
            self._abort()

    def _leave_early(self) -> None:
        """Frees the places of requests that were cancelled or are too late."""
        now = self._clock()
        for place, handle in list(self._at.items()):
            if handle._ended is not None:  # `done` takes a lock
                self._give_up(place)
            elif now >= handle.deadline:
                self._give_up(place)
                self._end(handle, error=_too_late(handle))

    def _admit(self) -> None:
        with self._changed:
            now = self._clock()
            failed = [(handle, _too_late(handle)) for handle in self._waiting.late(now)]
            lanes = sum(handle._lanes for handle in self._at.values())
            while (handle := self._waiting.first(now)) and lanes + handle._lanes <= self.capacity:
                self._waiting.pop()
                try:
                    place = int(self._batch.admit(handle.samples, _ONLY))
                except Exception as error:
                    failed.append((handle, error))
                else:
                    self._at[place], handle._admitted = handle, now
                    self._waiting.left()
                    lanes += handle._lanes
            self._changed.notify_all()  # there may be room in the queue
        for handle, error in failed:
            self._end(handle, error=error)

    def _deliver(self, tick: Tick) -> None:
        for place, error in tick.failed.items():
            self._end(self._give_up(place), error=error)
        for place, exit_layer in zip(tick.places.tolist(), tick.exit_layer.tolist(), strict=True):
            self._at[place]._exits.append(exit_layer)
        images = dict(zip(tick.done.tolist(), self._batch.take(tick.done).cpu(), strict=True))
        for place in tick.places.tolist():
            handle = self._at[place]
            try:
                if handle._on_step is not None and not handle.done():
                    handle._on_step(handle)
            except Exception as error:
                if place not in images:
                    self._batch.release(torch.tensor([place]))
                images.pop(place, None)
                del self._at[place]
                self._end(handle, error=error)
                continue
            if place in images:
                del self._at[place]
                if bool(images[place].isfinite().all()):
                    self._end(handle, image=images[place].clone())
                else:
                    self._end(handle, error=FloatingPointError("the image holds NaN or infinity"))

    def _give_up(self, place: int) -> Handle:
        self._batch.release(torch.tensor([place]))
        return self._at.pop(place)

    def _end(self, handle: Handle, image: Tensor | None = None, error: BaseException | None = None) -> None:
        """Each handle ends once; one that was cancelled in the meantime has ended already."""
        handle._ended = self._clock()
        try:
            if error is None:
                handle.set_result(image)
            else:
                handle.set_exception(error)
        except InvalidStateError:
            return

    def _on_end(self, handle: Handle) -> None:
        """Called once for each handle, in whatever thread ended it."""
        if handle.cancelled():
            kind = "cancelled"
            handle._ended = self._clock()
            handle.set_running_or_notify_cancel()  # for those who wait through concurrent.futures.wait
        else:
            kind = "finished" if handle.exception() is None else "failed"
        with self._changed:
            self._ended[kind] += 1
            if handle._admitted is None:
                self._waiting.left()
            self._changed.notify_all()

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            self._closing = self._aborting = True
            self._broken = error
            handles = [*self._at.values(), *self._waiting.all()]
        for handle in handles:
            if not handle.done():
                self._end(handle, error=error)

    def _abort(self) -> None:
        """Cancels whatever is left."""
        with self._changed:
            self._closing = self._aborting = True
            waiting = self._waiting.clear()
        while self._at:
            self._give_up(next(iter(self._at))).cancel()
        for handle in waiting:
            handle.cancel()


_ONLY = torch.zeros(1, dtype=torch.int64)
_running: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    """The interpreter ends: requests that nobody waited for are cancelled."""
    for engine in list(_running):
        try:
            engine.close(drain=False, timeout=EXIT_SECONDS)
        except TimeoutError:
            continue


def _check_seconds(name: str, value: float) -> None:
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")


def _one(name: str, value: Tensor | None) -> Tensor | None:
    """As the only row of a batch, in memory of its own: the caller may use his again."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {value!r}")
    return value.detach()[None].clone()


def _too_late(handle: Handle) -> DeadlineExceeded:
    made, steps = handle.progress
    return DeadlineExceeded(f"{made} of {steps} steps were made by the deadline")
