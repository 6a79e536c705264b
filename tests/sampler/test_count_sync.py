"""Whatever the host knows of the count, and when: the same images and the same exits.

`DevicePlacement` runs on the CPU here, on sets whose counts show late. Products are computed lane by lane
(`alone`), so that their rounding does not depend on how many rows the host launches them over.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adadiff.engine.engine import Engine
from adadiff.forward.count_sync import CountSync, Lagged, Sync, bucket, count_sync_from
from adadiff.forward.decision import ExitDecision
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import BatchMean, Depth, Full, Patience, Replay, Threshold
from adadiff.policies.interface import ExitContext, ExitPolicy, below
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.sampling.sampler import sample
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from adadiff_kernels import ActiveSet
from late import late
from sampler.tiny import BATCH, case, inputs, served

NETWORKS = [
    pytest.param("uvit", PAPER, id="uvit-paper"),
    pytest.param("uvit", OFFICIAL, id="uvit-official"),
    pytest.param("adaln", PAPER, id="adaln-paper"),
]
LANES = torch.arange(BATCH)
NEVER, AT_ONCE = lambda: math.inf, lambda: 0


def spread(kind: str, config: ExitConfig) -> Tensor:
    """Thresholds by lane, of every size that matters, in no order."""
    u = case(kind, config, torch.float32).uncertainties[:-1]
    return u.flatten().quantile(torch.linspace(0.02, 0.6, BATCH))[LANES * 5 % BATCH]


def ties(threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Lanes 0 and 9, 3 and 4, 12 and 5 are tied: partners, and thresholds that are equal for both."""
    partner, threshold = LANES.clone(), threshold.clone()
    for a, b in ((0, 9), (3, 4), (12, 5)):
        partner[a], partner[b], threshold[b] = b, a, threshold[a]
    return partner, threshold


def run(kind: str, config: ExitConfig, policies: str, count_sync: CountSync | str | None) -> ForwardOutput:
    """policies: "threshold", "patience", either with "tied", "mixed", "depth" or "full"."""
    c, threshold, options = case(kind, config, torch.float32), spread(kind, config), {}
    if policies.endswith("tied"):
        options["cfg_partner"], threshold = ties(threshold)
    policy: ExitPolicy | list[ExitPolicy] = (
        Patience(0.5) if policies.startswith("patience") else Threshold(0.5, min_layer=2)
    )
    if policies == "mixed":
        options["policy_index"] = LANES % 4
        policy = [Threshold(0.5), Patience(0.5), Depth(3.5), Full()]
        threshold = threshold.where(LANES % 4 < 2, 1.0 + LANES % 4)
        threshold[LANES % 4 == 3] = math.nan  # the full network takes none
    elif policies == "depth":
        policy, threshold = Replay(needs_scores=False), LANES % c.num_layers + 1.0
    elif policies == "full":
        policy, threshold = Full(), None
    options |= {"execution": ExecutionOptions(count_sync=count_sync), "record_scores": True}
    return forward(c, *c.given.all, policy=policy, threshold=threshold, **options)


POLICIES = ["threshold", "threshold, tied", "patience", "patience, tied", "mixed", "depth", "full"]


def assert_same(found: ForwardOutput, wanted: ForwardOutput, config: ExitConfig) -> None:
    assert torch.equal(found.exit_layer, wanted.exit_layer)
    assert torch.equal(found.scores.nan_to_num(-1), wanted.scores.nan_to_num(-1))
    assert (found.macs, found.macs_full) == (wanted.macs, wanted.macs_full)
    if config.shared_head:
        assert torch.equal(found.prediction, wanted.prediction)
    else:  # heads of all lanes are one batched product there
        torch.testing.assert_close(found.prediction, wanted.prediction, rtol=1e-5, atol=1e-5)


