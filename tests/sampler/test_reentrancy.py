"""Callbacks and signal handlers that use the engine in whose midst they are called; engines that all have forgotten."""

import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType

import pytest
import torch

from adadiff.engine.engine import Engine
from adadiff.engine.handles import EngineClosed, Handle
from adadiff.forward.options import ExecutionOptions
from sampler.tiny import alone, images_are_right, is_empty, served

EXACT = ExecutionOptions(batch_invariant=True)
SHORT = {"steps": 1, "policy": "exit:depth=1"}
PATIENCE = 20  # seconds


def with_no_wait(ask: Callable) -> Callable:
    def asked(handle: Future, timeout: float | None = None) -> object:
        assert timeout is not None or handle.done(), "it waits for ever"
        return ask(handle, timeout)

    return asked


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("place", ["a step", "the end", "an abort"])
@pytest.mark.parametrize("wait", [Handle.result, Handle.exception])
def test_a_callback_that_would_wait_for_ever_is_told(
    wait: Callable, place: str, threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine goes on when the callback has returned. What has ended already may be asked for."""
    for name in ("result", "exception"):
        monkeypatch.setattr(Future, name, with_no_wait(getattr(Future, name)))
    engine, ready, told = Engine(served(), 1, threaded=threaded, execution=EXACT), threading.Event(), []

    def ask(_: Handle) -> None:
        assert ended.result().isfinite().all()
        with pytest.raises(TimeoutError):
            other.result(0)
        with pytest.raises(RuntimeError, match="would wait for ever") as error:
            wait(other)
        told.append(error)

    def at_step(handle: Handle) -> None:
        assert ready.wait(PATIENCE)
        if place == "a step":
            ask(handle)
        elif place == "an abort":
            engine.close(drain=False)

    ended = engine.submit(seed=9, **SHORT)
    while not threaded and engine.step():
        pass
    ended.result(PATIENCE)
    first = engine.submit(seed=0, steps=2, on_step=at_step)
    if place != "a step":
        first.add_done_callback(ask)
    other = engine.submit(seed=1, steps=2)
    ready.set()
    engine.close(timeout=PATIENCE)
    assert len(told) == (2 if place == "a step" else 1)
    assert (first.cancelled(), other.cancelled()) == (place == "an abort",) * 2
    if place != "an abort":
        images_are_right([first, other], [{"seed": i, "steps": 2} for i in range(2)])
    assert is_empty(engine)


def call_at(call: Callable[[], object], at: int, handler: Callable[[], object]) -> bool:
    """`call`, with a signal handler called at the place number `at`. False where it has fewer places."""
    places = itertools.count()

    def look(frame: FrameType, event: str, _: object) -> None:
        inside = "/adadiff/engine/" in frame.f_code.co_filename
        if event in ("call", "c_return") and inside and next(places) == at:
            sys.setprofile(None)
            handler()

    sys.setprofile(look)
    try:
        call()
    except EngineClosed:
        pass
    finally:
        sys.setprofile(None)
    return next(places) > at


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("use", ["submit", "report", "cancel"])
def test_a_signal_handler_may_close_the_engine_anywhere(use: str, drain: bool) -> None:
    """It need not raise. Where the engine waits for what the handler has interrupted, `close` returns at once."""
    uses: dict[str, Callable[[Engine], object]] = {
        "submit": lambda engine: engine.submit(seed=0, **SHORT),
        "report": lambda engine: engine.report,
        "cancel": lambda engine: engine.submit(seed=0, steps=30).cancel(),
    }
    for at in itertools.count():
        engine = Engine(served(), 2)
        handle = engine.submit(seed=1, **SHORT)
        found = call_at(
            lambda engine=engine: uses[use](engine), at, lambda engine=engine: engine.close(drain=drain, timeout=2)
        )
        engine.close(timeout=PATIENCE)
        assert handle.cancelled() or handle.result(0).isfinite().all()
        assert is_empty(engine)
        if not found:
            break
    assert at > 5


def test_an_engine_that_all_have_forgotten_ends_its_thread() -> None:
    """And serves what it has been asked for first. Its model is free, whoever keeps its handles."""
    before, kept = threading.active_count(), []
    for seed in range(3):
        engine, arrived = Engine(served(), 2, execution=EXACT), threading.Event()
        kept.append(engine.submit(seed=seed, steps=2))
        kept[-1].add_done_callback(lambda _, arrived=arrived: arrived.set())
        gone = weakref.ref(engine)
        del engine
        assert arrived.wait(PATIENCE)
        until = time.monotonic() + PATIENCE
        while (gone() is not None or threading.active_count() > before) and time.monotonic() < until:
            time.sleep(0.001)
        assert gone() is None
        assert threading.active_count() <= before
    images_are_right(kept, [{"seed": seed, "steps": 2} for seed in range(3)])
    with pytest.raises(ValueError, match="its engine is gone"):
        kept[0].predicted_x0()
    assert kept[0].cancel() is False


def test_who_is_forgotten_with_the_engine_is_served_too() -> None:
    images, arrived = [], threading.Event()

    def keep(handle: Handle) -> None:
        images.append(handle.result())
        arrived.set()

    Engine(served(), 2, execution=EXACT).submit(seed=3, steps=2).add_done_callback(keep)
    assert arrived.wait(PATIENCE)
    assert torch.equal(images[0], alone({"seed": 3, "steps": 2})[0])
