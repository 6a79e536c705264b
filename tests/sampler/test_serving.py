"""Requests to an engine: what they are given, and that a fault in one of them ends that one alone, and once."""

import asyncio
import concurrent.futures
import copy
import dataclasses
import math
import threading

import numpy as np
import pytest
import torch

from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.solvers import DDIM
from adadiff.diffusion.tables import SolverTable
from adadiff.engine.engine import Engine, EngineClosed, EngineFull, Handle
from adadiff.engine.running import Running
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.interface import ExitContext, ExitPolicy
from adadiff.sampling.batch import Batch
from sampler.tiny import Clock, alone, images_are_right, is_empty, requests, served, stepped

EXACT = ExecutionOptions(batch_invariant=True)
SHORT = {"steps": 1, "policy": "exit:depth=1"}
POISON = 2  # a label


def test_a_request_from_its_submission_to_its_image() -> None:
    clock, seen = Clock(), []
    engine = stepped(1, clock=clock)
    first = engine.submit(seed=1, steps=2, class_labels=0, policy="exit:0.5")
    second = engine.submit(
        seed=2,
        steps=3,
        class_labels=1,
        guidance_scale=1.0,
        on_step=lambda handle: seen.append((handle, handle.progress)),
    )
    assert (first.progress, second.progress) == ((0, 2), (0, 3))
    for _ in range(5):
        clock.now += 10
        assert not second.done()
        assert engine.step()
    assert not engine.step()
    images_are_right(
        [first, second],
        [{"seed": 1, "steps": 2, "class_labels": 0, "policy": "exit:0.5"}, {"seed": 2, "steps": 3, "class_labels": 1}],
    )
    assert seen == [(second, (k, 3)) for k in (1, 2, 3)]
    assert (first.report.waited, first.report.seconds) == (10, 10)
    assert (second.report.waited, second.report.seconds) == (30, 20)
    assert second.report.exit_layer.tolist() == [[[5, 0]]] * 3
    assert (second.report.passes, second.report.blocks, second.report.mean_exit_layer) == (3, 15, 5)
    report = engine.report
    assert (report.finished, report.failed, report.cancelled, report.batch.ticks) == (2, 0, 0, 5)
    assert is_empty(engine)


def test_a_report_before_the_first_step_is_empty() -> None:
    engine = stepped()
    report = engine.submit(seed=1, steps=2).report
    assert (tuple(report.exit_layer.shape), report.passes) == ((0, 1, 2), 0)
    assert math.isnan(report.waited)
    assert math.isnan(report.seconds)
    assert math.isnan(report.mean_exit_layer)


def test_an_image_is_the_clients_own() -> None:
    engine = stepped(2)
    handles = [engine.submit(seed=seed, steps=1) for seed in (1, 2)]
    engine.step()
    handles[0].result().zero_()
    assert torch.equal(handles[1].result(), alone({"seed": 2, "steps": 1})[0])


def test_nan_fails_its_request_alone() -> None:
    def hurt(*args: object, **options: object) -> ForwardOutput:
        result = run_forward(*args, **options)
        result.prediction[args[3] == POISON] = math.nan
        return result

    wanted = [request for request in requests(40, seed=2) if request["class_labels"] != POISON][:7]
    engine = stepped(8, forward=hurt)
    handles = [engine.submit(**request) for request in wanted]
    poisoned = engine.submit(seed=0, steps=2, class_labels=POISON)
    while engine.step():
        pass
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        poisoned.result(0)
    images_are_right(handles, wanted)
    assert (engine.report.failed, is_empty(engine)) == (1, True)


