"""Continuous batching: requests arrive at any time, share every forward pass, and end one by one."""

import atexit
import dataclasses
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from functools import partial
from numbers import Real

import numpy as np
from torch import Tensor

from ..forward.options import ExecutionOptions
from ..forward.output import ForwardOutput
from ..forward.two_stage import two_stage
from ..model import Model
from ..sampling.batch import Batch, Tick, is_interrupt
from ..sampling.capacity import capacity_of
from ..sampling.params import SamplingParams
from ..sampling.reports import log_never_acted
from ..sampling.sample_batch import SampleBatch, whole
from .handles import DeadlineExceeded, EngineClosed, EngineFull, EngineReport, Handle
from .request_queue import RequestQueue
from .waking import Bell, Bells

MOST_PRIORITY = 100
EXIT_SECONDS = 60.0  # that the end of the interpreter waits for the tick that is under way
LOOK_AGAIN = 1.0  # seconds after which clients who wait look again, should a signal have cost them a ring
LOCK_SECONDS = 0.1  # that the engine waits for the locks of a handle and of those who wait for it


class Engine:
    """Draws samples for requests that come from any thread.

    capacity: lanes in one forward pass (a guided request takes two), or the bytes they may take as "512MiB" or "2GiB".
    queue: requests that may wait. max_wait: seconds after which a request goes before later ones of a higher priority,
    see request_queue.py. execution: how forward passes are run.
    shallow_model, t_switch: another network at the noisy timesteps of all requests, see `sample`.
    threaded=False: no thread of its own, `step` makes each tick.
    clock: seconds, for tests and simulations; forward: see `Batch`.
    As a context manager it drains at the end, and aborts after an exception.

    What code of a request raises (callbacks, policies), be it SystemExit, fails that request alone. A signal handler
    that raises, such as Ctrl-C, leaves the engine in order at any place of any of its methods. It does not survive a
    fork: in the child, its requests have failed and `submit` raises EngineClosed.
    """

    def __init__(
        self,
        model: Model,
        capacity: int | str = 64,
        *,
        queue: int = 1024,
        max_wait: float = 60.0,
        execution: ExecutionOptions | None = None,
        shallow_model: Model | None = None,
        t_switch: float | None = None,
        threaded: bool = True,
        clock: Callable[[], float] = time.monotonic,
        forward: Callable[..., ForwardOutput] | None = None,
    ):
        whole("queue", queue, 1)
        _check_seconds("max_wait", max_wait)
        switch = two_stage(model, shallow_model, t_switch)
        if switch is not None and forward is not None:
            raise ValueError("shallow_model and forward both say what a forward pass is; give one")
        self.model, self.queue = model, queue
        self.capacity = min(capacity_of(one, capacity) for one in (model, shallow_model) if one is not None)
        self._clock = clock
        self._make_batch = partial(Batch, model, self.capacity, execution=execution, forward=switch or forward)
        self._batch = self._make_batch()
        self._waiting = RequestQueue(float(max_wait))
        self._at: dict[int, Handle] = {}  # slot -> request
        self._handles: weakref.WeakSet[Handle] = weakref.WeakSet()  # of all requests, for a forked process
        self._closing = self._aborting = self._over = False
        self._closed = "this engine is closed"
        self._broken: BaseException | None = None  # what ended the thread
        self._ended = {"finished": 0, "failed": 0, "cancelled": 0}
        self._inside: int | None = None  # the thread that makes a step
        self._make_locks()
        self._thread: threading.Thread | None = None
        _engines.add(self)
        if threaded:
            self._thread = threading.Thread(target=self._work, name="adadiff-engine", daemon=True)
            self._thread.start()

    def _make_locks(self) -> None:
        """Locks of C, and bells: a signal cannot leave any of them held, see waking.py."""
        self._lock = threading.RLock()  # guards what clients and the engine change
        self._stepping = threading.RLock()  # one step at a time
        self._work_bell = Bell()  # for the engine's thread
        self._bells = Bells()  # for clients who wait for room, or for the end

    def submit(
        self,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        on_step: Callable[[Handle], object] | None = None,
        wait: float = 0.0,
        **settings: object,
    ) -> Handle:
        """Asks for one sample. params: what it asks for, a seed at least; settings: the same by name.

        priority: 0 to 100, the more the earlier. deadline: seconds from now, after which the request fails. on_step:
        called with the handle after each of its steps, in the engine's thread; what it raises fails this request.
        wait: seconds to wait for room in the queue.
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
        params = SamplingParams.of(params, settings)
        if params.seed is None:
            raise ValueError("a request needs a seed; its image belongs to it")
        samples = SampleBatch.of(self.model, 1, params)
        if samples.lanes > self.capacity:
            raise ValueError(f"a guided request takes {samples.lanes} lanes, but the capacity is {self.capacity}")
        if self.model.device != self._batch.device:
            raise ValueError(
                f"this engine was made for a model on {self._batch.device}, which is on {self.model.device} now; make "
                "another engine"
            )
        until, bell = time.monotonic() + wait, None
        while True:
            with self._lock:
                if self._closing:
                    raise EngineClosed(self._closed) from self._broken
                if not self._waiting.full(self.queue):
                    now = self._clock()
                    end = math.inf if deadline is None else now + deadline
                    handle = Handle(samples, self, now, end, priority, on_step)
                    handle.add_done_callback(self._on_end)
                    self._handles.add(handle)
                    self._waiting.add(handle, priority)
                    break
            left = until - time.monotonic()
            if left <= 0 or self._inside == threading.get_ident():  # who would make room?
                raise EngineFull(f"{self.queue} requests wait already, the most this engine holds")
            if bell is None:
                bell = self._bells.take()  # and look once more
            else:
                bell.wait(min(left, LOOK_AGAIN))
                bell = None
        self._work_bell.ring()
        return handle

    def step(self) -> bool:
        """One tick of an engine without a thread: admits who waits, makes a step for all. False if nobody is there."""
        if self._thread is not None and threading.current_thread() is not self._thread:
            raise RuntimeError("this engine has a thread of its own; `step` is for threaded=False")
        if self._inside == threading.get_ident():
            raise RuntimeError("`step` was called from within a step, by a callback")
        with self._stepping:
            try:
                self._inside = threading.get_ident()
                return self._step()
            finally:
                self._inside = None
                if self._aborting and self._thread is None:
                    self._abort()

    def _step(self) -> bool:
        if not self._batch.whole:
            self._start_over()
        self._batch.whole = False
        self._drop_late()
        self._admit()
        self._batch.whole = True
        if not self._batch.count:
            return False
        self._deliver(self._batch.tick())  # not whole from the moment on that it writes
        self._batch.whole = True
        return True

    def _start_over(self) -> None:
        """A signal came in the middle of the books, so nobody knows what was written. All that are in flight begin
        again, each from its seed."""
        fresh = self._make_batch()
        fresh.totals, fresh.whole = self._batch.totals, False
        self._batch = fresh
        for slot, handle in list(self._at.items()):
            if not handle.over:
                handle._begin_again()
                self._waiting.add(handle, handle.priority)
            del self._at[slot]
        fresh.whole = True

    @property
    def report(self) -> EngineReport:
        with self._lock:
            totals = dataclasses.replace(self._batch.totals)
            return EngineReport(self._waiting.count, len(self._at), **self._ended, batch=totals)

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests; finishes those it has (drain), or cancels them after the tick that is under way.

        Waits until that is done. Raises TimeoutError after `timeout` seconds; then call it again.
        """
        if not drain:
            self._aborting = True
        self._closing = True
        self._work_bell.ring()
        self._bells.ring()
        if self._inside == threading.get_ident() or self._thread is threading.current_thread():
            return  # a callback asks; what is under way comes first
        until = math.inf if timeout is None else time.monotonic() + timeout
        if self._thread is None:
            while not self._aborting and self.step():
                if time.monotonic() >= until:
                    raise TimeoutError(f"the engine was not done after {timeout} seconds")
            with self._stepping:
                self._abort()
            self._log_never_acted()
            return
        while not self._over:
            if (left := until - time.monotonic()) <= 0:
                raise TimeoutError(f"the engine was not done after {timeout} seconds")
            bell = self._bells.take()
            if not self._over:
                bell.wait(min(left, LOOK_AGAIN))
        self._thread.join(LOOK_AGAIN)  # it ends by itself now
        self._log_never_acted()

    def _log_never_acted(self) -> None:
        if self.report.never_acted:
            log_never_acted("of all requests to an engine")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(drain=kind is None)

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                self.step()
        except BaseException as error:  # a defect of ours; nobody must wait for ever
            self._fail_all(error)
            raise
        finally:
            self._abort()
            self._over = True
            self._bells.ring()

    def _wait_for_work(self) -> bool:
        """Returns when there is something to do; False at the end."""
        while True:
            with self._lock:
                busy = bool(self._at) or self._waiting.first() is not None
                if self._aborting or (self._closing and not busy):
                    return False
            if busy:
                return True
            self._work_bell.wait()

    def _drop_late(self) -> None:
        """Frees the slots of requests that were cancelled or are too late."""
        now = self._clock()
        for slot, handle in list(self._at.items()):
            if not handle.over and now < handle.deadline:
                continue
            if not handle.over:
                self._end(handle, error=_too_late(handle))
            self._give_up(slot)

    def _admit(self) -> None:
        now = self._clock()
        with self._lock:
            late = self._waiting.late(now)
        for handle in late:
            self._end(handle, error=_too_late(handle))
        lanes = sum(handle._lanes for handle in self._at.values())
        while True:
            with self._lock:
                handle = self._waiting.first()
                if handle is None or lanes + handle._lanes > self.capacity:
                    break
                error = self._begin(handle, now)
            if error is None:
                lanes += handle._lanes
            else:
                self._end(handle, error=error)
        self._bells.ring()  # there may be room in the queue

    def _begin(self, handle: Handle, now: float) -> BaseException | None:
        """A request gets its slot, unless it cannot begin, for the reason returned."""
        try:
            slot = int(self._batch.admit(handle.samples, _ONLY)[0])
        except BaseException as error:
            if is_interrupt(error):
                raise
            return error
        self._at[slot], handle._admitted = handle, now
        handle._slot = slot, self._batch.tenancy(slot)
        self._waiting.pop()
        return None

    def _deliver(self, tick: Tick) -> None:
        for record in tick.records:
            known, keys = record.read(), zip(record.slots.tolist(), record.tenancy.tolist(), strict=True)
            for i, (slot, tenancy) in enumerate(keys):
                handle = self._at.get(slot)
                if handle is not None and handle._slot == (slot, tenancy):  # else it was given up in the meantime
                    handle._learn(known, i)
        for slot, error in tick.failed.items():
            self._end(self._at[slot], error=error)
            self._give_up(slot)
        images = self._images(tick.done)
        for slot in tick.slots.tolist():
            handle = self._at[slot]
            handle._made += 1
            error = self._call_back(handle)
            if error is not None:
                self._end(handle, error=error)
            elif (image := images.get(slot)) is None:
                continue
            elif isinstance(image, Exception):
                self._end(handle, error=image)
            elif bool(image.isfinite().all()):
                self._end(handle, image=image.clone())
            else:
                self._end(handle, error=FloatingPointError("the image holds NaN or infinity"))
            self._give_up(slot)

    def _images(self, done: np.ndarray) -> dict[int, Tensor | Exception]:
        """By slot, on the CPU, or why they did not get there."""
        try:
            return dict(zip(done.tolist(), self._batch.peek(done).cpu(), strict=True))
        except Exception as error:  # memory, most likely
            return dict.fromkeys(done.tolist(), error)

    @staticmethod
    def _call_back(handle: Handle) -> BaseException | None:
        """After a step of its own. Returns what the callback raised."""
        try:
            if handle._on_step is not None and not handle.over:
                handle._on_step(handle)
        except BaseException as error:
            return error
        return None

    def _predicted_x0(self, handle: Handle) -> Tensor:
        with self._stepping:
            if handle._slot is None or self._at.get(handle._slot[0]) is not handle:
                raise ValueError("this request is not in flight: it waits, or has ended")
            return self._batch.predicted_x0(handle._slot[0]).cpu()

    def _give_up(self, slot: int) -> None:
        del self._at[slot]
        self._batch.release(np.array([slot]))

    def _end(self, handle: Handle, image: Tensor | None = None, error: BaseException | None = None) -> None:
        """Each handle ends once; one that was cancelled in the meantime has ended already."""
        handle._ended = self._clock()
        _tell(handle, partial(handle.set_result, image) if error is None else partial(handle.set_exception, error))

    def _on_end(self, handle: Handle) -> None:
        """Called once for each handle, in whatever thread ended it."""
        if handle.cancelled():
            kind = "cancelled"
            handle._ended = self._clock()
            handle.set_running_or_notify_cancel()  # for those who wait through concurrent.futures.wait
        else:
            kind = "finished" if handle.exception() is None else "failed"
        with self._lock:
            self._ended[kind] += 1
            if handle._admitted is None:
                self._waiting.left()
        self._bells.ring()

    def _fail_all(self, error: BaseException) -> None:
        with self._lock:
            self._broken = error
            self._closing = self._aborting = True
            handles = [*self._at.values(), *self._waiting.all()]
        for handle in handles:
            if not handle.over:
                self._end(handle, error=error)

    def _abort(self) -> None:
        """Cancels whatever is left."""
        with self._lock:
            self._closing = self._aborting = True
            handles = [*self._at.values(), *self._waiting.all()]
        for handle in handles:
            if not handle.over:
                _tell(handle, handle.cancel)
        self._waiting.clear()
        while self._at:
            self._give_up(next(iter(self._at)))

    def _end_in_child(self) -> None:
        """In a forked process: the thread is not there, and may have held locks. Requests are the parent's."""
        self._make_locks()
        self._closing = self._aborting = self._over = True
        self._closed = "this engine was made in the parent of this process, and does not survive a fork; make one here"
        self._thread, self._inside = None, None
        self._at.clear()
        self._waiting.clear()
        for handle in list(self._handles):
            handle._end_in_child(EngineClosed(self._closed))


