"""An engine under everything at once: arrivals, cancels, deadlines, faults and memory that runs out, at random.

Every request ends exactly once and as it should, images are right, and nothing is left behind.
"""

import concurrent.futures
import dataclasses
import gc
import random
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from adadiff.diffusion.solvers import DDIM
from adadiff.engine.engine import Engine
from adadiff.engine.handles import DeadlineExceeded, EngineFull, Handle
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.interface import ExitContext, ExitPolicy
from adadiff.sampling.batch import SPARE
from sampler.tiny import SERVED, Clock, alone, requests, served

CONFIG = dataclasses.replace(SERVED, network=dataclasses.replace(SERVED.network, dim=8, depth=2))
NAN, BROKEN = 1, 2  # labels of samples that turn to NaN, or break their forward pass
QUEUE = 20
POOL = [request for request in requests(200, seed=50, most=4) if request["class_labels"] in (None, 0)][:25]


@cache
def wanted(index: int, batch_invariant: bool) -> tuple[Tensor, Tensor]:
    return alone(POOL[index], served(CONFIG), batch_invariant)


class Faulty:
    """A forward pass in which some samples fail, and which after a while has memory for half the lanes only."""

    def __init__(self, capacity: int):
        self.capacity, self.calls = capacity, 0

    def __call__(self, *args: object, **options: object) -> ForwardOutput:
        self.calls += 1
        labels = args[3]
        assert len(labels) <= self.capacity
        if self.calls > 100 and len(labels) > self.capacity // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if bool((labels == BROKEN).any()):
            raise ArithmeticError("broken")
        result = run_forward(*args, **options)
        result.prediction[labels == NAN] = torch.nan
        return result


@dataclasses.dataclass(frozen=True)
class Raises(ExitPolicy):
    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        raise ZeroDivisionError


class Crowd:
    """Requests that were submitted, what each of them may come to, and how often each has ended."""

    def __init__(self, engine: Engine, batch_invariant: bool):
        self.engine, self.batch_invariant = engine, batch_invariant
        self.ends: Counter[Handle] = Counter()
        self.may: dict[Handle, set[type]] = {}
        self.of_pool: dict[Handle, int] = {}
        self._lock = threading.Lock()

    def submit(self, draw: random.Random, **options: object) -> Handle | None:
        kind = draw.choices(
            ["good", "late", "nan", "broken", "shouts", "stops itself", "new setting", "raises"],
            [60, 10, 4, 4, 8, 6, 8, 4],
        )[0]
        index = draw.randrange(len(POOL))
        request, may = {**POOL[index], "priority": draw.choice([0, 0, 0, 1, 5])}, set()
        if kind == "late":
            request["deadline"], may = draw.uniform(0.1, 12), {DeadlineExceeded}
        elif kind in ("nan", "broken"):
            request["class_labels"], may = (NAN, {FloatingPointError}) if kind == "nan" else (BROKEN, {ArithmeticError})
        elif kind in ("shouts", "stops itself"):
            at = draw.randint(1, 4)
            act, error = (self.shout, LookupError) if kind == "shouts" else (Handle.cancel, Handle)
            request["on_step"], may = partial(self.at_step, at, act), {error}
        elif kind == "raises":
            request["policy"], may = Raises(), {ZeroDivisionError}
        elif kind == "new setting":
            request["solver"] = DDIM(draw.random())
        try:
            handle = self.engine.submit(**request, **options)
        except EngineFull:
            return None
        with self._lock:
            self.may[handle] = may
            if kind in ("good", "late", "shouts", "stops itself"):
                self.of_pool[handle] = index
        handle.add_done_callback(self.count)
        return handle

    def count(self, handle: Handle) -> None:
        with self._lock:
            self.ends[handle] += 1

    def cancel(self, handle: Handle) -> None:
        if handle.cancel():
            with self._lock:
                self.may[handle] = self.may[handle] | {Handle}

    @staticmethod
    def at_step(step: int, act: Callable[[Handle], object], handle: Handle) -> None:
        if handle.progress[0] == step:
            act(handle)

    @staticmethod
    def shout(handle: Handle) -> None:
        raise LookupError

    def check(self) -> Counter:
        """Each ended once and as it may. Returns how many ended how."""
        assert self.ends.keys() == self.may.keys()
        assert set(self.ends.values()) == {1}
        fates = Counter()
        for handle, may in self.may.items():
            if handle.cancelled():
                assert Handle in may
                fates["cancelled"] += 1
            elif handle.exception(0) is not None:
                assert type(handle.exception(0)) in may
                fates[type(handle.exception(0)).__name__] += 1
            else:
                assert not may & {FloatingPointError, ArithmeticError, ZeroDivisionError}
                assert handle.progress[0] == handle.progress[1]
                fates["image"] += 1
                self.compare(handle)
        report = self.engine.report
        assert (report.finished, report.cancelled) == (fates["image"], fates["cancelled"])
        assert report.finished + report.cancelled + report.failed == len(self.may)
        return fates

    def compare(self, handle: Handle) -> None:
        image, index = handle.result(0), self.of_pool.get(handle)
        assert bool(image.isfinite().all())
        if index is None:
            return
        own, exit_layer = wanted(index, self.batch_invariant)
        if self.batch_invariant:
            assert torch.equal(image, own)
            assert torch.equal(handle.report.exit_layer[:, 0], exit_layer)
        elif POOL[index]["policy"].startswith(("full", "exit:depth")):
            torch.testing.assert_close(image, own, rtol=1e-3, atol=1e-3 * float(own.abs().max()))
            assert torch.equal(handle.report.exit_layer[:, 0], exit_layer)


