"""Continuous batching: requests arrive at any time, share every forward pass, and end one by one."""

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from numbers import Real

import numpy as np
from torch import Tensor

from ..forward.options import ExecutionOptions
from ..forward.output import ForwardOutput
from ..forward.two_stage import two_stage
from ..model import Model
from ..sampling.batch import Batch, Tick
from ..sampling.capacity import capacity_of
from ..sampling.params import SamplingParams
from ..sampling.sample_batch import SampleBatch, whole
from .handles import DeadlineExceeded, EngineClosed, EngineFull, EngineReport, Handle
from .request_queue import RequestQueue

MOST_PRIORITY = 100
EXIT_SECONDS = 60.0  # that the end of the interpreter waits for the tick that is under way


class Engine:
    """Draws samples for requests that come from any thread.

    capacity: lanes in one forward pass (a guided request takes two), or the bytes they may take as "512MiB" or "2GiB".
    queue: requests that may wait. max_wait: seconds after which a request goes before later ones of a higher priority,
    see request_queue.py. execution: how forward passes are run.
    shallow_model, t_switch: another network at the noisy timesteps of all requests, see `sample`.
    threaded=False: no thread of its own, `step` makes each tick.
    clock: seconds, for tests and simulations; forward: see `Batch`.
    As a context manager it drains at the end, and aborts after an exception.
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
        self._batch = Batch(model, self.capacity, execution=execution, forward=switch or forward)
        self._changed = threading.Condition()  # guards everything below
        self._waiting = RequestQueue(float(max_wait))
        self._at: dict[int, Handle] = {}  # slot -> request
        self._closing = self._aborting = False
        self._broken: BaseException | None = None  # what ended the thread
        self._ended = {"finished": 0, "failed": 0, "cancelled": 0}
        self._stepping = threading.RLock()  # one step at a time
        self._inside: int | None = None  # the thread that makes it
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._work, name="adadiff-engine", daemon=True)
            self._thread.start()
            _running.add(self)

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
            handle = Handle(samples, self, now, end, on_step)
            self._waiting.add(handle, priority)
            handle.add_done_callback(self._on_end)
            self._changed.notify_all()
        return handle

    def step(self) -> bool:
        """One tick of an engine without a thread: admits who waits, makes a step for all. False if nobody is there."""
        if self._thread is not None and threading.current_thread() is not self._thread:
            raise RuntimeError("this engine has a thread of its own; `step` is for threaded=False")
        if self._inside == threading.get_ident():
            raise RuntimeError("`step` was called from within a step, by a callback")
        with self._stepping:
            self._inside = threading.get_ident()
            try:
                self._drop_late()
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

    def _drop_late(self) -> None:
        """Frees the slots of requests that were cancelled or are too late."""
        now = self._clock()
        for slot, handle in list(self._at.items()):
            if handle._ended is not None:  # `done` takes a lock
                self._give_up(slot)
            elif now >= handle.deadline:
                self._give_up(slot)
                self._end(handle, error=_too_late(handle))

    def _admit(self) -> None:
        with self._changed:
            now = self._clock()
            failed: list[tuple[Handle, Exception]] = [(one, _too_late(one)) for one in self._waiting.late(now)]
            lanes = sum(handle._lanes for handle in self._at.values())
            while (handle := self._waiting.first(now)) and lanes + handle._lanes <= self.capacity:
                self._waiting.pop()
                try:
                    slot = int(self._batch.admit(handle.samples, _ONLY)[0])
                except Exception as error:
                    failed.append((handle, error))
                else:
                    self._at[slot], handle._admitted = handle, now
                    handle._slot = slot, self._batch.tenancy(slot)
                    self._waiting.left()
                    lanes += handle._lanes
            self._changed.notify_all()  # there may be room in the queue
        for one, why in failed:
            self._end(one, error=why)

    def _deliver(self, tick: Tick) -> None:
        for record in tick.records:
            known, keys = record.read(), zip(record.slots.tolist(), record.tenancy.tolist(), strict=True)
            for i, (slot, tenancy) in enumerate(keys):
                handle = self._at.get(slot)
                if handle is not None and handle._slot == (slot, tenancy):  # else it was given up in the meantime
                    handle._learn(known, i)
        for slot, error in tick.failed.items():
            self._end(self._give_up(slot), error=error)
        images = dict(zip(tick.done.tolist(), self._batch.take(tick.done).cpu(), strict=True))
        for slot in tick.slots.tolist():
            handle = self._at[slot]
            handle._made += 1
            try:
                if handle._on_step is not None and not handle.done():
                    handle._on_step(handle)
            except Exception as error:
                if slot not in images:
                    self._batch.release(np.array([slot]))
                images.pop(slot, None)
                del self._at[slot]
                self._end(handle, error=error)
                continue
            if slot in images:
                del self._at[slot]
                if bool(images[slot].isfinite().all()):
                    self._end(handle, image=images[slot].clone())
                else:
                    self._end(handle, error=FloatingPointError("the image holds NaN or infinity"))

    def _predicted_x0(self, handle: Handle) -> Tensor:
        with self._stepping:
            if handle._slot is None or self._at.get(handle._slot[0]) is not handle:
                raise ValueError("this request is not in flight: it waits, or has ended")
            return self._batch.predicted_x0(handle._slot[0]).cpu()

    def _give_up(self, slot: int) -> Handle:
        self._batch.release(np.array([slot]))
        return self._at.pop(slot)

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


_ONLY = np.zeros(1, dtype=np.int64)
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


def _too_late(handle: Handle) -> DeadlineExceeded:
    made, steps = handle.progress
    return DeadlineExceeded(f"{made} of {steps} steps were made by the deadline")
