"""Signal handlers that raise, as Ctrl-C does, in the middle of a method of an engine or of a handle: no lock stays
held, the engine goes on serving, and no image is lost.

An interrupt is put wherever Python looks for signals: where a function of Python begins, and where one of C returns.
"""

import concurrent.futures
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import pytest
import torch

from adadiff.forward.options import ExecutionOptions
from adadiff.serving.engine import Engine, EngineClosed, EngineFull, Handle
from sampler.tiny import alone, images_are_right, is_empty, requests, served, stepped

SHORT = {"steps": 1, "policy": "exit:depth=1"}
WATCHED = (
    "/adadiff/serving/",
    "/adadiff/sampling/batch.py",
    "/adadiff/sampling/slots.py",
    "/threading.py",
    "/futures/",
)
PATIENCE = 20  # seconds after which a thread that waits for a lock is said to hang


class Interrupted(BaseException):
    """What a signal handler raises."""


def interrupt(call: Callable[[], object], at: int) -> bool:
    """`call`, interrupted at the place number `at`. False where it has fewer places."""
    places = itertools.count()

    def look(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event in ("call", "c_return") and any(part in name for part in WATCHED) and next(places) == at:
            raise Interrupted

    sys.setprofile(look)
    try:
        call()
    except Interrupted:
        return True
    except RuntimeError as error:  # Event of the standard library lets a lock go twice then
        if not isinstance(error.__context__, Interrupted):
            raise
        return True
    finally:
        sys.setprofile(None)
    return next(places) > at  # swallowed, as by a callback's guard


def elsewhere(call: Callable[[], object]) -> object:
    """The result of `call` in another thread; fails where that hangs."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "a lock stayed held"
    return found[0]


def ask(engine: Engine, **options: object) -> None:
    engine.submit(seed=0, **SHORT, **options)


def cancel(engine: Engine) -> None:
    engine.submit(seed=0, steps=30).cancel()


def wait(engine: Engine) -> None:
    handles = [engine.submit(seed=i, **SHORT) for i in range(2)]
    concurrent.futures.wait(handles, PATIENCE)


def look(engine: Engine) -> None:
    handle = engine.submit(seed=0, steps=2)
    assert handle.done() in (False, True)
    assert handle.report.num_layers == 5
    assert engine.report.failed == 0
    try:
        handle.predicted_x0()
    except ValueError:  # it waits, or has ended
        return


USES = {
    "submit": ask,
    "submit and wait for room": lambda engine: ask(engine, wait=1e-9),
    "cancel": cancel,
    "result": lambda engine: engine.submit(seed=0, **SHORT).result(PATIENCE),
    "exception": lambda engine: engine.submit(seed=0, **SHORT).exception(PATIENCE),
    "a done callback": lambda engine: engine.submit(seed=0, **SHORT).add_done_callback(lambda _: None),
    "wait": wait,
    "look": look,
}


@pytest.mark.parametrize("use", USES)
def test_no_lock_stays_held(use: str) -> None:
    """All requests that others hold end, and the engine serves the next."""
    engine = Engine(served(), 2)
    mine = engine.submit(seed=0, steps=2)
    for at in itertools.count():
        if not interrupt(lambda: USES[use](engine), at):
            break
        elsewhere(lambda: engine.submit(seed=1, **SHORT).result(PATIENCE))
        assert elsewhere(lambda: engine.report).failed == 0
    assert mine.result(PATIENCE).isfinite().all()
    elsewhere(engine.close)
    assert at > 20
    assert is_empty(engine)


HANDLES: dict[str, Callable[[Handle], object]] = {
    "done": Handle.done,
    "cancelled": Handle.cancelled,
    "running": Handle.running,
    "result": lambda handle: handle.result(PATIENCE),
    "exception": lambda handle: handle.exception(PATIENCE),
    "add_done_callback": lambda handle: handle.add_done_callback(lambda _: None),
    "cancel": Handle.cancel,
    "repr": repr,
}


@pytest.mark.parametrize("use", HANDLES)
def test_a_handle_ends_for_those_who_did_not_interrupt_it(use: str) -> None:
    with Engine(served(), 2) as engine:
        for at in itertools.count():
            handle = engine.submit(seed=0, steps=2)
            if not interrupt(lambda handle=handle: HANDLES[use](handle), at):
                break
            elsewhere(lambda handle=handle: handle.cancelled() or handle.exception(PATIENCE))
            assert elsewhere(handle.done)
    assert at > 1


def test_an_interrupted_close_can_be_called_again() -> None:
    for at in itertools.count():
        engine = Engine(served(), 2)
        handles = [engine.submit(seed=i, steps=2) for i in range(3)]
        interrupted = interrupt(engine.close, at)
        elsewhere(engine.close)
        assert all(handle.result(0).isfinite().all() for handle in handles)
        with pytest.raises(EngineClosed):
            engine.submit(seed=0, steps=1)
        if not interrupted:
            break
    assert at > 5


WANTED = [{**request, "steps": 2} for request in requests(4, seed=31)]


def draw_interrupted(at: int) -> bool:
    """All requests, step by step, with one interrupt at place `at`. False where there are fewer places."""
    engine = stepped(3)
    handles = [engine.submit(**request) for request in WANTED]
    engine.submit(seed=0, steps=5).cancel()

    def run() -> None:
        while engine.step():
            pass

    interrupted = interrupt(run, at)
    run()
    images_are_right(handles, WANTED)
    assert is_empty(engine)
    return interrupted


def test_an_interrupted_step_costs_no_image() -> None:
    """Every 29th place; the slow tests try all."""
    for at in itertools.count(0, 29):
        if not draw_interrupted(at):
            break
    assert at > 500


@pytest.mark.slow
@pytest.mark.parametrize("first", range(3))
def test_an_interrupt_anywhere_in_a_step_costs_no_image(first: int) -> None:
    for at in itertools.count(first, 3):
        if not draw_interrupted(at):
            break


def test_after_an_interrupt_others_draw_lane_by_lane() -> None:
    """The threads that compute lane by lane are kept, and so would be a lock of theirs."""
    wanted = alone(WANTED[0])[0]
    for at in itertools.count(0, 3):
        if not interrupt(lambda: alone(WANTED[0]), at):
            break
        assert torch.equal(elsewhere(lambda: alone(WANTED[0])[0]), wanted)
    assert at > 50


def test_the_engine_lives_on_where_the_lock_of_a_handle_is_held_for_good() -> None:
    """`concurrent.futures.wait` takes the locks of all its futures, one by one, in Python."""
    with Engine(served(), 2) as engine:
        stuck = engine.submit(seed=0, steps=2)
        stuck._condition.acquire()
        assert elsewhere(lambda: engine.submit(seed=1, **SHORT).result(PATIENCE)).isfinite().all()
        stuck._condition.release()
        assert stuck.result(PATIENCE).isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_a_storm_of_signals() -> None:
    def handler(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    handles: list[Handle] = []
    interrupts, until = 0, time.monotonic() + 10
    engine = Engine(served(), 4, queue=64, execution=ExecutionOptions(batch_invariant=True))
    try:
        while time.monotonic() < until:
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + interrupts % 97))
                while True:
                    handles.append(engine.submit(seed=len(handles), steps=2))
                    handles[-1].done()
                    if len(handles) % 3 == 0:
                        handles[-1].cancel()
            except Interrupted:
                interrupts += 1
            except EngineFull:
                signal.setitimer(signal.ITIMER_REAL, 0)
                elsewhere(lambda: handles[-1].exception(PATIENCE) if not handles[-1].cancelled() else None)
    except Interrupted:
        interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    elsewhere(lambda: engine.close(timeout=PATIENCE))
    assert interrupts > 100
    assert all(handle.done() for handle in handles)
    good = [i for i, handle in enumerate(handles) if not handle.cancelled()][:20]
    images_are_right([handles[i] for i in good], [{"seed": i, "steps": 2} for i in good])
    assert is_empty(engine)
