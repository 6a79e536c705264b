"""Whatever the host knows of the count, and when: the same images and the same exits.

The engine for devices runs on the CPU here, on sets whose counts show late. Products are computed lane by lane
(`alone`), so that their rounding does not depend on how many rows the host launches them over.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adadiff.forward.counts import Counts, Lagged, Sync, bucket, counts_from
from adadiff.forward.decision import Decision
from adadiff.forward.forward import ForwardOutput, evaluate
from adadiff.policies.exit_policies import BatchMean, Depth, Full, Patience, Replay, Rule, Threshold
from adadiff.sampling.batch import Batch
from adadiff.sampling.sampler import sample
from adadiff.sampling.samples import SampleBatch
from adadiff.serving.engine import Engine
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
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
    """Lanes 0 and 9, 3 and 4, 12 and 5 are tied: pairs, and thresholds that are equal for both."""
    pairs, threshold = LANES.clone(), threshold.clone()
    for a, b in ((0, 9), (3, 4), (12, 5)):
        pairs[a], pairs[b], threshold[b] = b, a, threshold[a]
    return pairs, threshold


def run(kind: str, config: ExitConfig, rules: str, counts: Counts | str | None) -> ForwardOutput:
    """rules: "threshold", "patience", either with "tied", "mixed", "depth" or "full"."""
    c, threshold, options = case(kind, config, torch.float32), spread(kind, config), {}
    if rules.endswith("tied"):
        options["pairs"], threshold = ties(threshold)
    rule: Rule | list[Rule] = Patience(0.5) if rules.startswith("patience") else Threshold(0.5, first=2)
    if rules == "mixed":
        options["which"] = LANES % 4
        rule = [Threshold(0.5), Patience(0.5), Depth(3.5), Full()]
        threshold = threshold.where(LANES % 4 < 2, 1.0 + LANES % 4)
    elif rules == "depth":
        rule, threshold = Replay(scored=False), LANES % c.layers + 1.0
    elif rules == "full":
        rule, threshold = Full(), None
    return evaluate(c.backbone, c.exits, rule, *c.given.all, threshold=threshold, record=True, counts=counts, **options)


RULES = ["threshold", "threshold, tied", "patience", "patience, tied", "mixed", "depth", "full"]


def assert_same(found: ForwardOutput, wanted: ForwardOutput, config: ExitConfig) -> None:
    assert torch.equal(found.exit_layer, wanted.exit_layer)
    assert torch.equal(found.scores.nan_to_num(-1), wanted.scores.nan_to_num(-1))
    assert (found.macs, found.macs_full) == (wanted.macs, wanted.macs_full)
    if config.shared_head:
        assert torch.equal(found.eps, wanted.eps)
    else:  # heads of all lanes are one batched product there
        torch.testing.assert_close(found.eps, wanted.eps, rtol=1e-5, atol=1e-5)


STRATEGIES = st.one_of(st.builds(Sync, st.integers(1, 4)), st.builds(Lagged, st.sampled_from([None, 1, 2, 5])))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
@settings(max_examples=3)
@given(data=st.data())
def test_every_strategy_gives_the_same(kind, config, rules, data) -> None:
    wanted = run(kind, config, rules, None)
    assert len(wanted.exit_layer.unique()) >= 3 or rules == "full"
    counts = data.draw(STRATEGIES)
    delays = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, math.inf]), min_size=1, max_size=8))
    with pytest.MonkeyPatch.context() as monkeypatch:
        late(monkeypatch, itertools.cycle(delays).__next__)
        found = run(kind, config, rules, counts)
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
@pytest.mark.parametrize("counts", [Sync(), Lagged()], ids=str)
def test_blocks_run_over_buckets_of_rows(counts) -> None:
    """Of 70 lanes one leaves after each block, later many: multiples of two rows, and rows in vain change nothing."""
    c = case("uvit", OFFICIAL, torch.float32)
    lanes = torch.arange(70) % BATCH
    depth = torch.where(torch.arange(70) < 3, torch.arange(70) + 1.0, 7.0)
    depth[3:50] = 5
    given = (c.backbone, c.exits, Replay(), *c.given[lanes].all)
    found, exact = (evaluate(*given, threshold=depth, counts=how, record=True) for how in (counts, None))
    assert exact.rows == (70, 69, 68, 67, 67, 20, 20)
    assert found.rows == (70, 70, 68, 68, 68, 20, 20)
    assert torch.equal(found.exit_layer, exact.exit_layer)
    torch.testing.assert_close(found.eps, exact.eps, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.scores, exact.scores, rtol=0, atol=5e-6, equal_nan=True)


def test_rules_with_limits_decide_as_they_do_alone() -> None:
    """One table of all lanes' limits, of several rules: NaN leaves by depth alone, infinite limits need no score."""
    rules = (Threshold(0.5, first=3), Depth(2.5), Full(), Replay())
    which, t = torch.arange(32) % 4, torch.linspace(0, 999, 32)
    threshold = torch.where(which == 0, 0.3 + t / 2000, 1.0 + torch.arange(32) % 5)
    decision = Decision(rules, which, 7, t, threshold).to(torch.device("cpu"))
    assert decision.limits.shape == (6, 32)
    u = torch.rand(32).where(torch.arange(32) % 7 != 3, math.nan)
    for layer in range(1, 7):
        found = decision.leave(u, layer, LANES_OF_32)
        alone = torch.zeros(32, dtype=torch.bool)
        for index, rule in enumerate(rules):
            own = which == index
            alone[own] = rule.leave(u[own], layer, 7, t[own], threshold[own], torch.zeros(8))
        assert torch.equal(found, alone)
        assert not found[which == 2].any()
        by_depth = torch.where(which == 1, torch.floor(threshold) + (threshold % 1 > 0), threshold)
        assert torch.equal(found[which % 2 == 1], layer >= by_depth[which % 2 == 1])
        assert torch.equal(found[which == 0], (u < threshold)[which == 0] & (layer >= 3))
        unscored = decision.leave(None, layer, LANES_OF_32)
        assert torch.equal(unscored, found & (which % 2 == 1))


