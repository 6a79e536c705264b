"""Continuous batching: requests arrive at any time, share every forward pass, and end one by one."""

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
LOOK_AGAIN = 1.0  # seconds after which clients who wait look again, should a signal have cost them a ring


class Engine:
    """Draws samples for requests that come from any thread.

    capacity: lanes in one forward pass (a guided request takes two), or the bytes they may take as "512MiB" or "2GiB"
    (a request that reuses earlier steps then takes the room of more lanes, for what is kept of it).
    queue: requests that may wait. max_wait: seconds after which a request goes before later ones of a higher priority,
    see request_queue.py. admission: "arrival", first come, first served, or "work", those of whom the least work is
    expected first, see admission.py. execution: how forward passes are run.
    shallow_model, t_switch: another network at the noisy timesteps of all requests, see `sample`.
    threaded=False: no thread of its own, `step` makes each tick. warm: what execution's runner="captured" captures is
    captured before the first tick, which takes seconds; `ready` says when that is done.
    clock: seconds, for tests and simulations; forward: see `Batch`.
    As a context manager it drains at the end, and aborts after an exception.

    What code of a request raises (callbacks, policies), be it SystemExit, fails that request alone. A signal handler
    that raises, such as Ctrl-C, leaves the engine in order at any place of any of its methods; what it raises in a
    step of threaded=False may fail the request that it hits where it is an `Exception`. An engine that nobody holds
    ends its thread once its requests have ended. It does not survive a fork: in the child, its requests have failed
    and `submit` raises EngineClosed.
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
        self._handles: weakref.WeakSet[Handle] = weakref.WeakSet()  # of all requests, for a forked process
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
        """Locks and a queue of C, and bells: a signal cannot leave any of them held, see waking.py."""
        self._lock = threading.RLock()  # guards what clients and the engine change
        self._stepping = threading.RLock()  # one step at a time
        self._calls: SimpleQueue[Engine | None] = SimpleQueue()  # for the engine's thread
        self._bells = Bells()  # for clients who wait for room, or for the end

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
            deadline = seconds("deadline", deadline)
        if on_step is not None and not callable(on_step):
            raise ValueError(f"on_step must be callable with a handle, got {on_step!r}")
        wait = seconds("wait", wait, least=0.0)
        params = SamplingParams.of(params, settings)
        if params.seed is None:
            raise ValueError("a request needs a seed; its image belongs to it")
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
            if left <= 0 or self._is_above():  # who would make room?
                raise EngineFull(f"{self.queue} requests wait already, the most this engine holds")
            if bell is None:
                bell = self._bells.take()  # and look once more
            else:
                bell.wait(min(left, LOOK_AGAIN))
                bell = None
        self._call()
        return handle

    def _call(self) -> None:
        """There is something to do for the thread. One call is enough for all who come before it is heard."""
        if self._calls.empty():
            self._calls.put(self)

    def step(self) -> bool:
        """One tick of an engine without a thread: admits who waits, makes a step for all. False if nobody is there."""
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
        """In the thread that makes the ticks, since what is captured belongs to one."""
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
        """Whether the next tick is like all others: False while an engine that was asked to be `warm` is not, or is
        closed."""
        return not self._cold and not self._closing

    @property
    def alive(self) -> bool:
        """Whether requests can still be drawn: False once it is closed and done, once a defect or anything else has
        ended its thread, and in a forked process. While it drains it is alive."""
        return not self._over and (self._thread is None or self._thread.is_alive())

    @property
    def report(self) -> EngineReport:
        with self._lock:
            totals = dataclasses.replace(self._batch.totals)
            return EngineReport(self._waiting.count, len(self._running), **self._ended, batch=totals)

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests; finishes those it has (drain), or cancels them after the tick that is under way.

        Waits until that is done. Raises TimeoutError after `timeout` seconds; then call it again.
        """
        if timeout is not None:
            timeout = seconds("timeout", timeout, least=0.0)
        if not drain:
            self._aborting = True
        self._closing = True
        self._call()
        self._bells.ring()
        if self._is_above():
            return  # what is under way comes first
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
        """Whether a callback asks, or a signal handler within `submit`: nothing goes on until it returns."""
        own = self._stepping._is_owned() or self._lock._is_owned()  # type: ignore[attr-defined]
        return own or threading.current_thread() is self._thread

    def _log_never_acted(self) -> None:
        self.report.batch.log_idle("of all requests to an engine")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(drain=kind is None)

    def _work(self) -> bool:
        """Makes steps until there is nothing to do. False at the end."""
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
        except BaseException as error:  # a defect of ours; nobody must wait for ever
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
        """One that has ended, in whatever thread."""
        if handle.cancelled():
            kind, handle._ended = "cancelled", self._clock()
        else:
            kind = "finished" if handle.exception() is None else "failed"
        with self._lock:
            if not handle._counted:  # no call in between, hence no signal
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
        """Cancels whatever is left."""
        with self._lock:
            self._closing = self._aborting = True
            handles = [*self._running.handles, *self._waiting.all()]
        for handle in handles:
            if not handle.over:
                handle._tell(handle.cancel)
        self._waiting.clear()
        self._running.give_up_all()

    def _end_in_child(self) -> None:
        """In a forked process: the thread is not there, and may have held locks. Requests are the parent's."""
        self._make_locks()
        self._closing = self._aborting = self._over = True
        self._closed = "this engine was made in the parent of this process, and does not survive a fork; make one here"
        self._thread = None
        self._running.forget()
        self._waiting.clear()
        for handle in list(self._handles):
            handle._end_in_child(EngineClosed(self._closed))


def _serve(calls: "SimpleQueue[Engine | None]") -> None:
    """What the thread of an engine does. It holds the engine while there is work: one that all have forgotten ends."""
    while (engine := calls.get()) is not None and engine._work():
        del engine