def test_an_exception_in_the_forward_pass_of_one_fails_it_alone() -> None:
    def refuse(*args: object, **options: object) -> ForwardOutput:
        if bool((args[3] == POISON).any()):
            raise ArithmeticError("not this one")
        return run_forward(*args, **options)

    wanted = [request for request in requests(40, seed=1) if request["class_labels"] != POISON][:7]
    engine = stepped(16, forward=refuse)
    handles = [engine.submit(**request) for request in wanted[:3]]
    poisoned = engine.submit(seed=0, steps=2, class_labels=POISON, guidance_scale=2.0)
    handles += [engine.submit(**request) for request in wanted[3:]]
    while engine.step():
        pass
    with pytest.raises(ArithmeticError, match="not this one"):
        poisoned.result(0)
    images_are_right(handles, wanted)
    assert (engine.report.failed, engine.report.batch.halvings, is_empty(engine)) == (1, 0, True)


def test_out_of_memory_costs_nobody_his_image() -> None:
    calls = []

    def limited(*args: object, **options: object) -> ForwardOutput:
        calls.append(len(args[1]))
        if calls[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_forward(*args, **options)

    wanted = requests(20, seed=7)
    engine = stepped(10, forward=limited)
    handles = [engine.submit(**request) for request in wanted]
    while engine.step():
        pass
    images_are_right(handles, wanted)
    assert engine.report.batch.halvings == sum(n > 3 for n in calls) > 0
    assert is_empty(engine)


class Broken:
    """A solver that makes its table where the request is checked, and not when it begins."""

    def __init__(self) -> None:
        self.asked = 0

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        self.asked += 1
        if self.asked > 1:
            raise RuntimeError("no table today")
        return DDIM().table(schedule, steps)


def test_a_request_that_cannot_begin_fails_alone() -> None:
    engine = stepped(2)
    good = [engine.submit(seed=0, steps=2)]
    bad = engine.submit(seed=1, steps=2, solver=Broken())
    good.append(engine.submit(seed=2, steps=2))
    while engine.step():
        pass
    with pytest.raises(RuntimeError, match="no table today"):
        bad.result(0)
    images_are_right(good, [{"seed": 0, "steps": 2}, {"seed": 2, "steps": 2}])
    assert is_empty(engine)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_callback_that_raises_fails_its_request_alone(step: int) -> None:
    def shout(handle: Handle) -> None:
        if handle.progress[0] == step:
            raise LookupError("callback")

    engine = stepped(3)
    wanted = [{"seed": 0, "steps": 3, "policy": "exit:0.5"}, {"seed": 2, "steps": 5}]
    handles = [engine.submit(**wanted[0])]
    shouting = engine.submit(seed=1, steps=3, on_step=shout)
    handles.append(engine.submit(**wanted[1]))
    while engine.step():
        pass
    with pytest.raises(LookupError, match="callback"):
        shouting.result(0)
    assert shouting.progress == (step, 3)
    images_are_right(handles, wanted)
    assert (engine.report.failed, is_empty(engine)) == (1, True)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_callback_may_cancel(step: int) -> None:
    engine = stepped(2)
    stopped = engine.submit(seed=1, steps=3, on_step=lambda h: h.progress[0] == step and h.cancel())
    other = engine.submit(seed=0, steps=4, on_step=lambda h: stopped.cancel())
    while engine.step():
        pass
    assert stopped.cancelled()
    assert stopped.progress[0] <= step
    images_are_right([other], [{"seed": 0, "steps": 4}])
    assert (engine.report.cancelled, is_empty(engine)) == (1, True)


def test_a_request_that_is_over_does_not_count_as_running() -> None:
    """Its slot is free a moment later; a service that compares reports would see an image being drawn."""
    engine, seen = stepped(2), []
    engine.submit(seed=0, steps=2).add_done_callback(lambda _: seen.append(engine.report))
    while engine.step():
        pass
    assert [(report.running, report.finished) for report in seen] == [(0, 1)]


def test_callbacks_may_submit() -> None:
    """One request after the other, each from the callback of the last; a full queue cannot be waited for there."""
    engine, handles, full = stepped(1, queue=1), [], []

    def more(_: object) -> None:
        if len(handles) < 5:
            handles.append(engine.submit(seed=len(handles), **SHORT))
            handles[-1].add_done_callback(more)
            try:
                engine.submit(seed=9, wait=math.inf, **SHORT)
            except EngineFull:
                full.append(True)

    handles.append(engine.submit(seed=0, **SHORT))
    handles[0].add_done_callback(more)
    while engine.step():
        pass
    assert len(handles) == 5
    assert len(full) == 4
    assert all(handle.result(0).isfinite().all() for handle in handles)
    assert is_empty(engine)


def test_a_step_within_a_step_is_refused() -> None:
    engine = stepped(2)
    inner = engine.submit(seed=1, steps=2, on_step=lambda _: engine.step())
    other = engine.submit(seed=0, steps=2)
    while engine.step():
        pass
    with pytest.raises(RuntimeError, match="from within a step"):
        inner.result(0)
    images_are_right([other], [{"seed": 0, "steps": 2}])


def test_an_engine_with_a_thread_is_not_stepped() -> None:
    with Engine(served(), 1) as engine, pytest.raises(RuntimeError, match="threaded=False"):
        engine.step()


def test_steps_from_many_threads_are_made_one_by_one() -> None:
    wanted = requests(20, seed=12, most=3)
    engine = stepped(4)
    handles = [engine.submit(**request) for request in wanted]

    def work() -> None:
        while engine.step():
            pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    images_are_right(handles, wanted)
    assert is_empty(engine)


def test_a_handle_can_be_cancelled_until_it_has_ended() -> None:
    engine = stepped(1)
    finished = engine.submit(seed=0, steps=1)
    engine.step()
    running, waiting = engine.submit(seed=1, steps=5), engine.submit(seed=2, steps=1)
    engine.step()
    assert not finished.cancel()
    assert waiting.cancel()
    assert running.cancel()
    assert running.cancel()  # again is no harm
    assert running.cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result(0)
    assert engine.report.waiting == 0
    last = engine.submit(seed=3, steps=1)
    engine.step()
    assert last.done()  # the slot was free at the next tick
    assert running.progress == (1, 5)
    assert (engine.report.finished, engine.report.cancelled, is_empty(engine)) == (2, 2, True)


def test_cancelled_requests_leave_no_trace_while_the_engine_is_busy() -> None:
    engine = stepped(1)
    busy = engine.submit(seed=0, steps=300, priority=100)
    engine.step()
    longest = 0
    for k in range(800):
        engine.submit(seed=k, steps=1, priority=k % 3).cancel()
        longest = max(longest, len(engine._waiting.all()))
        if k % 100 == 0:
            engine.step()
    assert longest <= 66
    assert engine.report.waiting == 0
    busy.cancel()
    engine.step()
    assert is_empty(engine)


def test_handles_are_futures() -> None:
    """`wait` and `as_completed` also see those that were cancelled, in the queue or running."""
    engine = stepped(2)
    handles = [engine.submit(seed=i, steps=2 + i % 2) for i in range(6)]
    done, pending = concurrent.futures.wait(handles, timeout=0)
    assert (len(done), len(pending)) == (0, 6)
    engine.step()
    handles[0].cancel()
    handles[5].cancel()
    done, _ = concurrent.futures.wait(handles, timeout=20, return_when="FIRST_COMPLETED")
    assert done == {handles[0], handles[5]}
    worker = threading.Thread(target=lambda: [None for _ in iter(engine.step, False)])
    worker.start()
    completed = list(concurrent.futures.as_completed(handles, timeout=20))
    worker.join(60)
    assert len(completed) == 6
    assert [handle.cancelled() for handle in handles] == [True, False, False, False, False, True]
    assert concurrent.futures.wait(handles, timeout=0).not_done == set()


def test_handles_can_be_awaited() -> None:
    async def ask(engine: Engine) -> list[object]:
        good = asyncio.wrap_future(engine.submit(seed=1, steps=2))
        bad = asyncio.wrap_future(engine.submit(seed=1, steps=2, on_step=lambda _: 1 / 0))
        stopped = engine.submit(seed=1, steps=1000)
        waiting = asyncio.wrap_future(stopped)
        asyncio.get_running_loop().call_soon(waiting.cancel)
        results = await asyncio.gather(good, bad, waiting, return_exceptions=True)
        assert concurrent.futures.wait([stopped], 60).done == {stopped}
        assert stopped.cancelled()  # cancelling the asyncio future cancels the request
        return results

    with Engine(served(), 4, execution=EXACT) as engine:
        image, error, cancelled = asyncio.run(ask(engine))
    assert torch.equal(image, alone({"seed": 1, "steps": 2})[0])
    assert isinstance(error, ZeroDivisionError)
    assert isinstance(cancelled, asyncio.CancelledError)


def test_ctrl_c_is_not_swallowed_and_costs_no_image() -> None:
    calls = []

    def interrupted(*args: object, **options: object) -> ForwardOutput:
        calls.append(1)
        if len(calls) in (2, 3, 5):
            raise KeyboardInterrupt
        return run_forward(*args, **options)

    wanted = requests(6, seed=9)
    engine = stepped(4, forward=interrupted)
    handles, interrupts, alive = [engine.submit(**request) for request in wanted], 0, True
    while alive:
        try:
            alive = engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 3
    images_are_right(handles, wanted)
    assert is_empty(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of the engine's own ends its thread; nobody waits for ever, and it takes no more requests."""
    ready, broken = threading.Event(), SystemExit("broken")

    def breaks(*_: object) -> None:
        assert ready.wait(60)
        raise broken

    monkeypatch.setattr(Running, "_deliver", breaks)
    engine = Engine(served(), 1)
    handles = [engine.submit(seed=i, steps=1) for i in range(3)]
    ready.set()
    for handle in handles:
        assert handle.exception(60) is broken
    engine.close(timeout=60)
    with pytest.raises(EngineClosed) as closed:
        engine.submit(seed=0, steps=1)
    assert closed.value.__cause__ is broken


class Odd(BaseException):
    """No `Exception`, as SystemExit is none."""


@dataclasses.dataclass(frozen=True)
class Raises(ExitPolicy):
    error: type[BaseException]

    def exit_mask(self, u: torch.Tensor, layer: int, context: ExitContext) -> torch.Tensor:
        raise self.error


ERRORS = [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, concurrent.futures.CancelledError, Odd]


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("place", ["callback", "last callback", "policy"])
@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_request_s_own_code_raises_fails_it_alone(
    error: type[BaseException], place: str, threaded: bool
) -> None:
    ready = threading.Event()

    def shout(handle: Handle) -> None:
        if handle.progress[0] == (1 if place == "callback" else 3):
            raise error

    engine = Engine(served(), 3, threaded=threaded, execution=EXACT)
    wanted = [{"seed": 0, "steps": 3, "policy": "exit:0.5"}, {"seed": 2, "steps": 5}]
    own = {"policy": Raises(error)} if place == "policy" else {"on_step": shout}
    handles = [engine.submit(**wanted[0], on_step=lambda _: ready.wait(60))]
    bad = [engine.submit(seed=i, steps=3, **own) for i in (1, 7)]
    handles.append(engine.submit(**wanted[1]))
    ready.set()
    if not threaded:
        while engine.step():
            pass
    assert not concurrent.futures.wait([*handles, *bad], 60).not_done
    assert [type(handle.exception(0)) for handle in bad] == [error, error]
    images_are_right(handles, wanted)
    later = engine.submit(**wanted[0])  # it goes on
    engine.close(timeout=60)
    images_are_right([later], wanted[:1])
    assert (engine.report.finished, engine.report.failed, is_empty(engine)) == (3, 2, True)


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("error", [*ERRORS, LookupError])
def test_whatever_a_done_callback_raises_hurts_nobody(error: type[BaseException], threaded: bool) -> None:
    def shout(_: object) -> None:
        raise error

    engine, ready, heard = Engine(served(), 2, threaded=threaded, execution=EXACT), threading.Event(), []
    handles = [engine.submit(seed=i, steps=2, on_step=lambda _: ready.wait(60)) for i in range(3)]
    handles.append(engine.submit(seed=3, steps=2, on_step=lambda _: 1 / 0))
    handles.append(engine.submit(seed=4, steps=2, deadline=1e-9))
    for handle in handles:
        handle.add_done_callback(shout)
        handle.add_done_callback(heard.append)  # the others are called all the same
    ready.set()
    engine.close(timeout=60)
    assert sorted(map(id, heard)) == sorted(map(id, handles))
    images_are_right(handles[:3], [{"seed": i, "steps": 2} for i in range(3)])
    assert (engine.report.finished, engine.report.failed, is_empty(engine)) == (3, 2, True)


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_forward_pass_raises_in_the_engine_s_thread_is_a_sample_s(error: type[BaseException]) -> None:
    """Signal handlers run in the main thread alone."""

    def refuse(*args: object, **options: object) -> ForwardOutput:
        if bool((args[3] == POISON).any()):
            raise error
        return run_forward(*args, **options)

    with Engine(served(), 4, forward=refuse, execution=EXACT) as engine:
        handles = [engine.submit(seed=i, steps=3, class_labels=i) for i in (0, 1, POISON)]
    assert type(handles[2].exception(60)) is error
    images_are_right(handles[:2], [{"seed": i, "steps": 3, "class_labels": i} for i in (0, 1)])


def test_an_image_that_cannot_be_fetched_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    peek, engine = Batch.peek, stepped(2)

    def short(self: Batch, slots: np.ndarray) -> torch.Tensor:
        if engine.report.batch.ticks == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return peek(self, slots)

    monkeypatch.setattr(Batch, "peek", short)
    handles = [engine.submit(seed=i, steps=2 + i) for i in range(2)]
    while engine.step():
        pass
    assert isinstance(handles[0].exception(0), torch.OutOfMemoryError)
    images_are_right(handles[1:], [{"seed": 1, "steps": 3}])
    assert is_empty(engine)


def test_an_engine_whose_model_has_moved_refuses() -> None:
    model = copy.deepcopy(served())
    engine = Engine(model, 2, threaded=False)
    model.to("meta")
    with pytest.raises(ValueError, match="made for a model on cpu, which is on meta now; make another engine"):
        engine.submit(seed=0, steps=1)


def test_an_engine_goes_on_with_weights_of_another_dtype() -> None:
    model, request = copy.deepcopy(served()), {"steps": 2, "class_labels": 1}
    engine = Engine(model, 2, threaded=False, execution=EXACT)
    handles = [engine.submit(seed=0, **request)]
    engine.step()
    engine.step()
    model.bfloat16()
    handles.append(engine.submit(seed=0, **request))
    engine.close()
    images_are_right(handles[:1], [{"seed": 0, **request}])
    assert torch.equal(handles[1].result(0), alone({"seed": 0, **request}, model)[0])


def test_clients_in_inference_mode_hurt_nobody() -> None:
    """Tensors made in that mode cannot be written outside of it, and the engine's thread is outside."""
    with torch.inference_mode():
        engine = Engine(served(), 2, execution=EXACT)
        handles = [engine.submit(seed=0, steps=3, init_image=torch.ones(1, 4, 4), class_labels=1)]
    handles.append(engine.submit(seed=1, steps=2, solver="dpm++2m"))
    with torch.inference_mode():
        handles.append(engine.submit(seed=2, steps=4, solver="dpm++2m", guidance_scale=2.0))
        wanted = [
            {"seed": 0, "steps": 3, "init_image": torch.ones(1, 4, 4), "class_labels": 1},
            {"seed": 1, "steps": 2, "solver": "dpm++2m"},
            {"seed": 2, "steps": 4, "solver": "dpm++2m", "guidance_scale": 2.0},
        ]
        for handle in handles:
            handle.result(60)
        assert handles[0].report.passes == 2
    engine.close(timeout=60)
    images_are_right(handles, wanted)
