"""A cascade is one request that changes network and list in flight, beside others that come and go."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.engine.engine import Engine
from adadiff.engine.handles import DeadlineExceeded
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.sampling import stages
from adadiff.sampling.batch import SPARE, Batch
from adadiff.sampling.cascades import Draft
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.sampling.stages import Stages
from pretend import OnDevice, PretendDevice, moved
from recorder import recorded
from sampler.cascading import STUDENT_STEPS, written
from sampler.tiny import Clock, alone, is_empty, requests, served, stepped

ONLY = np.zeros(1, dtype=np.int64)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("cascade"))


def cascades(file: str, n: int) -> list[dict]:
    """Of all kinds: refined and drawn anew, with exits, guided."""
    made = requests(n, seed=7)
    for i, request in enumerate(made):
        request.pop("init_image", None), request.pop("strength", None)
        kind = ("share=0.5,sigma=0.7", "share=0.6,mode=regenerate", "share=1", "share=0")[i % 4]
        exits = "" if request["policy"] == "full" else f"+{request['policy']}"
        request["policy"] = f"cascade:{file},{kind}{exits}"
    return made


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def test_requests_that_come_at_any_time_are_what_they_are_alone(file: str) -> None:
    """Plain ones beside cascades, in five lanes; each image, cost and decision bit for bit."""
    own, plain = cascades(file, 12), requests(8, seed=5)
    wanted = [request for pair in zip(own, plain + own[:4], strict=True) for request in pair]
    engine, handles = stepped(5), []
    for i, request in enumerate(wanted):
        handles.append(engine.submit(**request))
        for _ in range(i % 3):
            engine.step()
    finish(engine)
    went_on = set()
    for handle, request in zip(handles, wanted, strict=True):
        image, exit_layer = alone(request)
        assert torch.equal(handle.result(0), image)
        assert torch.equal(handle.report.exit_layer[:, 0], exit_layer)
        assert handle.progress == (len(exit_layer), len(exit_layer))
        if not request["policy"].startswith("cascade"):
            assert handle.report.went_on is None
            continue
        _, report = adadiff.sample(served(), 1, **request, execution=ExecutionOptions(batch_invariant=True))
        assert torch.equal(handle.report.oracle_scores, report.oracle_scores)
        assert torch.equal(handle.report.went_on, report.went_on)
        went_on.add((request["policy"].split(",")[1].partition("+")[0], bool(report.went_on)))
    assert went_on == {  # of two kinds, some did and some did not
        *(("share=0", False), ("share=1", True)),
        *((f"share={share}", either) for share in (0.5, 0.6) for either in (False, True)),
    }
    assert is_empty(engine)


def test_progress_tells_what_may_come_and_then_what_does(file: str) -> None:
    engine, seen = stepped(2), []
    asked = {"seed": 3, "steps": 4, "class_labels": 1}
    stays = engine.submit(**asked, policy=f"cascade:{file},share=0,mode=regenerate")
    goes = engine.submit(**asked, policy=f"cascade:{file},share=1,mode=regenerate")
    most = STUDENT_STEPS + 4
    while engine.step():
        seen.append((stays.progress, goes.progress))
    assert [one for one, _ in seen[:STUDENT_STEPS]] == [(1, most), (2, most), (3, 3)]
    assert [one for _, one in seen] == [(i, most) for i in range(1, most + 1)]
    assert math.isfinite(float(stays.report.oracle_scores))
    assert (bool(stays.report.went_on), bool(goes.report.went_on)) == (False, True)


def test_a_guided_teacher_has_two_lanes_from_the_start(file: str) -> None:
    """Of three lanes, two are kept for the second stage; a forward pass never has more than three."""
    calls: list[int] = []

    def counted(*args: object, **given: object) -> ForwardOutput:
        calls.append(len(args[1]))  # type: ignore[arg-type]
        return run_forward(*args, **given)  # type: ignore[arg-type]

    engine = stepped(3, forward=counted)
    guided = {"steps": 4, "class_labels": 1, "guidance_scale": 2.0, "policy": f"cascade:{file},share=1"}
    handles = [engine.submit(seed=i, **guided) for i in range(3)]
    engine.step()
    assert [handle._admitted is not None for handle in handles] == [True, False, False]
    finish(engine)
    assert max(calls) == 2
    with pytest.raises(ValueError, match="takes 2 lanes, but the capacity is 1"):
        stepped(1).submit(seed=0, **guided)


def test_whoever_is_cancelled_or_late_in_the_second_stage_leaves_his_slot(file: str) -> None:
    clock = Clock()
    engine = stepped(3, clock=clock)
    asked = {"steps": 5, "class_labels": 2, "policy": f"cascade:{file},share=1,mode=regenerate"}
    handles = [engine.submit(seed=i, deadline=10.0 if i == 1 else None, **asked) for i in range(3)]
    for _ in range(STUDENT_STEPS + 2):
        engine.step()
    assert [handle.progress[0] for handle in handles] == [STUDENT_STEPS + 2] * 3
    assert handles[0].cancel()
    clock.now = 11.0
    then = engine.submit(seed=9, steps=2, class_labels=0, guidance_scale=3.0)
    finish(engine)
    assert handles[0].cancelled()
    with pytest.raises(DeadlineExceeded, match=f"{STUDENT_STEPS + 2} of {STUDENT_STEPS + 5} steps"):
        handles[1].result(0)
    assert torch.equal(handles[2].result(0), alone({"seed": 2, **asked})[0])
    assert torch.equal(then.result(0), alone({"seed": 9, "steps": 2, "class_labels": 0, "guidance_scale": 3.0})[0])
    assert is_empty(engine)


class Broken(RuntimeError):
    pass


def admit(batch: Batch, request: dict) -> int:
    return int(batch.admit(SampleBatch.of(served(), 1, **request), ONLY)[0])


def run(batch: Batch, at: dict[int, int]) -> dict[int, Tensor | BaseException]:
    ended: dict[int, Tensor | BaseException] = {}
    while batch.count:
        tick = batch.tick()
        assert not set(tick.failed) & set(tick.slots.tolist())
        for slot, error in tick.failed.items():
            batch.release(np.array([slot]))
            ended[at[slot]] = error
        for slot, image in zip(tick.done.tolist(), batch.take(tick.done), strict=True):
            ended[at[slot]] = image
    return ended


def invariant(capacity: int) -> Batch:
    return Batch(served(), capacity, execution=ExecutionOptions(batch_invariant=True))


def test_an_oracle_that_fails_fails_its_own_sample(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass is made again in halves, and whoever is not to blame gets the image and the decision he gets alone."""
    wanted = [
        {"seed": i, "steps": 4, "class_labels": 1 if i == 3 else i % 2 * 2, "policy": f"cascade:{file},share=0.5"}
        for i in range(6)
    ]
    right = [alone(request) for request in wanted]
    scores = Draft.scores

    def broken(self: Draft, images: Tensor, labels: Tensor, one_by_one: bool) -> Tensor:
        if (labels == 1).any():
            raise Broken("the oracle is blind")
        return scores(self, images, labels, one_by_one)

    monkeypatch.setattr(Draft, "scores", broken)
    batch = invariant(6)
    ended = run(batch, {admit(batch, request): i for i, request in enumerate(wanted)})
    assert isinstance(ended.pop(3), Broken)
    assert sorted(ended) == [0, 1, 2, 4, 5]
    assert all(torch.equal(image, right[i][0]) for i, image in ended.items())
    assert batch.free == 6


