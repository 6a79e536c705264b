"""Caches of samples in flight: they belong to a sample alone, whoever shares its passes or had its slot, and whatever
fails."""

import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.forward import feature_store
from adadiff.forward.feature_store import FeatureStore, Kind, StoreUpdate
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.forward.rest_of_network import RestOfNetwork, mean_abs
from adadiff.policies.reuse import ReuseContext, ReusePolicy
from adadiff.sampling import batch as batch_module
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from naming import named
from sampler.tiny import alone, is_empty, served, stepped

INVARIANT = ExecutionOptions(batch_invariant=True)
POLICIES = (
    *("cache:threshold=0.4", "cache:threshold=0.5,first=2,gate=input", "reuse:every=2", "full", "exit:0.45"),
    *("cache:threshold=0.7+exit:0.42", "reuse:every=3,dense_early=2,dense_late=1+exit:depth=3"),
    *("cache:threshold=0.6,order=1+exit:0.42", "reuse:every=2,order=1"),
)


def requests(n: int, policies: tuple[str, ...] = POLICIES) -> list[dict]:
    """Of all kinds, guided and not, of many steps, so that others come and go meanwhile."""
    made = []
    for i in range(n):
        request = {"seed": 90 + i, "steps": 3 + i % 5, "class_labels": i % 3, "policy": policies[i % len(policies)]}
        if i % 3 == 1:
            request |= {"guidance_scale": 2.0 + i % 2, "tied": i % 2 == 0}
        if i % 4 == 3:
            request |= {"guidance_scale": 1.5, "guidance_interval": (0.0, 700.0)}
        made.append(request)
    return made


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory of the store holds what nobody may read."""
    real = torch.empty

    def spoilt(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return real(*shape, dtype=dtype, device=device).fill_(math.nan if dtype.is_floating_point else -(10**6))

    monkeypatch.setattr(feature_store, "torch", _Torch(spoilt))


class _Torch:
    """`torch` with another `empty`, for one module."""

    def __init__(self, empty: Callable[..., Tensor]) -> None:
        self.empty = empty

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def check(handles: list, wanted: list[dict]) -> None:
    """Every image, exit layer and reuse is that of the request alone, bit for bit."""
    for handle, request in zip(handles, wanted, strict=True):
        images, report = adadiff.sample(served(), 1, batch=1, execution=INVARIANT, **request)
        assert torch.equal(handle.result(0), images[0])
        assert torch.equal(handle.report.exit_layer, report.exit_layer)
        reused = handle.report.reused
        assert (reused is None and report.reused is None) or torch.equal(reused, report.reused)


def test_a_sample_does_not_depend_on_its_mates_its_slot_or_when_it_came() -> None:
    wanted = requests(14)
    engine = stepped(5)
    handles = []
    for i, request in enumerate(wanted):  # some come together, some while others run; slots are used again
        handles.append(engine.submit(**request))
        if i % 3 == 2:
            engine.step()
    while engine.step():
        pass
    assert sum(handle.report.reuses for handle in handles) > 10
    check(handles, wanted)
    assert is_empty(engine)
    assert engine._batch._reuse.store.taken == 0


def test_order_and_batch_size_change_nothing() -> None:
    own = {"steps": 6, "policy": "cache:threshold=0.5+exit:0.42", "class_labels": 1, "execution": INVARIANT}
    images, report = adadiff.sample(served(), 6, seed=[0, 1, 2, 3, 4, 5], batch=6, **own)
    others, other = adadiff.sample(served(), 6, seed=[5, 4, 3, 2, 1, 0], batch=4, **own)
    assert torch.equal(images, others.flip(0))
    assert torch.equal(report.reused, other.reused.flip(1))
    assert report.reused.any()


def test_who_takes_a_slot_finds_nothing_there() -> None:
    """The same slot and the same entries, whose last owner would have been reused at once."""
    for policy in ("cache:threshold=0.9", "cache:threshold=0.9,gate=input", "reuse:every=9"):
        batch = Batch(served(), 1, execution=INVARIANT)
        for seed in (3, 3, 4):  # even the same sample begins anew
            request = {"seed": seed, "steps": 5, "policy": policy, "class_labels": 1, "guidance_scale": 2.0}
            slots = batch.admit(SampleBatch.of(served(), 1, **request), np.zeros(1, dtype=np.int64))
            for _ in range(5):
                tick = batch.tick()
                assert not tick.failed
            assert torch.equal(batch.take(slots)[0], alone(request)[0])
        assert batch._reuse.store.taken == 0


def run(batch: Batch, wanted: list[dict]) -> Iterator[tuple[int, Tensor | BaseException]]:
    only = np.zeros(1, dtype=np.int64)
    at = {int(batch.admit(SampleBatch.of(served(), 1, **one), only)[0]): i for i, one in enumerate(wanted)}
    while batch.count:
        tick = batch.tick()
        for slot, error in tick.failed.items():
            batch.release(np.array([slot]))
            yield at[slot], error
        for slot, image in zip(tick.done.tolist(), batch.take(tick.done), strict=True):
            yield at[slot], image


REUSING = tuple(policy for policy in POLICIES if "cache" in policy or "reuse" in policy)


@pytest.mark.parametrize("lanes", [1000, 4, 2])
def test_a_pass_that_is_made_again_decides_the_same(lanes: int) -> None:
    """Too large ones fail after they were made, so that what they would have written is there, and given up."""
    calls = []

    def short(*given: object, **options: object) -> ForwardOutput:
        output = run_forward(*given, **options)
        calls.append(len(given[1]))
        if calls[-1] > lanes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    wanted = requests(6, REUSING)
    batch = Batch(served(), 6, execution=INVARIANT, forward=short)
    ended = dict(run(batch, wanted))
    assert (batch.totals.halvings > 0) == (lanes < 1000)
    assert sorted(ended) == list(range(6))
    for i, image in ended.items():
        assert torch.equal(image, alone(wanted[i])[0])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("bad"), KeyboardInterrupt()], ids=named)
def test_a_solver_step_that_fails_leaves_nothing_behind(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """One half of a tick is complete, the other fails: of an interrupt, neither is written."""
    calls, real = itertools.count(1), batch_module.solver_step
    failing = {3, 14, 31}

    def step(*given: object, **options: object) -> object:
        if next(calls) in failing:
            raise error
        return real(*given, **options)

    wanted = requests(4, REUSING)
    batch = Batch(served(), 4, execution=INVARIANT)
    monkeypatch.setattr(batch_module, "solver_step", step)
    only, ended = np.zeros(1, dtype=np.int64), {}
    at = {int(batch.admit(SampleBatch.of(served(), 1, **one), only)[0]): i for i, one in enumerate(wanted)}
    failed = 0
    while batch.count:
        try:
            tick = batch.tick()
        except KeyboardInterrupt:
            failed += 1
            continue
        failed += len(tick.failed)
        batch.release(np.array(list(tick.failed), dtype=np.int64))
        for slot, image in zip(tick.done.tolist(), batch.take(tick.done), strict=True):
            ended[at[slot]] = image
    monkeypatch.undo()
    assert failed == 0 or isinstance(error, KeyboardInterrupt)
    assert sorted(ended) == list(range(4))
    for i, image in ended.items():
        assert torch.equal(image, alone(wanted[i])[0])


def test_memory_that_runs_out_where_a_sample_begins_takes_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, only = Batch(served(), 3, execution=INVARIANT), np.zeros(1, dtype=np.int64)
    request = {"seed": 1, "steps": 4, "policy": "reuse:every=2", "class_labels": 1, "guidance_scale": 2.0}
    samples = SampleBatch.of(served(), 1, **request)
    for owner, name in ((feature_store, "upload"), (batch._slots, "add")):
        with monkeypatch.context() as short:
            short.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                batch.admit(samples, only)
        assert (batch.free, batch._reuse.store.taken) == (3, 0)
    assert torch.equal(dict(run(batch, [request]))[0], alone(request)[0])


class Raises(ReusePolicy):
    """At a lane's third step."""

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        if bool((context.step == 2).any()):
            raise KeyError("mine")
        return context.step < 0


