"""The samples in flight: whatever they ask for they share a tick, and a tick that fails has changed nothing."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from adadiff.diffusion.solvers import DDIM
from adadiff.diffusion.tables import SolverTable
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import Threshold
from adadiff.policies.interface import ExitContext
from adadiff.sampling import batch as module
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from sampler.tiny import alone, requests, served

ONLY = np.zeros(1, dtype=np.int64)
OTHERS = [{"seed": 40 + i, "steps": 1 + i % 3, "class_labels": i % 2, "policy": "exit:0.5"} for i in range(6)]
POISON = {"seed": 9, "steps": 3, "class_labels": 2, "policy": "exit:0.5"}  # the only one with this label


def make(capacity: int, call: Callable[..., ForwardOutput] = run_forward) -> Batch:
    return Batch(served(), capacity, execution=ExecutionOptions(batch_invariant=True), forward=call)


def admit(batch: Batch, request: dict) -> int:
    return int(batch.admit(SampleBatch.of(served(), 1, **request), ONLY)[0])


def run(batch: Batch, at: dict[int, int]) -> Iterator[tuple[int, Tensor | Exception]]:
    """Ticks until nobody is there; at: slot -> request. Yields requests and their images or errors."""
    while batch.count:
        tick = batch.tick()
        assert len(tick.slots) or tick.failed
        for slot, error in tick.failed.items():
            batch.release(np.array([slot]))
            yield at[slot], error
        for slot, image in zip(tick.done.tolist(), batch.take(tick.done), strict=True):
            yield at[slot], image


def check(wanted: list[dict], ended: dict[int, Tensor | Exception]) -> None:
    """All the requests ended, and those with an image have the one they have alone."""
    assert sorted(ended) == list(range(len(wanted)))
    for i, image in ended.items():
        if not isinstance(image, Exception):
            assert torch.equal(image, alone(wanted[i])[0])


def test_samples_of_all_kinds_share_one_forward_pass_a_tick() -> None:
    wanted = requests(12, seed=3)
    calls = []
    batch = make(12, lambda *args, **options: calls.append(len(args[1])) or run_forward(*args, **options))
    samples = [SampleBatch.of(served(), 1, **request) for request in wanted]
    at = {int(batch.admit(own, ONLY)[0]): i for i, own in enumerate(samples)}
    assert (batch.count, batch.free) == (12, 0)
    check(wanted, dict(run(batch, at)))
    made = [int(own.steps - own.first) for own in samples]
    assert calls == [
        sum(own.lanes for own, steps in zip(samples, made, strict=True) if steps > k) for k in range(max(made))
    ]
    assert batch.totals.ticks == max(made)
    assert batch.totals.passes == sum(calls)


def test_records_come_a_tick_late_and_at_once_where_a_sample_is_done() -> None:
    """Each step of each sample has one record: of the tick before, or of this one if anybody has made his last step."""
    wanted = requests(12, seed=3)
    batch, found = make(12), [[] for _ in wanted]
    at = {admit(batch, request): i for i, request in enumerate(wanted)}
    tenancy = {slot: batch.tenancy(slot) for slot in at}
    steps, ended = [SampleBatch.of(served(), 1, **request) for request in wanted], []
    unread: list[list[int]] = []  # slots of the ticks whose records are still to come
    while batch.count:
        tick = batch.tick()
        unread.append(tick.slots.tolist())
        kept = [] if len(tick.done) else [unread.pop()]
        assert [record.slots.tolist() for record in tick.records] == unread
        unread = kept
        for record in tick.records:
            known = record.read()
            assert known.scores is None
            for slot, own, step, exit_layer in zip(
                record.slots.tolist(), record.tenancy.tolist(), record.step.tolist(), known.exit_layer, strict=True
            ):
                assert own == tenancy[slot]
                assert step == int(steps[at[slot]].first) + len(found[at[slot]])
                found[at[slot]].append(exit_layer.tolist())
        ended += [at[slot] for slot in tick.done.tolist()]
        batch.release(tick.done)
        for slot in tick.done.tolist():
            assert found[at[slot]] == alone(wanted[at[slot]])[1].tolist()
    assert sorted(ended) == list(range(12))


def test_a_slot_is_as_new_for_whoever_takes_it() -> None:
    """A multistep solver leaves its history behind; guidance, policy, threshold and label differ, too."""
    first = {
        "seed": 1,
        "steps": 5,
        "solver": "dpm++2m",
        "policy": "exit:patience=0.6",
        "class_labels": 1,
        "guidance_scale": 3.0,
    }
    for then in requests(6, seed=8):
        batch = make(1)
        admit(batch, first)
        for _ in range(3):
            batch.tick()
        batch.release(ONLY)
        assert (batch.count, batch.free) == (0, 1)
        check([then], dict(run(batch, {admit(batch, then): 0})))


def test_memory_that_wants_later_comers_is_added_under_way() -> None:
    """DDIM needs no history and no base; DPM-Solver++ joins when DDIM is half way."""
    wanted = [
        {"seed": 1, "steps": 5, "solver": "ddim"},
        {"seed": 2, "steps": 4, "solver": "dpm++2m"},
        {"seed": 3, "steps": 3, "solver": "ddpm"},
    ]
    batch, at, ended = make(3), {}, {}
    for i, request in enumerate(wanted):
        at[admit(batch, request)] = i
        assert batch.tick().slots.tolist() == sorted(at)
    ended |= dict(run(batch, at))
    check(wanted, ended)


@dataclass(frozen=True, eq=False)
class Refusing(Threshold):
    def __hash__(self) -> int:
        raise RuntimeError("no hash today")


@dataclass(frozen=True)
class Unhashable(Threshold):
    """Reads its own threshold, so that two of them must not be taken for one."""

    notes: list[int] = field(default_factory=list)

    def limits(self, context: ExitContext) -> Tensor:
        return torch.full((context.num_layers - 1, len(context.t)), self.threshold)


class Broken:
    def table(self, schedule: object, steps: int) -> SolverTable:
        raise RuntimeError("no table today")


@pytest.mark.parametrize("what", ["policy", "solver"])
def test_who_cannot_begin_takes_no_slot(what: str) -> None:
    request = {"seed": 1, "steps": 2}
    good = SampleBatch.of(served(), 1, **request)
    if what == "policy":
        bad = SampleBatch.of(served(), 1, seed=[1], policy=Refusing(0.5))
    else:
        bad = SampleBatch(**{**vars(good), "solver": Broken()})
    batch = make(1)
    with pytest.raises(RuntimeError, match="today"):
        batch.admit(bad, ONLY)
    assert batch.free == 1
    check([request], dict(run(batch, {int(batch.admit(good, ONLY)[0]): 0})))


def test_a_policy_without_a_hash_is_one_of_its_own() -> None:
    wanted = [{"seed": 1, "steps": 2, "policy": Unhashable(threshold)} for threshold in (0.9, 0.05)]
    batch = make(2)
    check(wanted, dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)})))
    assert not torch.equal(alone(wanted[0])[0], alone(wanted[1])[0])


def test_a_policy_that_the_execution_excludes_takes_no_slot() -> None:
    """One that looks at the whole batch needs the exact count."""
    batch = Batch(served(), 1, execution=ExecutionOptions(count_sync="lagged"))
    with pytest.raises(ValueError, match="exact count"):
        admit(batch, {"seed": 1, "steps": 2, "policy": "exit:batch-mean=0.5"})
    assert batch.free == 1
    assert admit(batch, {"seed": 1, "steps": 2, "policy": "exit:patience=0.5"}) == 0


def test_more_samples_than_slots_are_refused() -> None:
    batch = make(2)
    with pytest.raises(ValueError, match="3 samples for 2 free slots"):
        batch.admit(SampleBatch.of(served(), 3), np.arange(3))
    assert batch.free == 2


def test_a_tick_of_nobody_does_nothing() -> None:
    batch = make(3, lambda *_, **__: pytest.fail("the network was called"))
    for _ in range(2):
        tick = batch.tick()
        assert (len(tick.slots), len(tick.done), tick.failed) == (0, 0, {})
        assert batch.free == 3


def test_settings_that_nobody_uses_are_forgotten(monkeypatch) -> None:
    """A long sample stays, beside ever new solvers and policies."""
    spare = 8
    monkeypatch.setattr(module, "SPARE", spare)
    batch, most = make(2), 0
    long = {"seed": 0, "steps": 40, "solver": "ddpm", "policy": "exit:depth=1"}
    stays = admit(batch, long)
    for k in range(4 * spare):
        policy = Threshold(0.5, min_layer=1 + k % 4)
        own = SampleBatch.of(served(), 1, seed=k, steps=1, solver=DDIM(k / (4 * spare)), policy=policy)
        slot = int(batch.admit(own, ONLY)[0])
        tick = batch.tick()
        assert tick.failed == {}
        assert tick.done.tolist() == [slot]
        image = batch.take(tick.done)
        if k % 10 == 9:
            request = {"seed": k, "steps": 1, "solver": DDIM(k / (4 * spare)), "policy": policy}
            assert torch.equal(image[0], alone(request)[0])
        most = max(most, len(batch._tables))
        assert len(batch._policies) <= 5  # policies that differ in their threshold only are one
    assert most <= spare + 3
    check([long], dict(run(batch, {stays: 0})))


def test_the_mode_of_who_begins_it_is_not_the_batchs() -> None:
    """Tensors made in inference mode cannot be written outside of it."""
    with torch.inference_mode():
        batch = make(3)
        at = {admit(batch, OTHERS[2]): 0}
    at[admit(batch, OTHERS[5])] = 1
    with torch.inference_mode():
        batch.tick()
        at[admit(batch, {"seed": 5, "steps": 3, "solver": "dpm++2m"})] = 2
    with torch.no_grad():
        batch.tick()
    ended = dict(run(batch, at))
    assert not ended[2].is_inference()
    assert torch.equal(ended[2], alone({"seed": 5, "steps": 3, "solver": "dpm++2m"})[0])


def test_nan_stays_with_its_sample() -> None:
    def hurt(*args: object, **options: object) -> ForwardOutput:
        result = run_forward(*args, **options)
        result.prediction[args[3] == POISON["class_labels"]] = math.nan
        return result

    wanted = [OTHERS[0], {**POISON, "solver": "dpm++2m"}, {**OTHERS[5], "solver": "dpm++2m"}]
    batch = make(3, hurt)
    ended = dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)}))
    assert ended[1].isnan().all()
    assert torch.equal(ended[0], alone(wanted[0])[0])
    assert torch.equal(ended[2], alone(wanted[2])[0])
