"""`Engine.alive`, by which services say that they are healthy, and previews that no tick waits for."""

import os
import threading

import pytest
import torch

from adadiff.engine.engine import Engine, Handle
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from sampler.tiny import served

EXACT = ExecutionOptions(batch_invariant=True)


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("threaded", [False, True])
def test_an_engine_is_alive_until_it_is_closed(threaded: bool, drain: bool) -> None:
    engine = Engine(served(), 2, threaded=threaded)
    assert engine.alive
    engine.submit(seed=0, steps=2)
    assert engine.alive
    engine.close(drain=drain, timeout=60)
    assert not engine.alive


def test_an_engine_that_drains_is_alive() -> None:
    held, go = threading.Event(), threading.Event()

    def hold(*args: object, **options: object) -> ForwardOutput:
        held.set()
        assert go.wait(60)
        return run_forward(*args, **options)

    engine = Engine(served(), 1, forward=hold)
    handle = engine.submit(seed=0, steps=1)
    assert held.wait(60)
    with pytest.raises(TimeoutError):
        engine.close(timeout=0.01)
    assert engine.alive
    go.set()
    engine.close(timeout=60)
    assert not engine.alive
    assert handle.result(0).isfinite().all()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_is_not_alive_after_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(served(), 2)
    monkeypatch.setattr(engine, "_admit", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.submit(seed=0, steps=1).result(60)
    engine._thread.join(60)
    assert not engine.alive


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_an_engine_is_not_alive_in_a_forked_process() -> None:
    with Engine(served(), 2) as engine:
        child = os.fork()
        if not child:
            os._exit(3 if engine.alive else 4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
        assert engine.alive


@pytest.mark.parametrize("late", [False, True])
def test_a_preview_may_be_asked_for_in_a_step_and_read_later(late: bool) -> None:
    """It is the one that `predicted_x0` gives, and later steps do not change it."""
    now, later = [], []

    def look(handle: Handle) -> None:
        now.append(handle.predicted_x0())
        later.append(handle.predicted_x0_later())
        if not late:
            later[-1].read()

    with Engine(served(), 2, execution=EXACT) as engine:
        image = engine.submit(seed=5, steps=4, on_step=look).result(60)
    assert len(now) == 4
    assert all(torch.equal(one, other.read()) for one, other in zip(now, later, strict=True))
    torch.testing.assert_close(now[-1], image)  # where the last step of ddim lands
