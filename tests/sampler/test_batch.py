"""The samples in flight: whatever they ask for they share a tick, and a tick that fails has changed nothing."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from adadiff.diffusion.solvers import DDIM
from adadiff.diffusion.tables import SolverTable
from adadiff.forward.forward import ForwardOutput, evaluate
from adadiff.policies.exit_policies import Threshold
from adadiff.sampling import batch as module
from adadiff.sampling.batch import Batch
from adadiff.sampling.samples import SampleBatch
from sampler.tiny import alone, as_samples, requests, served

ONLY = torch.zeros(1, dtype=torch.int64)
OTHERS = [{"seed": 40 + i, "steps": 1 + i % 3, "label": i % 2, "rule": "threshold:0.5"} for i in range(6)]
POISON = {"seed": 9, "steps": 3, "label": 2, "rule": "threshold:0.5"}  # the only one with this label


def make(capacity: int, call: Callable[..., ForwardOutput] = evaluate, batch_invariant: bool = True) -> Batch:
    return Batch(served(), capacity, batch_invariant=batch_invariant, evaluate=call)


def admit(batch: Batch, request: dict) -> int:
    return int(batch.admit(SampleBatch.of(served(), 1, **as_samples(request)), ONLY))


def run(batch: Batch, at: dict[int, int]) -> Iterator[tuple[int, Tensor | Exception]]:
    """Ticks until nobody is there; at: place -> request. Yields requests and their images or errors."""
    while batch.count:
        tick = batch.tick()
        assert len(tick.places) or tick.failed
        for place, error in tick.failed.items():
            batch.release(torch.tensor([place]))
            yield at[place], error
        for place, image in zip(tick.done.tolist(), batch.take(tick.done), strict=True):
            yield at[place], image


def check(wanted: list[dict], ended: dict[int, Tensor | Exception]) -> None:
    """All the requests ended, and those with an image have the one they have alone."""
    assert sorted(ended) == list(range(len(wanted)))
    for i, image in ended.items():
        if not isinstance(image, Exception):
            assert torch.equal(image, alone(wanted[i])[0])


def out_of_memory(lanes: int) -> tuple[Callable[..., ForwardOutput], list[int]]:
    """An evaluation for which more than so many lanes are too many, and the lanes of each call."""
    calls = []

    def limited(*args: object, **options: object) -> ForwardOutput:
        calls.append(len(args[3]))
        if calls[-1] > lanes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(*args, **options)

    return limited, calls


def refuses(error: Exception) -> Callable[..., ForwardOutput]:
    """An evaluation that fails whenever the poisoned sample is in it."""

    def call(*args: object, **options: object) -> ForwardOutput:
        if bool((args[5] == POISON["label"]).any()):
            raise error
        return evaluate(*args, **options)

    return call


def test_samples_of_all_kinds_share_one_evaluation_a_tick() -> None:
    wanted = requests(12, seed=3)
    calls = []
    batch = make(12, lambda *args, **options: calls.append(len(args[3])) or evaluate(*args, **options))
    samples = [SampleBatch.of(served(), 1, **as_samples(request)) for request in wanted]
    at = {int(batch.admit(own, ONLY)): i for i, own in enumerate(samples)}
    assert (batch.count, batch.free) == (12, 0)
    check(wanted, dict(run(batch, at)))
    made = [int(own.steps - own.first) for own in samples]
    assert calls == [
        sum(own.lanes for own, steps in zip(samples, made, strict=True) if steps > k) for k in range(max(made))
    ]
    assert batch.totals.ticks == max(made)
    assert batch.totals.evaluations == sum(calls)


def test_a_place_is_as_new_for_whoever_takes_it() -> None:
    """A multistep solver leaves its history behind; guidance, rule, threshold and label differ, too."""
    first = {"seed": 1, "steps": 5, "solver": "dpm++2m", "rule": "patience:0.6", "label": 1, "guidance": 2.0}
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
        assert batch.tick().places.tolist() == sorted(at)
    ended |= dict(run(batch, at))
    check(wanted, ended)


@pytest.mark.parametrize(("lanes", "halvings"), [(64, 0), (8, 1), (5, 2), (2, 3)])
def test_a_batch_that_does_not_fit_is_halved_and_goes_on(lanes: int, halvings: int) -> None:
    wanted = [request for request in requests(40, seed=5, most=4) if request.get("guidance") is None][:13]
    call, calls = out_of_memory(lanes)
    batch = make(13, call)
    check(wanted, dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)})))
    assert batch.totals.halvings == halvings
    assert sum(n > lanes for n in calls) == halvings  # what did not fit once is not tried again
    assert batch.totals.evaluations == sum(n for n in calls if n <= lanes)
    assert batch.free == 13


def test_a_guided_pair_is_not_torn_apart() -> None:
    wanted = [{"seed": i, "steps": 2, "label": i % 3, "guidance": 1.5, "rule": "threshold:0.5"} for i in range(5)]
    call, calls = out_of_memory(2)
    batch = make(5, call)
    check(wanted, dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)})))
    assert calls[-1] == 2
    call, _ = out_of_memory(1)
    batch = make(5, call)
    ended = dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)}))
    assert all(isinstance(error, torch.OutOfMemoryError) for error in ended.values())
    assert batch.free == 5


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("bad"), False),
        (ValueError("bad"), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 4])
def test_a_sample_that_cannot_be_evaluated_fails_alone(error: Exception, memory: bool, place: int) -> None:
    wanted = [*OTHERS[:place], POISON, *OTHERS[place:]]
    batch = make(7, refuses(error))
    ended = dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)}))
    assert ended[place] is error
    assert [i for i, image in ended.items() if isinstance(image, Exception)] == [place]
    check(wanted, ended)
    assert (batch.totals.halvings > 0) == memory
    assert batch.free == 7


def test_an_error_that_hits_everybody_ends_everybody() -> None:
    def broken(*_: object, **__: object) -> ForwardOutput:
        raise RuntimeError("no network")

    batch = make(5, broken)
    for request in OTHERS[:5]:
        admit(batch, request)
    tick = batch.tick()
    assert sorted(tick.failed) == list(range(5))
    assert (len(tick.places), len(tick.done), len(tick.step), tuple(tick.exit_layer.shape)) == (0, 0, 0, (0, 2))
    assert len(batch.tick().failed) == 0  # they are not tried again, even before their places are free


def test_who_keeps_an_error_keeps_no_tensors() -> None:
    kept = []

    def broken(*_: object, **__: object) -> ForwardOutput:
        activations = torch.zeros(1000)
        kept.append(weakref.ref(activations))
        raise RuntimeError("no network")

    batch = make(2, broken)
    for request in OTHERS[:2]:
        admit(batch, request)
    gc.disable()
    try:
        failed = batch.tick().failed
    finally:
        gc.enable()
    assert len(failed) == 2
    assert all(activations() is None for activations in kept)


@pytest.mark.parametrize("interrupted", [1, 2, 3, 4, 5])
def test_an_interrupted_tick_has_changed_nothing(interrupted: int) -> None:
    """Ctrl-C is no fault of a sample's. The second call is one half of a tick, the third the other."""
    calls = []

    def call(*args: object, **options: object) -> ForwardOutput:
        calls.append(len(args[3]))
        if len(calls) == interrupted:
            raise KeyboardInterrupt
        if len(args[3]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(*args, **options)

    wanted, batch, at, ended, interrupts = OTHERS, make(6, call), {}, {}, 0
    for i, request in enumerate(wanted):
        at[admit(batch, request)] = i
    while batch.count:
        try:
            for i, image in run(batch, at):
                ended[i] = image
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    assert not any(isinstance(image, Exception) for image in ended.values())
    check(wanted, ended)


@dataclass(frozen=True)
class Unhashable(Threshold):
    notes: list[int] = field(default_factory=list)


class Broken:
    def table(self, schedule: object, steps: int) -> SolverTable:
        raise RuntimeError("no table today")


@pytest.mark.parametrize("what", ["rule", "solver"])
def test_who_cannot_begin_takes_no_place(what: str) -> None:
    request = {"seed": 1, "steps": 2}
    good = SampleBatch.of(served(), 1, **as_samples(request))
    if what == "rule":
        bad = SampleBatch.of(served(), 1, seeds=[1], rule=Unhashable(0.5))
    else:
        bad = SampleBatch(**{**vars(good), "solver": Broken()})
    batch = make(1)
    with pytest.raises((TypeError, RuntimeError)):
        batch.admit(bad, ONLY)
    assert batch.free == 1
    check([request], dict(run(batch, {int(batch.admit(good, ONLY)): 0})))


def test_more_samples_than_places_are_refused() -> None:
    batch = make(2)
    with pytest.raises(ValueError, match="3 samples for 2 free places"):
        batch.admit(SampleBatch.of(served(), 3), torch.arange(3))
    assert batch.free == 2


def test_a_tick_of_nobody_does_nothing() -> None:
    batch = make(3, lambda *_, **__: pytest.fail("the network was called"))
    for _ in range(2):
        tick = batch.tick()
        assert (len(tick.places), len(tick.done), tick.failed) == (0, 0, {})
        assert batch.free == 3


def test_settings_that_nobody_uses_are_forgotten(monkeypatch) -> None:
    """A long sample stays, beside ever new solvers and rules."""
    spare = 8
    monkeypatch.setattr(module, "SPARE", spare)
    batch, most = make(2), 0
    long = {"seed": 0, "steps": 40, "solver": "ddpm", "rule": "depth:1"}
    stays = admit(batch, long)
    for k in range(4 * spare):
        rule = Threshold(0.5, first=1 + k % 4)
        own = SampleBatch.of(served(), 1, seeds=[k], steps=1, solver=DDIM(k / (4 * spare)), rule=rule)
        place = int(batch.admit(own, ONLY))
        tick = batch.tick()
        assert tick.failed == {}
        assert tick.done.tolist() == [place]
        image = batch.take(tick.done)
        if k % 10 == 9:
            request = {"seed": k, "steps": 1, "solver": DDIM(k / (4 * spare)), "rule": rule}
            assert torch.equal(image[0], alone(request)[0])
        most = max(most, len(batch._tables))
        assert len(batch._rules) <= 5  # rules that differ in their threshold only are one
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
        result = evaluate(*args, **options)
        result.eps[args[5] == POISON["label"]] = math.nan
        return result

    wanted = [OTHERS[0], {**POISON, "solver": "dpm++2m"}, {**OTHERS[5], "solver": "dpm++2m"}]
    batch = make(3, hurt)
    ended = dict(run(batch, {admit(batch, request): i for i, request in enumerate(wanted)}))
    assert ended[1].isnan().all()
    assert torch.equal(ended[0], alone(wanted[0])[0])
    assert torch.equal(ended[2], alone(wanted[2])[0])