def test_memory_that_runs_out_at_the_switch_changes_nothing(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with six together, then they are judged in halves: images and decisions are those of one alone."""
    wanted = [{"seed": i, "steps": 4, "class_labels": i % 3, "policy": f"cascade:{file},share=0.5"} for i in range(6)]
    right = [alone(request) for request in wanted]
    judge, failures = Stages.judge, []

    def scarce(self: Stages, state: object, slots: np.ndarray, images: Tensor, one_by_one: bool) -> object:
        switch = judge(self, state, slots, images, one_by_one)
        if switch is not None and len(slots) > 3:
            failures.append(len(slots))
            raise MemoryError
        return switch

    monkeypatch.setattr(stages.Stages, "judge", scarce)
    batch = invariant(6)
    ended = run(batch, {admit(batch, request): i for i, request in enumerate(wanted)})
    assert failures == [6]
    assert batch.totals.halvings == 1
    assert all(torch.equal(ended[i], image) for i, (image, _) in enumerate(right))  # type: ignore[arg-type]
    assert batch.totals.passes == sum(len(exit_layer) for _, exit_layer in right)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_at_the_switch_leaves_the_batch_in_order(
    file: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Nothing was written, so the next tick makes the same step and takes the same decision."""
    wanted = [{"seed": i, "steps": 4, "class_labels": i % 3, "policy": f"cascade:{file},share=0.5"} for i in range(4)]
    right = [alone(request)[0] for request in wanted]
    judge, left = Stages.judge, [1]

    def interrupted(self: Stages, *given: object) -> object:
        switch = None if when == "before" and left else judge(self, *given)
        if (when == "before" or switch is not None) and left:
            left.clear()
            raise KeyboardInterrupt
        return switch

    monkeypatch.setattr(stages.Stages, "judge", interrupted)
    batch = invariant(4)
    at = {admit(batch, request): i for i, request in enumerate(wanted)}
    if when == "after":
        for _ in range(STUDENT_STEPS - 1):
            batch.tick()
    batch.whole = True  # as whoever keeps books of their own says
    with pytest.raises(KeyboardInterrupt):
        batch.tick()
    assert batch.whole
    ended = run(batch, at)
    assert all(torch.equal(ended[i], image) for i, image in enumerate(right))  # type: ignore[arg-type]


def test_what_a_second_stage_waits_for_is_kept(file: str) -> None:
    """Seventy other lists and policies come and go while the student draws: the teacher's are still there, with numbers
    of their own."""
    batch = invariant(4)
    longer = {"seed": 7, "steps": 9, "class_labels": 1, "solver": "ddpm", "policy": "exit:0.6"}
    at = {admit(batch, longer): 1}
    first = {"seed": 1, "steps": 5, "class_labels": 2, "solver": "dpm++2m", "guidance_scale": 2.0}
    first["policy"] = f"cascade:{file},share=1,mode=regenerate+exit:0.4"
    at[admit(batch, first)] = 0
    batch.tick()
    for steps in range(10, SPARE + 18):
        slot = admit(batch, {"seed": 0, "steps": steps, "class_labels": 0, "policy": f"exit:{steps / 1000}"})
        batch.release(np.array([slot]))
    assert len(batch._tables) < SPARE  # most were forgotten
    ended = run(batch, at)
    for i, request in enumerate((first, longer)):
        assert torch.equal(ended[i], alone(request)[0])  # type: ignore[arg-type]


def test_a_slot_is_as_new_for_whoever_follows_a_cascade(file: str) -> None:
    """Given up in either stage."""
    for then in requests(4, seed=8):
        for ticks in (1, STUDENT_STEPS + 1):
            batch = invariant(1)
            admit(batch, {"seed": 1, "steps": 5, "class_labels": 1, "policy": f"cascade:{file},share=1+exit:0.5"})
            for _ in range(ticks):
                batch.tick()
            batch.release(ONLY)
            ended = run(batch, {admit(batch, then): 0})
            assert torch.equal(ended[0], alone(then)[0])  # type: ignore[arg-type]


def test_an_engine_that_starts_over_takes_the_same_decisions(file: str) -> None:
    engine = stepped(4)
    asked = [{"seed": i, "steps": 4, "class_labels": i % 3, "policy": f"cascade:{file},share=0.5"} for i in range(4)]
    handles = [engine.submit(**request) for request in asked]
    for _ in range(STUDENT_STEPS + 1):
        engine.step()
    engine._running.batch.whole = False  # as a signal in the middle of the books leaves it
    finish(engine)
    for handle, request in zip(handles, asked, strict=True):
        image, exit_layer = alone(request)
        assert torch.equal(handle.result(0), image)
        assert torch.equal(handle.report.exit_layer[:, 0], exit_layer)


def test_a_callback_sees_the_student_s_image_at_the_switch(file: str) -> None:
    """`predicted_x0` after the student's last step is what it drew, whoever goes on from there."""
    drafts: list[Tensor] = []

    def look(handle: adadiff.engine.handles.Handle) -> None:
        if handle.progress[0] == STUDENT_STEPS:
            drafts.append(handle.predicted_x0())

    engine = stepped(2)
    asked = {"seed": 3, "steps": 4, "class_labels": 1}
    engine.submit(**asked, policy=f"cascade:{file},share=1", on_step=look)
    finish(engine)
    torch.testing.assert_close(
        drafts[0], alone({**asked, "policy": f"cascade:{file},share=0"})[0], rtol=1e-4, atol=1e-4
    )


def test_on_a_device_nothing_but_the_oracle_s_scores_is_waited_for(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the pretended device, which refuses to wait, by captured pieces of both networks; what is learnt comes a tick
    late."""
    asked = [
        {"seed": i, "steps": 4, "class_labels": i % 3, "policy": f"cascade:{file},{kind}", "guidance_scale": scale}
        for i, (kind, scale) in enumerate([("share=0.5", 1.0), ("share=1,mode=regenerate", 2.0), ("share=0", 1.0)] * 2)
    ]
    right = [adadiff.sample(served(), 1, **request) for request in asked]
    scores, asked_for = Draft.scores, []

    def there_at_once(self: Draft, *given: object) -> Tensor:
        found = scores(self, *given)
        assert isinstance(found, OnDevice)
        asked_for.append(len(found))
        return found.held

    monkeypatch.setattr(Draft, "scores", there_at_once)
    execution = ExecutionOptions(runner="captured", count_sync="lagged")
    with recorded(monkeypatch), PretendDevice() as device:
        engine = Engine(moved(served()), 5, threaded=False, execution=execution)
        assert engine._batch.late
        handles = [engine.submit(**request) for request in asked]
        device.strict = True
        finish(engine)
    assert sum(asked_for) == 6
    for handle, (image, report) in zip(handles, right, strict=True):
        assert torch.equal(handle.report.exit_layer, report.exit_layer[: len(handle.report.exit_layer)])
        assert torch.equal(handle.report.went_on, report.went_on)
        torch.testing.assert_close(handle.result(0), image[0], rtol=1e-3, atol=1e-3 * float(image.abs().max()))
    assert is_empty(engine)