class Wrong(ReusePolicy):
    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return torch.ones(3)


@pytest.mark.parametrize(("policy", "error"), [(Raises(), KeyError), (Wrong(), ValueError)], ids=named)
def test_a_policy_that_raises_fails_its_own_samples_alone(policy: ReusePolicy, error: type) -> None:
    engine, others = stepped(6), requests(4)
    handles = [engine.submit(**request) for request in others]
    own = [engine.submit(seed=i, steps=5, policy=policy, class_labels=1) for i in range(2)]
    while engine.step():
        pass
    assert [type(handle.exception(0)) for handle in own] == [error] * 2
    check(handles, others)
    assert is_empty(engine)


class Spoils(ReusePolicy):
    """Writes to all that it is told, and would always reuse."""

    gate = "residual"

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        for value in (change, context.step, context.age, context.steps_left, context.t):
            value.fill_(-7)
        return torch.ones_like(change, dtype=torch.bool)


@pytest.mark.parametrize("way", [None, "sync", "lagged"])
def test_a_policy_may_spoil_what_it_is_told_and_reuses_only_what_is_there(way: str | None) -> None:
    execution = ExecutionOptions(count_sync=way)
    own = {"steps": 5, "class_labels": 1, "guidance_scale": 2.0, "execution": execution}
    images, report = adadiff.sample(served(), 2, policy=Spoils(), **own)
    others, other = adadiff.sample(served(), 2, policy="reuse:every=99", **own)
    assert torch.equal(report.reused, other.reused)
    assert torch.equal(images, others)
    assert report.reused[0].sum() == 0
    assert bool(report.reused[1:].all())


