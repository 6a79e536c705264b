"""Who gets in when: first come, first served, but for priorities and deadlines, and nobody waits for ever."""

import concurrent.futures
import math
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadiff.engine.engine import Engine
from adadiff.engine.handles import DeadlineExceeded, EngineClosed, EngineFull, Handle
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from sampler.tiny import Clock, images_are_right, is_empty, requests, served, stepped

EXACT = ExecutionOptions(batch_invariant=True)
SHORT = {"steps": 1, "policy": "exit:depth=1"}
POISON = 2  # a label


def lanes_of_calls(calls: list[int]) -> Callable[..., ForwardOutput]:
    return lambda *args, **options: calls.append(len(args[1])) or run_forward(*args, **options)


def order_of_admission(engine: Engine, handles: list[Handle]) -> list[int]:
    order = []
    while engine.step():
        order += [i for i, handle in enumerate(handles) if handle.progress[0] and i not in order]
    return order


def test_first_come_first_served() -> None:
    engine = stepped(2)
    handles = [engine.submit(seed=i, steps=1 + i % 3) for i in range(9)]
    assert order_of_admission(engine, handles) == list(range(9))


def test_priority_and_deadline_overtake() -> None:
    clock = Clock()
    engine = stepped(1, clock=clock, max_wait=10)
    asked = [{}, {"priority": 1}, {"priority": 2}, {"deadline": 5}, {"deadline": 10}, {"deadline": 1000}, {}]
    handles = [engine.submit(seed=i, **SHORT, **own) for i, own in enumerate(asked)]
    # due at 10, 0, -10, 5, 10, 10, 10
    assert order_of_admission(engine, handles) == [2, 1, 3, 0, 4, 5, 6]


@settings(max_examples=20)
@given(data=st.data())
def test_the_earliest_due_gets_in_and_nobody_starves(data: st.DataObject) -> None:
    """A flood of important requests cannot hold up one that has waited long enough."""
    clock, max_wait = Clock(), 8.0
    engine = stepped(1, clock=clock, max_wait=max_wait, execution=ExecutionOptions())
    mine = engine.submit(seed=0, **SHORT)
    most = data.draw(st.integers(0, 3))
    due, others, admitted = {0: max_wait}, [mine], []
    for _ in range(60):
        for _ in range(data.draw(st.integers(0, 3))):
            priority = data.draw(st.integers(0, most))
            due[len(others)] = clock.now + max_wait - priority * max_wait
            others.append(engine.submit(seed=1, priority=priority, **SHORT))
        if not engine.step():
            break
        now = [i for i, handle in enumerate(others) if handle.done() and i not in admitted]
        waiting = [i for i in due if i not in admitted]
        assert now == [min(waiting, key=lambda i: (due[i], i))]
        admitted += now
        clock.now += 1
        if mine.done():
            break
    overtaken_by = admitted.index(0)
    # only by those of the first (priority + 1) x max_wait seconds, three of which come in each
    assert overtaken_by <= 3 * (most + 1) * max_wait
    assert all(due[i] < max_wait for i in admitted[:overtaken_by])


@pytest.mark.parametrize("capacity", [2, 3, 5])
def test_no_forward_pass_has_more_lanes_than_the_capacity(capacity: int) -> None:
    """Guided requests take two, and do not wait for ever for two free ones beside those that take one."""
    calls, wanted = [], requests(20, seed=4, most=4)
    engine = stepped(capacity, forward=lanes_of_calls(calls))
    handles = [engine.submit(**request) for request in wanted]
    order = order_of_admission(engine, handles)
    assert order == sorted(order)
    assert max(calls) == capacity
    images_are_right(handles, wanted)
    assert is_empty(engine)


def test_a_guided_request_needs_two_lanes() -> None:
    engine = stepped(1)
    with pytest.raises(ValueError, match="takes 2 lanes, but the capacity is 1"):
        engine.submit(seed=0, steps=1, guidance_scale=2.0)
    assert is_empty(engine)


def test_deadlines_end_requests_wherever_they_are() -> None:
    """One runs too long; one waits behind requests of high priority; one is in time."""
    clock = Clock()
    engine = stepped(1, clock=clock)
    running = engine.submit(seed=0, steps=9, deadline=5)
    engine.step()
    ahead = engine.submit(seed=1, steps=20, priority=9)
    waiting = engine.submit(seed=2, steps=1, deadline=2)
    good = engine.submit(seed=3, steps=1, deadline=30)
    clock.now = 2.5
    engine.step()
    with pytest.raises(DeadlineExceeded, match="0 of 1 steps"):
        waiting.result(0)
    assert not running.done()
    assert engine.report.waiting == 2
    clock.now = 5
    engine.step()
    with pytest.raises(TimeoutError, match="2 of 9 steps"):
        running.result(0)
    assert ahead.progress == (1, 20)  # it has the slot of the other at once
    ahead.cancel()
    engine.step()
    assert good.result(0).isfinite().all()
    assert (engine.report.failed, engine.report.finished, engine.report.cancelled) == (2, 1, 1)
    assert is_empty(engine)


def test_many_late_requests_at_once() -> None:
    clock = Clock()
    engine = stepped(2, clock=clock)
    handles = [engine.submit(seed=i, steps=3, deadline=1 + i % 3, priority=i % 2) for i in range(30)]
    engine.step()
    clock.now = 2
    engine.step()
    late = [i for i, handle in enumerate(handles) if handle.done()]
    assert late == [i for i in range(30) if 1 + i % 3 <= 2]
    assert all(isinstance(handles[i].exception(0), DeadlineExceeded) for i in late)
    assert engine.report.waiting + engine.report.running == 10
    while engine.step():
        pass
    assert is_empty(engine)


def test_a_full_queue_refuses_and_room_is_room() -> None:
    engine = stepped(1, queue=3)
    handles = [engine.submit(seed=i, **SHORT) for i in range(3)]
    with pytest.raises(EngineFull, match="3 requests wait already"):
        engine.submit(seed=3, **SHORT)
    began = time.monotonic()
    with pytest.raises(EngineFull):
        engine.submit(seed=3, wait=0.05, **SHORT)
    assert time.monotonic() - began >= 0.05
    assert handles[1].cancel()
    handles.append(engine.submit(seed=3, **SHORT))
    engine.step()
    handles.append(engine.submit(seed=4, **SHORT))
    while engine.step():
        pass
    assert [handle.cancelled() for handle in handles] == [False, True, False, False, False]
    assert is_empty(engine)


@pytest.mark.parametrize("wait", [30, math.inf])
def test_who_waits_for_room_gets_it(wait: float) -> None:
    with Engine(served(), 1, queue=1) as engine, concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(engine.submit, seed=i, wait=wait, **SHORT) for i in range(20)]
        images = [future.result(60).result(60) for future in futures]
    assert all(image.isfinite().all() for image in images)
    assert engine.report.finished == 20


def test_who_waits_for_room_when_the_engine_closes_is_told() -> None:
    engine = stepped(1, queue=1)
    engine.submit(seed=0, **SHORT)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(engine.submit, seed=1, wait=60, **SHORT)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(0.05)
        engine.close()
        with pytest.raises(EngineClosed):
            future.result(60)


def test_requests_from_many_threads() -> None:
    wanted = requests(40, seed=6, most=3)
    with Engine(served(), 6, execution=EXACT) as engine:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            handles = list(pool.map(lambda request: engine.submit(**request), wanted))
        for handle in handles:
            handle.result(60)
    images_are_right(handles, wanted)
    assert is_empty(engine)