STRATEGIES = st.one_of(st.builds(Sync, st.integers(1, 4)), st.builds(Lagged, st.sampled_from([None, 1, 2, 5])))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("policies", POLICIES)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
@settings(max_examples=3)
@given(data=st.data())
def test_every_strategy_gives_the_same(kind, config, policies, data) -> None:
    wanted = run(kind, config, policies, None)
    assert len(wanted.exit_layer.unique()) >= 3 or policies == "full"
    count_sync = data.draw(STRATEGIES)
    delays = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, math.inf]), min_size=1, max_size=8))
    with pytest.MonkeyPatch.context() as monkeypatch:
        late(monkeypatch, itertools.cycle(delays).__next__)
        found = run(kind, config, policies, count_sync)
    assert_same(found, wanted, config)
    bounds = zip(found.rows, wanted.rows, strict=True)
    assert all(there >= here for there, here in bounds)


@pytest.mark.parametrize("B", [1, 16, 17, 64, 100, 256])
def test_buckets_hold_their_rows_and_are_few(B: int) -> None:
    buckets = [bucket(n, B) for n in range(B + 1)]
    assert all(n <= rows <= B for n, rows in enumerate(buckets))
    assert buckets == sorted(buckets)
    assert buckets[: min(B, 16) + 1] == list(range(min(B, 16) + 1))
    assert len(set(buckets)) <= 50
    assert all(rows - n < max(1, B / 32) for n, rows in enumerate(buckets))
    assert [bucket(rows, B) for rows in buckets] == buckets


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("count_sync", [Sync(), Lagged()], ids=str)
def test_blocks_run_over_buckets_of_rows(count_sync) -> None:
    """Of 70 lanes one exits after each block, later many: multiples of two rows, and rows in vain change nothing."""
    c = case("uvit", OFFICIAL, torch.float32)
    lanes = torch.arange(70) % BATCH
    depth = torch.where(torch.arange(70) < 3, torch.arange(70) + 1.0, 7.0)
    depth[3:50] = 5
    given = {"policy": Replay(), "threshold": depth, "record_scores": True}
    found, exact = (
        forward(c, *c.given[lanes].all, **given, execution=ExecutionOptions(count_sync=how))
        for how in (count_sync, None)
    )
    assert exact.rows == (70, 69, 68, 67, 67, 20, 20)
    assert found.rows == (70, 70, 68, 68, 68, 20, 20)
    assert torch.equal(found.exit_layer, exact.exit_layer)
    torch.testing.assert_close(found.prediction, exact.prediction, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.scores, exact.scores, rtol=0, atol=5e-6, equal_nan=True)


def test_policies_with_limits_decide_as_they_do_alone() -> None:
    """One table of all lanes' limits, of several policies: NaN exits by depth alone, infinite limits need no score."""
    policies = (Threshold(0.5, min_layer=3), Depth(2.5), Full(), Replay())
    index, t = torch.arange(32) % 4, torch.linspace(0, 999, 32)
    threshold = torch.where(index == 0, 0.3 + t / 2000, 1.0 + torch.arange(32) % 5)
    decision = ExitDecision(policies, index, 7, t, threshold, None, torch.device("cpu"))
    assert [limits.shape for limits in decision.limits] == [(32,)] * 6
    u = torch.rand(32).where(torch.arange(32) % 7 != 3, math.nan)
    for layer, limits in enumerate(decision.limits, start=1):
        found = exiting(u, limits, layer)
        assert torch.equal(found, below(u, limits))
        alone = torch.zeros(32, dtype=torch.bool)
        for k, policy in enumerate(policies):
            own = index == k
            context = ExitContext(7, t[own], threshold[own], torch.zeros(8))
            alone[own] = policy.exit_mask(u[own], layer, context)
        assert torch.equal(found, alone)
        assert not found[index == 2].any()
        by_depth = torch.where(index == 1, torch.floor(threshold) + (threshold % 1 > 0), threshold)
        assert torch.equal(found[index % 2 == 1], layer >= by_depth[index % 2 == 1])
        assert torch.equal(found[index == 0], (u < threshold)[index == 0] & (layer >= 3))
        unscored = exiting(None, limits, layer)
        assert torch.equal(unscored, found & (index % 2 == 1))


def exiting(u: Tensor | None, limits: Tensor, layer: int) -> Tensor:
    """bool [B]: the lanes that a set lets exit."""
    active = ActiveSet(len(limits))
    active.exit_rows(u, limits, layer)
    return active.exit_layer == layer