@pytest.mark.parametrize(
    "policy", ["cache:threshold=1e6", "cache:threshold=1e6,gate=input", "reuse:every=9", Spoils()], ids=named
)
@pytest.mark.parametrize("execution", [INVARIANT, ExecutionOptions(count_sync="sync")], ids=["host", "device"])
def test_nan_never_reuses_and_hurts_nobody_else(policy: object, execution: ExecutionOptions) -> None:
    """From a step on, one sample of two is NaN; both are told apart lane by lane."""
    batch = Batch(served(), 2, execution=execution)
    samples = SampleBatch.of(served(), 2, steps=6, policy=policy, class_labels=1)
    slots = batch.admit(samples, np.arange(2))
    records = []
    for step in range(6):
        if step == 2:
            batch.replace(slots[:1], torch.full((1, 1, 4, 4), math.nan))
        records += batch.tick().records
    reused = torch.stack([torch.from_numpy(record.read().reused[:, 0]) for record in records])
    assert reused[:, 0].tolist() == [False, True, False, False, False, False]
    assert reused[:, 1].tolist() == [False, True, True, True, True, True]
    mate, _ = adadiff.sample(served(), 1, seed=1, steps=6, policy=policy, class_labels=1, execution=execution)
    torch.testing.assert_close(batch.take(slots)[1], mate[0], rtol=1e-4, atol=1e-4)


def test_a_store_grows_with_the_lanes_that_need_it_and_keeps_what_is_there() -> None:
    store = FeatureStore(torch.device("cpu"))
    kinds = {"rest": Kind((2, 3), torch.float32)}
    first = store.take(3, kinds)
    rows = torch.arange(18.0).view(3, 2, 3)
    made = torch.tensor([4, 5, 6])
    store.write(StoreUpdate(torch.from_numpy(first), {"rest": rows, "made": made}))
    more = store.take(30, {**kinds, "other": Kind((), torch.int32)})
    assert len({*first.tolist(), *more.tolist()}) == 33 == store.taken
    assert torch.equal(store["rest"][torch.from_numpy(first)], rows)
    assert torch.equal(store["made"][torch.from_numpy(first)], made)
    assert bool((store["made"][torch.from_numpy(more)] == -1).all())
    size = len(store["made"])
    assert 33 <= size <= 33 + max(8, 33 // 8)
    store.give_back(first)
    again = store.take(2, kinds)
    assert len(store["made"]) == size
    assert {*again.tolist()} <= {*first.tolist(), *range(33, size)}
    assert bool((store["made"][torch.from_numpy(again)] == -1).all())
    with pytest.raises(ValueError, match="'rest' is kept as"):
        store.take(1, {"rest": Kind((2, 4), torch.float32)})


def test_what_a_gate_reads_has_the_same_bits_in_any_company() -> None:
    """PyTorch splits the mean of one large lane among its threads, and not those of several."""
    values, threads = torch.randn(9, 66, 512, generator=torch.Generator().manual_seed(1)), torch.get_num_threads()
    invariant = SimpleNamespace(_invariant=True)
    torch.set_num_threads(2)
    try:
        alone_ = torch.cat([RestOfNetwork._by_lane(invariant, mean_abs, values[i : i + 1]) for i in range(9)])
        together = RestOfNetwork._by_lane(invariant, mean_abs, values)
        as_it_is = torch.cat([mean_abs(values[i : i + 1]) for i in range(9)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone_)
    torch.testing.assert_close(together, as_it_is)


def test_policies_that_nobody_follows_any_more_are_forgotten() -> None:
    """A server meets ever new thresholds; those who are there keep theirs."""
    batch, only = Batch(served(), 2, execution=INVARIANT), np.zeros(1, dtype=np.int64)
    stays = {"seed": 5, "steps": 90, "policy": "reuse:every=2", "class_labels": 1}
    for i in range(80):
        if i == 1:  # its number is another once those before it are forgotten
            slot = batch.admit(SampleBatch.of(served(), 1, **stays), only)
        short = {"seed": i, "steps": 1, "policy": f"cache:threshold={i}", "class_labels": 1}
        batch.admit(SampleBatch.of(served(), 1, **short), only)
        batch.release(batch.tick().done)
    assert len(batch._reuse) < 80
    while batch.count:
        tick = batch.tick()
        done = batch.peek(slot)[0]
        batch.release(tick.done)
    assert torch.equal(done, alone(stays)[0])
