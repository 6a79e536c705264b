"""Continuous batching: requests arrive at any time, share forward passes, and finish independently."""

import dataclasses
import math
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from ..forward.options import ExecutionOptions
from ..forward.output import ForwardOutput
from ..forward.two_stage import two_stage
from ..model import Model
from ..sampling.arriving import Arriving
from ..sampling.batch import Batch
from ..sampling.capacity import Rooms, capacity_of
from ..sampling.params import SamplingParams
from ..sampling.sample_batch import SampleBatch, whole
from .admission import expected_work
from .checks import seconds
from .handles import EngineClosed, EngineFull, EngineReport, Handle
from .process import end_with_process
from .request_queue import RequestQueue
from .running import Running
from .waking import Bells

MOST_PRIORITY = 100
LOOK_AGAIN = 1.0  # seconds after which waiting clients check again, in case a signal swallowed a wake-up


class Engine:
    """Draws samples for requests from any thread.

    capacity: lanes in one forward pass (a guided request takes two), or memory for them as "512MiB" or "2GiB" (a
    request that reuses earlier steps then counts for more lanes, by the memory of its cached features).
    queue: the most waiting requests. max_wait: a request is due so many seconds after it was submitted, or at its
    deadline if that is sooner; each level of priority makes it due max_wait seconds earlier; the earliest comes first.
    admission: "arrival", first come, first served, or "work", least expected work first: a request is then due sooner
    within max_wait, the less work it is expected to take. execution: how forward passes are run.
    shallow_model, t_switch: another network at the noisy timesteps of all requests, see `sample`.
    threaded=False: no thread; call `step` for each tick. warm: capture the CUDA graphs of runner="captured" before the
    first tick, which takes seconds; `ready` tells when that is done.
    clock: returns seconds, for tests and simulations; forward: see `Batch`.
    As a context manager it drains on exit, and aborts after an exception.
    Raises ValueError for invalid arguments.

    An exception in code of a request (callbacks, policies), even SystemExit, fails that request only. A signal handler
    that raises, as for Ctrl-C, leaves the engine consistent wherever it interrupts; with threaded=False an `Exception`
    raised by a handler during `step` may fail the request it interrupts. An engine without references ends its thread
    once its requests have ended. It does not survive a fork: in the child, its requests have failed and `submit` raises
    EngineClosed.
    """

    def __init__(
        self,
        model: Model,
        capacity: int | str = 64,
        *,
        queue: int = 1024,
        max_wait: float = 60.0,
        admission: str = "arrival",
        execution: ExecutionOptions | None = None,
        shallow_model: Model | None = None,
        t_switch: float | None = None,
        threaded: bool = True,
        warm: bool = False,
        clock: Callable[[], float] = time.monotonic,
        forward: Callable[..., ForwardOutput] | None = None,
    ):
        whole("queue", queue, 1)
        max_wait = seconds("max_wait", max_wait)
        switch = two_stage(model, shallow_model, t_switch)
        self.model, self.shallow_model, self.queue = model, shallow_model, queue
        self.capacity = min(capacity_of(one, capacity) for one in (model, shallow_model) if one is not None)
        self._clock, self._rooms = clock, Rooms(model, capacity)
        make_batch = partial(
            Batch, model, self.capacity, execution=execution, choice=switch, forward=forward, late=True
        )
        self._waiting = RequestQueue(max_wait, expected_work(admission, model))
        self._running = Running(make_batch, self._waiting, clock)
        self._handles: weakref.WeakSet[Handle] = weakref.WeakSet()  # all requests, to fail them in a forked process
        self._closing = self._aborting = self._over = False
        self._closed = "this engine is closed"
        self._broken: BaseException | None = None  # what ended the thread
        self._ended = {"finished": 0, "failed": 0, "cancelled": 0}
        self._make_locks()
        self._cold = warm
        self._thread: threading.Thread | None = None
        end_with_process(self)
        if threaded:
            weakref.finalize(self, self._calls.put, None).atexit = False
            thread = threading.Thread(target=_serve, args=(self._calls,), name="adadiff-engine", daemon=True)
            thread.start()
            self._thread = thread
            if warm:
                self._call()

    def _make_locks(self) -> None:
        """Locks and a queue implemented in C, and bells: a signal cannot leave any of them held, see waking.py."""
        self._lock = threading.RLock()  # guards data that clients and the engine change
        self._stepping = threading.RLock()  # one step at a time
        self._calls: SimpleQueue[Engine | None] = SimpleQueue()  # wakes the engine's thread
        self._bells = Bells()  # wakes clients that wait for room in the queue, or for the end

    @property
    def _batch(self) -> Batch:
        return self._running.batch

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
        """Submits a request for one sample. params: sampling parameters, with a seed; settings: the same by name.

        priority: 0 to 100, higher is earlier. deadline: seconds from now after which the request fails with
        DeadlineExceeded. on_step: called with the handle after each step, in the engine's thread; an exception in it
        fails this request. wait: seconds to wait for room in the queue.
        Raises ValueError for invalid arguments, EngineFull if the queue stays full, EngineClosed.
        """
        whole("priority", priority, 0)
        if priority > MOST_PRIORITY:
            raise ValueError(f"priority must be at most {MOST_PRIORITY}, got {priority}")
        if deadline is not None:
            deadline = seconds("deadline", deadline)
        if on_step is not None and not callable(on_step):
            raise ValueError(f"on_step must be callable with a handle, got {on_step!r}")
        wait = seconds("wait", wait, least=0.0)
        params = SamplingParams.of(params, settings)
        if params.seed is None:
            raise ValueError("a request needs a seed, which determines its image")
        samples = SampleBatch.of(self.model, 1, params)
        lanes = self._rooms.of(samples)
        if lanes > self.capacity:
            kind = "guided" if lanes == samples.lanes else "reusing"
            raise ValueError(f"a {kind} request takes {lanes:.3g} lanes, but the capacity is {self.capacity}")
        self._batch.check(samples)
        if self.model.device != self._batch.device:
            raise ValueError(
                f"this engine was made for a model on {self._batch.device}, which is on {self.model.device} now; make "
                "another engine"
            )
        kind, until, bell = self._waiting.kind_of(samples), time.monotonic() + wait, None
        while True:
            with self._lock:
                if self._closing:
                    raise EngineClosed(self._closed) from self._broken
                if not self._waiting.full(self.queue):
                    now = self._clock()
                    end = math.inf if deadline is None else now + deadline
                    handle = Handle(samples, self, now, end, priority, on_step, lanes, kind)
                    self._handles.add(handle)
                    self._waiting.add(handle)
                    break
            left = until - time.monotonic()
            if left <= 0 or self._is_above():  # in a callback: waiting would block the engine
                raise EngineFull(f"{self.queue} requests wait already, the most this engine holds")
            if bell is None:
                bell = self._bells.take()  # then check once more before waiting
            else:
                bell.wait(min(left, LOOK_AGAIN))
                bell = None
        self._call()
        return handle

    def _call(self) -> None:
        """Wakes the engine's thread. A pending call is not repeated."""
        if self._calls.empty():
            self._calls.put(self)

    def step(self) -> bool:
        """One tick of an engine with threaded=False: admits waiting requests and advances all by a step. Returns False
        if there are no requests. Raises RuntimeError in an engine with a thread, and within a callback."""
        if self._thread is not None and threading.current_thread() is not self._thread:
            raise RuntimeError("this engine has a thread of its own; `step` is for threaded=False")
        if self._stepping._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError("`step` was called from within a step, by a callback")
        with self._stepping:
            try:
                return self._step()
            finally:
                if self._aborting and self._thread is None:
                    self._abort()

    def _warm(self) -> None:
        """Captures CUDA graphs, in the thread that makes the ticks: graphs belong to a thread."""
        if self._cold:
            self._running.batch.warm()
            self._cold = False

    def _step(self) -> bool:
        self._warm()
        running = self._running
        if not running.batch.whole:
            with self._lock:
                running.start_over()
        running.batch.whole = False
        running.drop_ended()
        self._admit()
        running.batch.whole = True
        return running.tick()

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and the engine is warm (if asked for): False before that, and once closed."""
        return not self._cold and not self._closing

    @property
    def alive(self) -> bool:
        """Whether requests can still finish: True also while it drains; False once it is closed and done, once its
        thread has ended by an error, and in a forked process."""
        return not self._over and (self._thread is None or self._thread.is_alive())

    @property
    def report(self) -> EngineReport:
        with self._lock:
            totals = dataclasses.replace(self._batch.totals)
            # one that is over may still hold its slot
            running = sum(not handle.over for handle in self._running.handles)
            return EngineReport(self._waiting.count, running, **self._ended, batch=totals)

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Accepts no more requests; finishes those in the engine (drain), or cancels them after the present tick.

        Waits until that is done. Raises TimeoutError after `timeout` seconds; it can then be called again.
        """
        if timeout is not None:
            timeout = seconds("timeout", timeout, least=0.0)
        if not drain:
            self._aborting = True
        self._closing = True
        self._call()
        self._bells.ring()
        if self._is_above():
            return  # in a callback: the tick has to finish first
        until = math.inf if timeout is None else time.monotonic() + timeout
        if self._thread is None:
            while not self._aborting and self.step():
                if time.monotonic() >= until:
                    raise TimeoutError(f"the engine was not done after {timeout} seconds")
            with self._stepping:
                self._abort()
            self._over = True
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

    def _is_above(self) -> bool:
        """Whether the caller is a callback, or a signal handler within `submit`: the engine waits until it returns."""
        holds_lock = self._stepping._is_owned() or self._lock._is_owned()  # type: ignore[attr-defined]
        return holds_lock or threading.current_thread() is self._thread

    def _log_never_acted(self) -> None:
        self.report.batch.log_idle("of all requests to an engine")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(drain=kind is None)

    def _work(self) -> bool:
        """Makes steps until there is nothing to do. Returns False once the engine has ended."""
        end = False
        try:
            if not self._closing:
                self._warm()
            while True:
                with self._lock:
                    busy = len(self._running) > 0 or self._waiting.first() is not None
                    end = self._aborting or (self._closing and not busy)
                if end or not busy:
                    return not end
                self.step()
        except BaseException as error:  # a bug of this package: fail all requests, so that no client waits forever
            end = True
            self._fail_all(error)
            raise
        finally:
            if end:
                self._abort()
                self._over = True
                self._bells.ring()

    def _admit(self) -> None:
        now = self._clock()
        with self._lock:
            late = self._waiting.late(now)
        for handle in late:
            handle._end_late(self._clock())
        lanes = self._running.lanes
        while True:
            with self._lock:
                handle = self._waiting.first()
                if handle is None or lanes + handle._lanes > self.capacity:
                    break
                error = self._running.begin(handle, now)
            if error is None:
                lanes += handle._lanes
            else:
                handle._end(self._clock(), error=error)
        self._bells.ring()  # there may be room in the queue

    def _predicted_x0(self, handle: Handle) -> Arriving:
        with self._stepping:
            return self._running.predicted_x0(handle)

    def _count(self, handle: Handle) -> None:
        """Counts a request that has ended, in any thread."""
        if handle.cancelled():
            kind, handle._ended = "cancelled", self._clock()
        else:
            kind = "finished" if handle.exception() is None else "failed"
        with self._lock:
            if not handle._counted:  # no Python call in between, so no signal handler runs
                self._ended[kind] += 1
                handle._counted = True
                if kind == "finished":
                    self._waiting.learn(handle)
            if handle._admitted is None:
                self._waiting.left()
        self._bells.ring()

    def _fail_all(self, error: BaseException) -> None:
        with self._lock:
            self._broken = error
            self._closing = self._aborting = True
            handles = [*self._running.handles, *self._waiting.all()]
        for handle in handles:
            if not handle.over:
                handle._end(self._clock(), error=error)

    def _abort(self) -> None:
        """Cancels all remaining requests."""
        with self._lock:
            self._closing = self._aborting = True
            handles = [*self._running.handles, *self._waiting.all()]
        for handle in handles:
            if not handle.over:
                handle._tell(handle.cancel)
        self._waiting.clear()
        self._running.give_up_all()

    def _end_in_child(self) -> None:
        """Closes the engine in a forked process: its thread does not exist there, and may have held locks."""
        self._make_locks()
        self._closing = self._aborting = self._over = True
        self._closed = "this engine was made in the parent of this process, and does not survive a fork; make one here"
        self._thread = None
        self._running.forget()
        self._waiting.clear()
        for handle in list(self._handles):
            handle._end_in_child(EngineClosed(self._closed))


def _serve(calls: "SimpleQueue[Engine | None]") -> None:
    """The loop of an engine's thread. It references the engine only while there is work, so that an unreferenced engine
    can be freed."""
    while (engine := calls.get()) is not None and engine._work():
        del engine