LANES_OF_32 = torch.arange(32, dtype=torch.int32)


def test_rows_that_are_not_asked_keep_their_state_and_stay() -> None:
    """Rows of lanes that have left, wait for their layer, or follow another rule: whatever their u happens to be."""
    decision = Decision((Patience(0.5), Threshold(0.5)), torch.tensor([0, 0, 1, 0]), 7, torch.zeros(4), None)
    u, lanes = torch.full((4,), 0.1), torch.tensor([3, 1, 2, 0], dtype=torch.int32)
    some, everybody = torch.tensor([True, False, False, True]), torch.ones(4, dtype=torch.bool)
    assert decision.leave_blindly(u, 1, lanes, some).tolist() == [False] * 4  # the first time is ignored
    # rows 0 and 3 leave at their second time; for lane 1 it is the first; row 2's rule does not wait
    assert decision.leave_blindly(u, 2, lanes, everybody).tolist() == [True, False, True, True]


def rows_run(counts: Counts, delay: Callable[[], float]) -> tuple[int, ...]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        late(monkeypatch, delay)
        return run("uvit", OFFICIAL, "threshold", counts).rows


@pytest.mark.usefixtures("alone")
def test_what_each_strategy_launches() -> None:
    """Nobody is asked after layer 1. A count that shows k leaves late is used k blocks later."""
    wanted = run("uvit", OFFICIAL, "threshold", None)
    exact = wanted.rows
    assert exact[0] == exact[1] == BATCH > exact[2] > exact[-1] > 0
    assert rows_run(Sync(), NEVER) == rows_run(Lagged(), AT_ONCE) == exact
    assert rows_run(Sync(2), NEVER) == tuple(exact[k] for k in (0, 1, 1, 3, 3, 5, 5))
    assert rows_run(Lagged(), lambda: 1) == (BATCH, BATCH, BATCH, *exact[2:-1])
    assert rows_run(Lagged(), NEVER) == (BATCH,) * len(exact)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("counts", [Sync(3), Lagged()], ids=str)
def test_nan_in_a_sample_reaches_nobody_through_rows_that_are_not_used(counts, monkeypatch) -> None:
    late(monkeypatch, NEVER)
    c = case("uvit", OFFICIAL, torch.float32)
    hurt = c.given[LANES]
    hurt.x[4, 0, 1, 1] = math.nan
    others = LANES != 4
    clean, found = (
        evaluate(c.backbone, c.exits, Threshold(0.5), *g.all, threshold=spread("uvit", OFFICIAL), counts=counts)
        for g in (c.given, hurt)
    )
    assert found.exit_layer[4] == c.layers
    assert found.eps[4].isnan().any()
    assert torch.equal(found.exit_layer[others], clean.exit_layer[others])
    assert torch.equal(found.eps[others], clean.eps[others])


@pytest.mark.parametrize("config", [PAPER, OFFICIAL], ids=["paper", "official"])
@pytest.mark.parametrize("counts", ["sync", "sync:3", "lagged", "lagged:2"])
def test_the_usual_products_change_rounding_only(counts, config, monkeypatch) -> None:
    """Replayed exits, products over as many rows as are launched, long skips joined through the composed maps."""
    late(monkeypatch, NEVER)
    c = case("uvit", config, torch.float32)
    threshold = LANES % c.layers + 1.0
    found, usual = (
        evaluate(c.backbone, c.exits, Replay(), *c.given.all, threshold=threshold, record=True, counts=how)
        for how in (counts, None)
    )
    assert found.exit_layer.tolist() == threshold.tolist()
    torch.testing.assert_close(found.eps, c.leaving(found.exit_layer), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.scores, usual.scores, rtol=0, atol=5e-6, equal_nan=True)