def nothing_is_left(engine: Engine) -> None:
    report = engine.report
    assert (report.waiting, report.running, engine._batch.free, engine._waiting.all()) == (0, 0, engine.capacity, [])
    assert len(engine._batch._tables) <= SPARE + engine.capacity
    assert len(engine._batch._policies) <= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "capacity", "n", "batch_invariant"), [(1, 7, 500, True), (2, 4, 250, True), (3, 16, 1200, False)]
)
def test_everything_at_once_step_by_step(seed: int, capacity: int, n: int, batch_invariant: bool) -> None:
    draw, clock = random.Random(seed), Clock()
    engine = Engine(
        served(CONFIG),
        capacity,
        queue=QUEUE,
        max_wait=8,
        execution=ExecutionOptions(batch_invariant=batch_invariant),
        threaded=False,
        clock=clock,
        forward=Faulty(capacity),
    )
    crowd, refused, live = Crowd(engine, batch_invariant), 0, []
    while len(crowd.may) < n:
        for _ in range(draw.choice([0, 1, capacity, 2 * capacity])):
            handle = crowd.submit(draw)
            refused += handle is None
            live += [handle] if handle is not None else []
        if live and draw.random() < 0.4:
            crowd.cancel(live.pop(draw.randrange(len(live))))
        if draw.random() < 0.02:  # a client who changes his mind all the time
            for _ in range(100):
                handle = crowd.submit(draw)
                if handle is not None:
                    crowd.cancel(handle)
        engine.step()
        clock.now += draw.random()
        report = engine.report
        assert report.waiting <= QUEUE
        assert len(engine._waiting.all()) <= 64 + 2 * QUEUE + 1
        assert len(engine._running) + engine._batch.free == capacity
        assert report.running <= len(engine._running), "those that are over may still hold a slot"
    engine.close()
    fates = crowd.check()
    nothing_is_left(engine)
    assert refused > 0
    assert engine.report.batch.halvings > 0
    assert set(fates) >= {
        "image",
        "cancelled",
        "DeadlineExceeded",
        "LookupError",
        "FloatingPointError",
        "ZeroDivisionError",
    }
    assert fates["image"] > len(crowd.may) / 5
    gone = weakref.WeakSet(crowd.may)
    del crowd, live, handle
    gc.collect()
    assert not gone  # the engine keeps nobody


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change slots a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("hasty")
def test_everything_at_once_from_many_threads() -> None:
    """Clients submit and cancel while the engine runs; some wait for room in the queue."""
    engine = Engine(served(CONFIG), 6, queue=8, execution=ExecutionOptions(batch_invariant=True), forward=Faulty(6))
    crowd = Crowd(engine, True)

    def client(seed: int) -> None:
        draw, mine = random.Random(seed), []
        for _ in range(40):
            handle = crowd.submit(draw, wait=draw.choice([0, 60, 60]))
            if handle is not None:
                mine.append(handle)
            if mine and draw.random() < 0.3:
                crowd.cancel(mine.pop(draw.randrange(len(mine))))
            if mine and draw.random() < 0.1:
                concurrent.futures.wait(mine, timeout=60)

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        list(pool.map(client, range(5)))
    assert not concurrent.futures.wait(crowd.may, timeout=60).not_done
    engine.close(timeout=60)
    fates = crowd.check()
    nothing_is_left(engine)
    assert fates["image"] > 100
    assert fates["cancelled"] > 10