def test_rows_that_are_not_asked_keep_their_state_and_stay() -> None:
    """Rows of lanes that have exited, wait for their layer, or follow another policy: whatever their u happens to
    be."""
    index, t = torch.tensor([0, 0, 1, 0]), torch.zeros(4)
    decision = ExitDecision((Patience(0.5), Threshold(0.5)), index, 7, t, None, None, torch.device("cpu"))
    assert decision.limits is None
    u, lanes = torch.full((4,), 0.1), torch.tensor([3, 1, 2, 0], dtype=torch.int32)
    some, everybody = torch.tensor([True, False, False, True]), torch.ones(4, dtype=torch.bool)
    assert decision.mask(u, 1, lanes, some).tolist() == [False] * 4  # the first time is ignored
    # rows 0 and 3 exit at their second time; for lane 1 it is the first; row 2's policy does not wait
    assert decision.mask(u, 2, lanes, everybody).tolist() == [True, False, True, True]


def rows_run(count_sync: CountSync, delay: Callable[[], float]) -> tuple[int, ...]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        late(monkeypatch, delay)
        return run("uvit", OFFICIAL, "threshold", count_sync).rows


@pytest.mark.usefixtures("alone")
def test_what_each_strategy_launches() -> None:
    """Nobody is asked after layer 1. A count that shows k exits late is used k blocks later."""
    wanted = run("uvit", OFFICIAL, "threshold", None)
    exact = wanted.rows
    assert exact[0] == exact[1] == BATCH > exact[2] > exact[-1] > 0
    assert rows_run(Sync(), NEVER) == rows_run(Lagged(), AT_ONCE) == exact
    assert rows_run(Sync(2), NEVER) == tuple(exact[k] for k in (0, 1, 1, 3, 3, 5, 5))
    assert rows_run(Lagged(), lambda: 1) == (BATCH, BATCH, BATCH, *exact[2:-1])
    assert rows_run(Lagged(), NEVER) == (BATCH,) * len(exact)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("count_sync", [Sync(3), Lagged()], ids=str)
def test_nan_in_a_sample_reaches_nobody_through_rows_that_are_not_used(count_sync, monkeypatch) -> None:
    late(monkeypatch, NEVER)
    c = case("uvit", OFFICIAL, torch.float32)
    hurt = c.given[LANES]
    hurt.x[4, 0, 1, 1] = math.nan
    others = LANES != 4
    execution = ExecutionOptions(count_sync=count_sync)
    clean, found = (
        forward(c, *g.all, policy="exit:0.5", threshold=spread("uvit", OFFICIAL), execution=execution)
        for g in (c.given, hurt)
    )
    assert found.exit_layer[4] == c.num_layers
    assert found.prediction[4].isnan().any()
    assert torch.equal(found.exit_layer[others], clean.exit_layer[others])
    assert torch.equal(found.prediction[others], clean.prediction[others])


@pytest.mark.parametrize("config", [PAPER, OFFICIAL], ids=["paper", "official"])
@pytest.mark.parametrize("count_sync", ["sync", "sync:3", "lagged", "lagged:2"])
def test_the_usual_products_change_rounding_only(count_sync, config, monkeypatch) -> None:
    """Replayed exits, products over as many rows as are launched, long skips joined through the composed maps."""
    late(monkeypatch, NEVER)
    c = case("uvit", config, torch.float32)
    threshold = LANES % c.num_layers + 1.0
    given = {"policy": Replay(), "threshold": threshold, "record_scores": True}
    found, usual = (
        forward(c, *c.given.all, **given, execution=ExecutionOptions(count_sync=how)) for how in (count_sync, None)
    )
    assert found.exit_layer.tolist() == threshold.tolist()
    torch.testing.assert_close(found.prediction, c.exiting(found.exit_layer), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.scores, usual.scores, rtol=0, atol=5e-6, equal_nan=True)


