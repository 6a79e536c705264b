"""Admission by expected work: little before much, learnt from what has been drawn, and nobody waits for ever."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adadiff.engine import admission
from adadiff.engine.admission import BINS, MOST, RATE, ExpectedWork
from adadiff.engine.engine import Engine
from adadiff.engine.handles import Handle
from adadiff.forward.options import ExecutionOptions
from adadiff.policies.exits import Full
from adadiff.sampling.sample_batch import SampleBatch
from sampler.tiny import Clock, images_are_right, is_empty, requests, served, stepped

LAYERS = 5  # of the served model
FAST = ExecutionOptions()
SHALLOW = {"policy": "exit:depth=1"}


def by_work(capacity: int = 1, **options: object) -> Engine:
    return stepped(capacity, **{"admission": "work", "execution": FAST, "clock": Clock(), **options})


def order_of_admission(engine: Engine, handles: list[Handle]) -> list[int]:
    order = []
    while engine.step():
        order += [i for i, handle in enumerate(handles) if handle.progress[0] and i not in order]
    assert is_empty(engine)
    return order


def samples(**asked: object) -> SampleBatch:
    return SampleBatch.of(served(), 1, seed=0, **asked)


def learnt(work: ExpectedWork, blocks: object, **asked: object) -> set[str]:
    """blocks: of the conditional half, by step."""
    layers = np.zeros((len(blocks), 2), dtype=np.uint8)
    layers[:, 0] = blocks
    return work.learn(work.kind_of(samples(**asked)), layers)


def expected(work: ExpectedWork, **asked: object) -> float:
    return work.blocks(work.kind_of(samples(**asked)))


def test_fewer_steps_go_first_and_equal_work_goes_by_arrival() -> None:
    engine = by_work()
    handles = [engine.submit(seed=i, steps=steps) for i, steps in enumerate([4, 2, 4, 1, 2])]
    assert order_of_admission(engine, handles) == [3, 1, 4, 0, 2]


def test_what_has_been_seen_changes_the_order() -> None:
    engine = by_work()
    fresh = [engine.submit(seed=0, steps=4, **SHALLOW), engine.submit(seed=1, steps=3)]
    assert order_of_admission(engine, fresh) == [1, 0]  # nobody knows yet what the policy leaves out
    again = [engine.submit(seed=2, steps=3), engine.submit(seed=3, steps=4, **SHALLOW)]
    assert order_of_admission(engine, again) == [1, 0]  # 4 blocks, 15 blocks
    other = [engine.submit(seed=4, steps=3), engine.submit(seed=5, steps=8, **SHALLOW)]
    assert order_of_admission(engine, other) == [1, 0]  # of another number of steps, 8 blocks


def test_what_is_learnt_holds_for_those_that_wait_already() -> None:
    engine = by_work()
    asked = [{"steps": 4, **SHALLOW}, {"steps": 5}, {"steps": 6, **SHALLOW}, {"steps": 6, **SHALLOW}]
    handles = [engine.submit(seed=i, **own) for i, own in enumerate(asked)]
    assert order_of_admission(engine, handles) == [0, 2, 3, 1]  # expected 20, 25, 30, 30 blocks; then 25, 6, 6


def test_priorities_and_deadlines_keep_their_meaning() -> None:
    engine = by_work(max_wait=10.0)
    asked = [{"steps": 1}, {"steps": 900, "priority": 1}, {"steps": 900, "deadline": 0.5}, {"steps": 60}]
    handles = [engine.submit(seed=i, **own) for i, own in enumerate(asked)]
    # due at 10 x 5/255, 10 x 4500/4750 - 10, 0.5, 10 x 300/550
    engine.step()
    assert [handle.progress[0] for handle in handles] == [0, 1, 0, 0]
    handles[1].cancel()
    engine.step()
    assert handles[0].done()
    engine.step()
    assert [handle.progress[0] for handle in handles[2:]] == [1, 0]
    engine.close(drain=False)


def test_by_arrival_work_does_not_count() -> None:
    for engine in (stepped(1), stepped(1, admission="arrival")):
        handles = [engine.submit(seed=i, steps=steps) for i, steps in enumerate([4, 2, 1])]
        assert order_of_admission(engine, handles) == [0, 1, 2]
    for wrong in ("least", None, 1):
        with pytest.raises(ValueError, match=r"admission must be 'arrival' or 'work', got"):
            stepped(1, admission=wrong)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_nobody_is_overtaken_by_what_comes_much_later(data: st.DataObject) -> None:
    """Whatever comes, and whatever is learnt meanwhile: whoever goes before another was submitted less than (p + 1) x
    max_wait seconds after it, p levels of priority above it."""
    max_wait = 4.0
    engine = by_work(max_wait=max_wait)
    clock, handles, admitted = engine._clock, [], []
    for _ in range(12):
        for _ in range(data.draw(st.integers(0, 3))):
            asked = {"steps": data.draw(st.sampled_from([1, 2, 3])), "priority": data.draw(st.sampled_from([0, 0, 1]))}
            policy = data.draw(st.sampled_from(["full", "exit:depth=1"]))
            handles.append(engine.submit(seed=0, policy=policy, **asked))
        engine.step()
        clock.now += data.draw(st.sampled_from([0.0, 0.5, 3.0]))
        for handle in handles:
            if handle.progress[0] and handle not in admitted:
                admitted.append(handle)
                for other in handles:
                    if other not in admitted:
                        later = handle.submitted - other.submitted
                        assert later < (1 + handle.priority - other.priority) * max_wait
    engine.close(drain=False)


def test_a_flood_of_little_work_holds_up_much_work_no_longer_than_said() -> None:
    """Two short ones a second, which is all that the engine can do: the long one begins when max_wait is over at the
    latest, and not at once."""
    engine = by_work(max_wait=20.0)
    clock = engine._clock
    long = engine.submit(seed=0, steps=500)
    for second in range(40):
        clock.now = float(second)
        for _ in range(2):
            engine.submit(seed=1, steps=1)
        engine.step()
        if long.progress[0]:
            break
        clock.now += 0.5
        engine.step()
    # those submitted until then go first, so it begins in the next second
    assert second == math.ceil(20 * (2500 / (2500 + 50 * LAYERS) - 5 / (5 + 50 * LAYERS)))
    engine.close(drain=False)


def test_without_experience_every_block_is_expected() -> None:
    work = ExpectedWork(served())
    assert expected(work, steps=7, **SHALLOW) == 7 * LAYERS
    assert expected(work, steps=7, guidance_scale=2.0) == 7 * LAYERS * 2
    image = torch.zeros(1, 4, 4)
    assert expected(work, steps=10, init_image=image, strength=0.3) == 3 * LAYERS


def test_blocks_are_learnt_by_timestep_policy_and_steps() -> None:
    work = ExpectedWork(served())
    assert len(learnt(work, [1, 1, 3, 5], steps=4, policy="exit:0.4")) == 2
    assert expected(work, steps=4, policy="exit:0.4") == 10
    assert expected(work, steps=4, policy="exit:0.5") == 4 * LAYERS
    assert expected(work, steps=4, policy="exit:0.4", thresholds=0.5) == 4 * LAYERS
    # times 999, 749, 499, 249; half of the steps again, from 499 on, are the deep ones
    assert expected(work, steps=4, policy="exit:0.4", init_image=torch.zeros(1, 4, 4), strength=0.5) == 8
    # between them blocks are linear in time, before and after constant: 8 steps from 999 down to 124
    by_hand = np.interp(np.arange(8) * 0.5, [0, 1, 2, 3], [1, 1, 3, 5]).sum()
    assert expected(work, steps=8, policy="exit:0.4") == pytest.approx(by_hand, abs=0.5)  # bins are 31 wide
    learnt(work, [2] * 8, steps=8, policy="exit:0.4")
    assert expected(work, steps=8, policy="exit:0.4") == 16  # its own from now on
    assert expected(work, steps=4, policy="exit:0.4") == 10
    assert learnt(work, [2, 2, 3, 5], steps=4, policy="exit:0.4") == set()
    assert expected(work, steps=4, policy="exit:0.4") == pytest.approx(10 + 2 * RATE)


def test_more_steps_than_bins_are_counted_in_full() -> None:
    work = ExpectedWork(served())
    steps = 3 * BINS + 5
    learnt(work, [2] * steps, steps=steps, **SHALLOW)
    assert expected(work, steps=steps, **SHALLOW) == 2 * steps


def test_experience_is_bounded_and_the_latest_stays() -> None:
    work = ExpectedWork(served())
    learnt(work, [1], steps=1, policy="exit:0.3")
    for i in range(MOST):
        learnt(work, [2], steps=1, policy="exit:0.4", thresholds=0.1 + i / 1000)
        learnt(work, [1], steps=1, policy="exit:0.3")
    assert len(work._curves) == MOST
    assert expected(work, steps=1, policy="exit:0.3") == 1
    assert expected(work, steps=1, policy="exit:0.4", thresholds=0.1) == LAYERS


def test_a_policy_of_somebody_else_is_known_by_its_text_and_not_kept() -> None:
    class Own(Full):
        def __str__(self) -> str:
            return "own"

    work, engine = ExpectedWork(served()), by_work()
    assert len(learnt(work, [1], steps=1, policy=Own())) == 2
    assert expected(work, steps=1, policy=Own()) == 1
    engine.submit(seed=0, steps=1, policy=Own())
    while engine.step():
        pass
    assert all(isinstance(name, str) for name in engine._waiting._work._curves)


@pytest.mark.parametrize("capacity", [2, 5])
def test_images_do_not_depend_on_the_order(capacity: int) -> None:
    wanted = requests(20, seed=9, most=4)
    engine = stepped(capacity, admission="work")
    handles = [engine.submit(**request) for request in wanted]
    order = order_of_admission(engine, handles)
    assert order != sorted(order)
    images_are_right(handles, wanted)


def test_those_that_failed_or_were_cancelled_teach_nothing() -> None:
    engine = by_work(2)
    gone = engine.submit(seed=0, steps=3, **SHALLOW)
    late = engine.submit(seed=1, steps=3, deadline=1.0, **SHALLOW)
    engine.step()
    gone.cancel()
    engine._clock.now = 2.0
    engine.step()
    assert late.done()
    assert not engine._waiting._work._curves


def test_usual_steps_are_those_of_sampling_params() -> None:
    work = ExpectedWork(served())
    assert work.share(work.kind_of(samples())) == 0.5
    assert admission.USUAL_STEPS == 50


def test_of_a_cascade_the_mean_of_all_steps_is_learnt() -> None:
    """Whether its teacher goes on is not known beforehand: 2 of 6 steps were made."""
    work, kind = ExpectedWork(served()), admission.Kind(("cascade",), np.zeros(6, dtype=np.int64), LAYERS, True)
    assert work.blocks(kind) == 6 * LAYERS
    work.learn(kind, np.array([[4, 0], [2, 0]], dtype=np.uint8))
    assert work.blocks(kind) == pytest.approx(6)
    work.learn(kind, np.array([[5, 0]] * 6, dtype=np.uint8))
    assert work.blocks(kind) == pytest.approx(6 + RATE * (30 - 6))
