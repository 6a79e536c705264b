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

from adadiff.engine.engine import Engine, EngineClosed, EngineFull, Handle
from adadiff.forward.options import ExecutionOptions
from sampler.tiny import alone, images_are_right, is_empty, requests, served, stepped

SHORT = {"steps": 1, "policy": "exit:depth=1"}
WATCHED = (
    "/adadiff/engine/",
    "/adadiff/sampling/batch.py",
    "/adadiff/sampling/slots.py",
    "/adadiff/sampling/ordering.py",
    "/adadiff/diffusion/tables.py",
    "/adadiff/policies/policy_set.py",
    "/threading.py",
    "/futures/",
)
PATIENCE = 20  # seconds after which a thread that waits for a lock is said to hang


class Interrupted(BaseException):
    """What a signal handler raises."""


class Expired(Exception):
    """What one raises that is there for time limits."""


def interrupt(call: Callable[[], object], at: int, kind: type[BaseException] = Interrupted) -> bool:
    """`call`, interrupted at the place number `at`. False where it has fewer places."""
    places = itertools.count()

    def look(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event in ("call", "c_return") and any(part in name for part in WATCHED) and next(places) == at:
            raise kind

    sys.setprofile(look)
    try:
        call()
    except kind:
        return True
    except RuntimeError as error:  # Event of the standard library lets a lock go twice then
        if not isinstance(error.__context__, kind):
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


def test_an_interrupted_cancel_is_one_for_all_others() -> None:
    """Who waits is woken, and callbacks are called, each once, but for the one that the interrupt has hit itself."""
    for at in itertools.count():
        engine, heard, woken = stepped(2), [], []
        handle = engine.submit(seed=0, steps=2)
        thread = threading.Thread(target=lambda handle=handle, woken=woken: woken.append(concurrently(handle)))
        thread.start()
        while not handle._condition._waiters:
            time.sleep(0)
        for name in "abc":
            handle.add_done_callback(lambda _, name=name, heard=heard: heard.append(name))
        interrupted = interrupt(handle.cancel, at)
        if not handle.done():  # it came before
            assert heard == []
            handle.cancel()
        assert "".join(heard) in ("abc", "bc", "ac", "ab")
        assert engine.report.cancelled == 1
        thread.join(PATIENCE)
        assert woken == ["cancelled"]
        if not interrupted:
            break
    assert heard == ["a", "b", "c"]
    assert at > 10


def concurrently(handle: Handle) -> str:
    try:
        handle.result(PATIENCE)
    except concurrent.futures.CancelledError:
        return "cancelled"
    return "an image"


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


def run(engine: Engine) -> None:
    """To the end, which is near."""
    for _ in range(40):
        if not engine.step():
            return
    pytest.fail("there is no end")


def draw_interrupted(at: int) -> bool:
    """All requests, step by step, with one interrupt at place `at`. False where there are fewer places."""
    engine, heard = stepped(3), []
    handles = [engine.submit(**request) for request in WANTED]
    for handle in handles:
        handle.add_done_callback(heard.append)
    engine.submit(seed=0, steps=5).cancel()
    interrupted = interrupt(lambda: run(engine), at)
    run(engine)
    images_are_right(handles, WANTED)
    assert [handle.progress for handle in handles] == [
        (len(handle.report.exit_layer), int(handle.samples.steps - handle.samples.first)) for handle in handles
    ]
    assert len(heard) == len(set(heard)) >= len(WANTED) - 1  # but for one that the interrupt itself has hit
    assert (engine.report.finished, engine.report.failed, engine.report.cancelled) == (4, 0, 1)
    assert is_empty(engine)
    return interrupted


def test_an_interrupted_step_costs_no_image() -> None:
    """Every 29th place; the slow tests try all."""
    for at in itertools.count(0, 29):
        if not draw_interrupted(at):
            break
    assert at > 500


@pytest.mark.parametrize("kind", [Interrupted, Expired])
def test_an_interrupt_anywhere_where_a_request_begins(kind: type[BaseException]) -> None:
    """No slot is lost, nobody has two, and each step is told once. So many places reach into the forward pass."""
    for at in range(230):
        engine, seen = stepped(3), []
        handle = engine.submit(**SHORT, seed=0, on_step=lambda handle, seen=seen: seen.append(handle.progress))
        interrupted = interrupt(engine.step, at, kind)
        run(engine)
        if handle.exception(0) is None:
            assert handle.progress == (1, 1)
            assert seen in ([(1, 1)], [(1, 1)] * 2)  # again where the interrupt came after it
            images_are_right([handle], [{"seed": 0, **SHORT}])
        assert is_empty(engine)
        assert interrupted


def test_a_time_limit_that_raises_in_a_step_costs_one_request_at_most() -> None:
    """An `Exception` of a handler's cannot be told from one of a request's. Those that follow are served, those of the
    same solver and policy too. Every 61st place."""
    for at in itertools.count(0, 61):
        engine = stepped(3)
        handles = [engine.submit(**request) for request in WANTED]
        interrupted = interrupt(lambda engine=engine: run(engine), at, Expired)
        handles += [engine.submit(**request) for request in WANTED]
        run(engine)
        failed = [i for i, handle in enumerate(handles) if handle.exception(0) is not None]
        assert len(failed) <= 1
        assert all(isinstance(handles[i].exception(0), Expired) for i in failed)
        good = [i for i in range(len(handles)) if i not in failed]
        images_are_right([handles[i] for i in good], [WANTED[i % len(WANTED)] for i in good])
        assert is_empty(engine)
        if not interrupted:
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