def test_what_moved_is_counted() -> None:
    """Every second lane exits after block 1: as many rows move as where the host decides."""
    c, threshold = case("uvit", OFFICIAL, torch.float32), torch.where(LANES % 2 == 0, 1.0, 7.0)
    found, usual = (
        forward(c, *c.given.all, policy=Replay(), threshold=threshold, execution=ExecutionOptions(count_sync=how))
        for how in ("lagged", None)
    )
    assert found.rows_moved == usual.rows_moved > 0


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("count_sync", ["sync", "lagged"])
def test_no_lane_and_one_lane(count_sync, n) -> None:
    for config in (PAPER, OFFICIAL):
        c = case("uvit", config, torch.float32)
        few, threshold = inputs(c.backbone)[slice(0, n)], torch.full((n,), 3.0)
        execution = ExecutionOptions(count_sync=count_sync)
        result = forward(c, *few.all, policy=Replay(), threshold=threshold, execution=execution)
        assert result.exit_layer.tolist() == [3] * n
        torch.testing.assert_close(result.prediction, c.predictions[2, :n], rtol=1e-5, atol=2e-5)


def test_batch_mean_is_asked_where_the_count_is_exact() -> None:
    c, policy = case("uvit", OFFICIAL, torch.float32), BatchMean(0.5)

    def run(count_sync: str | None) -> ForwardOutput:
        return forward(c, *c.given.all, policy=policy, execution=ExecutionOptions(count_sync=count_sync))

    assert torch.equal(run("sync").exit_layer, run(None).exit_layer)
    for count_sync in ("sync:2", "lagged"):
        with pytest.raises(ValueError, match="whole batch"):
            run(count_sync)
    execution = ExecutionOptions(count_sync="lagged")
    batch = Batch(served(), 2, execution=execution)
    with pytest.raises(ValueError, match="whole batch"):
        batch.admit(SampleBatch.of(served(), 1, policy=policy), np.array([0]))
    with pytest.raises(ValueError, match="whole batch"):
        sample(served(), 1, policy=policy, execution=execution)


@pytest.mark.parametrize("spelling", ["sync:0", "sync:", "lagged:x", "planned", "late", "sync:-1", "sync:1.5", 3])
def test_spellings_that_are_none(spelling) -> None:
    with pytest.raises(ValueError, match=r"sync|every"):
        count_sync_from(spelling)


def test_spellings() -> None:
    known = {"sync": Sync(1), "sync:4": Sync(4), "lagged": Lagged(), "lagged:2": Lagged(2)}
    assert {spelling: count_sync_from(spelling) for spelling in known} == known
    assert count_sync_from(None) is None
    assert {spelling: ExecutionOptions(count_sync=spelling).count_sync for spelling in known} == known


def test_what_does_not_go_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)

    def refused(match: str, **options: object) -> None:
        with pytest.raises(ValueError, match=match):
            ExecutionOptions(**options)

    refused("leave count_sync out", count_sync="lagged", batch_invariant=True)
    refused("leave count_sync or group_size out", count_sync="lagged", group_size=4)
    refused("NVIDIA's profilers", nvtx=True)


@pytest.mark.parametrize("count_sync", ["sync:2", "lagged"])
def test_samples_are_the_same_under_every_strategy(count_sync, monkeypatch) -> None:
    """Whole runs, guided and tied, with products that round as they please: close, where no decision is."""
    settings = {
        "steps": [4, 7, 5, 6, 7, 4],
        "policy": "exit:depth=2.5",
        "class_labels": [0, 1, 2, 0, 1, 2],
        "guidance_scale": [1, 2, 1, 3, 1, 1.5],
        "tied": True,
    }
    late(monkeypatch, itertools.cycle([2, 0, 1, math.inf]).__next__)
    execution = ExecutionOptions(count_sync=count_sync)
    images, report = sample(served(), 6, batch=3, **settings)
    others, same = sample(served(), 6, batch=3, execution=execution, **settings)
    assert torch.equal(same.exit_layer, report.exit_layer)
    assert (same.macs, same.macs_full) == (report.macs, report.macs_full)
    torch.testing.assert_close(others, images, rtol=1e-3, atol=1e-3 * float(images.abs().max()))
    with Engine(served(), 3, execution=execution, threaded=False) as engine:
        handle = engine.submit(seed=0, steps=4, policy="exit:depth=2.5", class_labels=0)
    torch.testing.assert_close(handle.result(0), images[0], rtol=1e-3, atol=1e-3 * float(images[0].abs().max()))