def test_what_moved_is_counted() -> None:
    """Everybody at an even place leaves after block 1: as the host's own plan would move them."""
    c, threshold = case("uvit", OFFICIAL, torch.float32), torch.where(LANES % 2 == 0, 1.0, 7.0)
    given = (c.backbone, c.exits, Replay(), *c.given.all)
    assert evaluate(*given, threshold=threshold, counts="lagged").moved == evaluate(*given, threshold=threshold).moved


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("counts", ["sync", "lagged"])
def test_no_lane_and_one_lane(counts, n) -> None:
    for config in (PAPER, OFFICIAL):
        c = case("uvit", config, torch.float32)
        few, threshold = inputs(c.backbone)[slice(0, n)], torch.full((n,), 3.0)
        result = evaluate(c.backbone, c.exits, Replay(), *few.all, threshold=threshold, counts=counts)
        assert result.exit_layer.tolist() == [3] * n
        torch.testing.assert_close(result.eps, c.predictions[2, :n], rtol=1e-5, atol=2e-5)


def test_batch_mean_is_asked_where_the_count_is_exact() -> None:
    c, rule = case("uvit", OFFICIAL, torch.float32), BatchMean(0.5)
    given = (c.backbone, c.exits, rule, *c.given.all)
    assert torch.equal(evaluate(*given, counts="sync").exit_layer, evaluate(*given).exit_layer)
    for counts in ("sync:2", "lagged"):
        with pytest.raises(ValueError, match="whole batch"):
            evaluate(*given, counts=counts)
    batch = Batch(served(), 2, counts="lagged")
    with pytest.raises(ValueError, match="whole batch"):
        batch.admit(SampleBatch.of(served(), 1, rule=rule), torch.tensor([0]))


@pytest.mark.parametrize("spelling", ["sync:0", "sync:", "lagged:x", "planned", "late", "sync:-1", "sync:1.5", 3])
def test_spellings_that_are_none(spelling) -> None:
    with pytest.raises(ValueError, match=r"sync|every|strategy"):
        counts_from(spelling)


def test_spellings() -> None:
    known = {"sync": Sync(1), "sync:4": Sync(4), "lagged": Lagged(), "lagged:2": Lagged(2)}
    assert {spelling: counts_from(spelling) for spelling in known} == known
    assert counts_from(None) is None


def test_what_does_not_go_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    c = case("uvit", OFFICIAL, torch.float32)

    def refused(match: str, **options: object) -> None:
        with pytest.raises(ValueError, match=match):
            evaluate(c.backbone, c.exits, Threshold(0.5), *c.given.all, **options)

    refused("leave counts out", counts="lagged", batch_invariant=True)
    refused("leave counts or group out", counts="lagged", group=4)
    refused("NVIDIA's profilers", nvtx=True)
    for make in (lambda **o: sample(served(), 1, **o), lambda **o: Engine(served(), 1, start=False, **o)):
        with pytest.raises(ValueError, match="leave counts out"):
            make(batch_invariant=True, counts="lagged")


@pytest.mark.parametrize("counts", ["sync:2", "lagged"])
def test_samples_are_the_same_under_every_strategy(counts, monkeypatch) -> None:
    """Whole runs, guided and tied, with products that round as they please: close, where no decision is."""
    settings = {
        "steps": [4, 7, 5, 6, 7, 4],
        "rule": "depth:2.5",
        "labels": [0, 1, 2, 0, 1, 2],
        "guidance": [0, 1, 0, 2, 0, 0.5],
        "tied": True,
    }
    late(monkeypatch, itertools.cycle([2, 0, 1, math.inf]).__next__)
    images, report = sample(served(), 6, batch=3, **settings)
    others, same = sample(served(), 6, batch=3, counts=counts, **settings)
    assert torch.equal(same.exit_layer, report.exit_layer)
    assert (same.macs, same.macs_full) == (report.macs, report.macs_full)
    torch.testing.assert_close(others, images, rtol=1e-3, atol=1e-3 * float(images.abs().max()))
    with Engine(served(), 3, counts=counts, start=False) as engine:
        handle = engine.submit(seed=0, steps=4, rule="depth:2.5", label=0)
    torch.testing.assert_close(handle.result(0), images[0], rtol=1e-3, atol=1e-3 * float(images[0].abs().max()))
