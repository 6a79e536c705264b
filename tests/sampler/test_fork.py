"""An engine belongs to the process that made it: a forked child is told so at once, and the parent notices nothing."""

import concurrent.futures
import os
import pickle
import threading
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context

import pytest

from adadiff.engine.engine import Engine, EngineClosed, Handle
from adadiff.forward.options import ExecutionOptions
from sampler.tiny import alone, images_are_right, is_empty, served

EXACT = ExecutionOptions(batch_invariant=True)
REQUEST = {"seed": 3, "steps": 2}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_child(work: Callable[[], object]) -> object:
    """What `work` returns, or the error it raises, in a forked process. Fails where that hangs."""
    theirs, ours = get_context("fork").Pipe()
    with warnings.catch_warnings():  # of Python 3.12: there are threads, which is the point
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            found: object = work()
        except BaseException as error:
            found = error
        try:
            ours.send_bytes(pickle.dumps(found))
        except Exception:
            traceback.print_exc()
        os._exit(0)
    assert theirs.poll(30), "the child hangs"
    found = pickle.loads(theirs.recv_bytes())
    os.waitpid(child, 0)
    return found


USES: dict[str, Callable[[Engine, Handle], object]] = {
    "submit": lambda engine, handle: engine.submit(**REQUEST),
    "submit and wait for room": lambda engine, handle: engine.submit(**REQUEST, wait=20),
    "result": lambda engine, handle: handle.result(),
    "raise": lambda engine, handle: (_ for _ in ()).throw(handle.exception()),
    "as completed": lambda engine, handle: next(concurrent.futures.as_completed([handle])).result(),
}


def held(engine: Engine, name: str) -> Callable[[], None]:
    """A thread that holds a lock of the engine until the function returned is called."""
    lock = getattr(engine, name)
    taken, free = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            free.wait(60)

    threading.Thread(target=hold, daemon=True).start()
    taken.wait(60)
    return free.set


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("lock", [None, "_lock", "_stepping"])
@pytest.mark.parametrize("use", USES)
def test_a_child_is_refused_in_one_line(use: str, lock: str | None, threaded: bool) -> None:
    engine, heard = Engine(served(), 1, queue=2, threaded=threaded, execution=EXACT), []
    ready = threading.Event()
    handles = [engine.submit(**REQUEST, on_step=lambda _: ready.wait(60))]
    if not threaded:
        ready.set()
        engine.step()
    handles += [engine.submit(seed=i, steps=2) for i in range(1)]
    handles[-1].add_done_callback(heard.append)
    by_engine = threaded and lock == "_stepping"  # held by its thread, which waits in the callback
    free = (lambda: None) if lock is None or by_engine else held(engine, lock)
    error = in_child(lambda: USES[use](engine, handles[-1]))
    assert isinstance(error, EngineClosed)
    assert (
        str(error) == "this engine was made in the parent of this process, and does not survive a fork; make one here"
    )
    free()
    ready.set()
    engine.close(timeout=60)
    images_are_right(handles, [REQUEST, {"seed": 0, "steps": 2}])
    assert heard == handles[-1:]
    assert is_empty(engine)


@pytest.mark.parametrize("threaded", [False, True])
def test_a_child_may_look_and_close(threaded: bool) -> None:
    engine = Engine(served(), 1, threaded=threaded, execution=EXACT)
    ended, ready, heard = engine.submit(**REQUEST), threading.Event(), []
    if not threaded:
        while engine.step():
            pass
    ended.result(60)
    running = engine.submit(**REQUEST, on_step=lambda _: ready.wait(60))
    running.add_done_callback(lambda _: heard.append(os.getpid()))

    def work() -> object:
        with engine:  # drains at its end
            report, result = engine.report, ended.result().tolist()
        engine.close(drain=False)
        step = None if threaded else engine.step()
        return report.running, report.waiting, result, running.done(), heard, step

    seen = in_child(work)
    assert seen == (0, 0, ended.result().tolist(), True, [], None if threaded else False)
    ready.set()
    engine.close(timeout=60)
    images_are_right([running], [REQUEST])
    assert heard == [os.getpid()]


def test_a_child_makes_an_engine_of_its_own() -> None:
    with Engine(served(), 2, execution=EXACT) as engine:
        mine = engine.submit(**REQUEST)

        def work() -> list:
            with Engine(served(), 2, execution=EXACT) as own:
                return own.submit(**REQUEST).result(60).tolist()

        assert in_child(work) == alone(REQUEST)[0].tolist()
    images_are_right([mine], [REQUEST])