_ONLY = np.zeros(1, dtype=np.int64)
_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()


def _tell(handle: Handle, end: Callable[[], object]) -> None:
    """Calls `end`, which ends the handle. Whoever waits through `concurrent.futures.wait` shares locks with it that a
    signal can leave held. Then another thread waits for them, and the engine goes on."""

    def once() -> None:
        try:
            end()
        except InvalidStateError:  # cancelled in the meantime
            return

    if not handle._waiters and handle._condition.acquire(timeout=LOCK_SECONDS):
        handle._condition.release()
        once()
    else:
        thread = threading.Thread(target=once, name="adadiff-handle", daemon=True)
        thread.start()
        thread.join(LOCK_SECONDS)


@atexit.register
def _stop() -> None:
    """The interpreter ends: requests that nobody waited for are cancelled."""
    for engine in list(_engines):
        try:
            if engine._thread is not None:
                engine.close(drain=False, timeout=EXIT_SECONDS)
        except TimeoutError:
            continue


def _after_fork() -> None:
    for engine in list(_engines):
        engine._end_in_child()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def _check_seconds(name: str, value: float) -> None:
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")


def _too_late(handle: Handle) -> DeadlineExceeded:
    made, steps = handle.progress
    return DeadlineExceeded(f"{made} of {steps} steps were made by the deadline")
