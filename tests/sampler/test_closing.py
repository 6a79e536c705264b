"""How an engine ends: drained or aborted, by anybody, also from its own callbacks, and with the interpreter."""

import concurrent.futures
import math
import subprocess
import sys
import textwrap
import threading

import pytest

from adadiff.engine.engine import Engine, EngineClosed
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from sampler.tiny import images_are_right, is_empty, served

EXACT = ExecutionOptions(batch_invariant=True)
SHORT = {"steps": 1, "policy": "exit:depth=1"}
POISON = 2  # a label


def test_close_drains_or_aborts() -> None:
    for threaded in (False, True):
        for drain in (True, False):
            engine = Engine(served(), 2, threaded=threaded, execution=EXACT)
            handles = [engine.submit(seed=i, steps=200 if not drain else 2) for i in range(5)]
            engine.close(drain=drain, timeout=60)
            engine.close(timeout=60)  # again is no harm
            assert all(handle.done() for handle in handles)
            assert [handle.cancelled() for handle in handles] == [not drain] * 5
            assert is_empty(engine)
            with pytest.raises(EngineClosed, match="closed"):
                engine.submit(seed=0, steps=1)
            if drain:
                images_are_right(handles, [{"seed": i, "steps": 2} for i in range(5)])


@pytest.mark.parametrize("threaded", [False, True])
def test_a_context_manager_drains_and_aborts_after_an_exception(threaded: bool) -> None:
    with Engine(served(), 2, threaded=threaded) as engine:
        good = engine.submit(seed=0, steps=3)
    assert good.result(0).isfinite().all()
    engine, lost = Engine(served(), 2, threaded=threaded), []

    def client() -> None:
        with engine:
            lost.append(engine.submit(seed=0, steps=1000))
            raise LookupError("elsewhere")

    with pytest.raises(LookupError, match="elsewhere"):
        client()
    assert lost[0].cancelled()
    assert is_empty(engine)


def test_close_says_when_it_takes_longer() -> None:
    """And may be called again, also to give up after all."""
    held, go = threading.Event(), threading.Event()

    def hold(*args: object, **options: object) -> ForwardOutput:
        held.set()
        assert go.wait(60)
        return run_forward(*args, **options)

    engine = Engine(served(), 1, forward=hold)
    handle = engine.submit(seed=0, steps=3)
    assert held.wait(60)
    with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
        engine.close(timeout=0.01)
    with pytest.raises(EngineClosed):
        engine.submit(seed=1, steps=1)
    with pytest.raises(TimeoutError):
        engine.close(drain=False, timeout=0.01)
    assert not handle.done()  # cancelled after the tick that is under way
    go.set()
    engine.close(timeout=60)
    assert handle.cancelled()
    assert handle.progress == (1, 3)


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("threaded", [False, True])
def test_a_callback_may_close(threaded: bool, drain: bool) -> None:
    """What is under way comes first; then the engine drains, or cancels the others."""
    engine = Engine(served(), 2, threaded=threaded, execution=EXACT)
    ready = threading.Event()
    handles = [engine.submit(seed=0, steps=2, on_step=lambda _: ready.wait(60) and engine.close(drain=drain))]
    handles += [engine.submit(seed=i, steps=300 if not drain else 3) for i in range(1, 4)]
    for handle in handles:  # callbacks of those that it cancels may close it, too
        handle.add_done_callback(lambda _: engine.close(drain=drain))
    ready.set()
    if not threaded:
        while engine.step():
            pass
    concurrent.futures.wait(handles, 60)
    engine.close(timeout=60)
    assert [handle.cancelled() for handle in handles] == [not drain] * 4
    assert is_empty(engine)


@pytest.mark.parametrize("options", [{"queue": 0}, {"max_wait": 0}, {"max_wait": math.inf}, {"capacity": 0}], ids=str)
def test_bad_settings_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine(served(), **options)


PROGRAMS = {
    "requests in flight": "",
    "a client that waits in another thread": "threading.Thread(target=handles[0].result).start()",
    "an engine that is forgotten": "del engine, handles",
}


@pytest.mark.parametrize("end", PROGRAMS)
def test_an_interpreter_exit_is_quick_and_clean(end: str) -> None:
    steps = 20 if end == "a client that waits in another thread" else 1000
    program = f"""
        import threading
        import torch
        torch.set_num_threads(1)
        from adadiff.engine.engine import Engine
        from sampler.tiny import served
        engine = Engine(served(), 2)
        handles = [engine.submit(seed=i, steps={steps}) for i in range(5)]
        {PROGRAMS[end]}
    """
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{textwrap.dedent(program)}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
