"""Whoever decides, the host or a device: the same lanes exit, rows lie in the same order, and each lane keeps what it
had at its own layer. For random policies, thresholds, partners and scores, whenever the host learns the count.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adadiff.forward.count_sync import CountSync, Lagged, Sync
from adadiff.forward.decision import ExitDecision
from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.forward.placement import DevicePlacement, HostPlacement
from adadiff.policies.exits import BatchMean, Depth, Full, Patience, Replay, Threshold
from adadiff.policies.interface import ExitContext, ExitPolicy, LaneIds
from adadiff.uem import OFFICIAL
from adadiff_kernels import DeviceSet
from late import LateWord, late
from sampler.tiny import BATCH, case

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ByNumber(ExitPolicy):
    """Not known beforehand, and without a score: it goes by who a lane is."""

    every: int
    needs_scores = False
    needs_ids = True

    def exit_mask(self, u: None, layer: int, context: ExitContext) -> Tensor:
        return (context.ids.sample + layer) % self.every == 0


@dataclass(frozen=True)
class Settings:
    """Of B lanes. u: float32 [L, B], with NaN among them."""

    num_layers: int
    policies: tuple[ExitPolicy, ...]
    index: Tensor | None
    t: Tensor
    threshold: Tensor
    partner: Tensor | None
    u: Tensor

    @property
    def decision(self) -> ExitDecision:
        return ExitDecision(self.policies, self.index, self.num_layers, self.t, self.threshold, None, CPU)


KINDS = [
    st.builds(Threshold, st.just(0.5), st.integers(1, 2)),
    st.builds(Patience, st.just(0.5)),
    st.builds(Depth, st.just(2.0)),
    st.builds(Replay, st.none(), st.booleans()),
    st.builds(ByNumber, st.integers(2, 5)),
    st.just(Full()),
]


def thresholds(policy: ExitPolicy, num_layers: int, n: int, draw: torch.Generator) -> Tensor:
    """float32 [n], of those that it takes."""
    if isinstance(policy, Full | ByNumber):
        return torch.full((n,), math.nan)
    share = torch.rand(n, generator=draw)
    if isinstance(policy, Depth):
        return 1 + share * num_layers
    return torch.floor(1 + share * num_layers) if isinstance(policy, Replay) else share.clamp(0.01, 0.99)


@st.composite
def all_settings(draw: st.DrawFn, whole_batch: bool = False, num_layers: int | None = None, B: int | None = None):
    """whole_batch: a policy that looks at all rows is among them."""
    L = draw(st.integers(3, 7)) if num_layers is None else num_layers
    B = draw(st.integers(1, 70)) if B is None else B
    policies = tuple(draw(st.lists(st.one_of(KINDS), min_size=0 if whole_batch else 1, max_size=4)))
    policies += (BatchMean(0.4),) * whole_batch
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    index = torch.randint(len(policies), (B,), generator=numbers) if len(policies) > 1 else None
    own = torch.zeros(B, dtype=torch.int64) if index is None else index
    partner = None
    if draw(st.booleans()):  # a third of the lanes in pairs; partners have one policy and one threshold
        partner, pairs = torch.arange(B), torch.randperm(B, generator=numbers)[: B // 6 * 2].view(-1, 2)
        partner[pairs], own[pairs[:, 1]] = pairs.flip(1), own[pairs[:, 0]]
    threshold = torch.empty(B)
    for k, policy in enumerate(policies):
        threshold[own == k] = thresholds(policy, L, int((own == k).sum()), numbers)
    if partner is not None:
        threshold = torch.where(torch.arange(B) < partner, threshold, threshold[partner])
    u, t = torch.rand(L, B, generator=numbers), torch.rand(B, generator=numbers) * 999
    if draw(st.booleans()):
        u[torch.rand(L, B, generator=numbers) < 0.1] = math.nan
    return Settings(L, policies, index, t, threshold, partner, u)


@dataclass
class Walk:
    """What a placement did. running: the lanes after each layer, as they lie."""

    running: list[list[int]]
    scores: Tensor
    saved: Tensor
    placement: HostPlacement | DevicePlacement


def walk(
    given: Settings, decision: ExitDecision, placement: HostPlacement | DevicePlacement, count: Callable[[], int]
) -> Walk:
    """Through all layers of a network whose rows say of which layer and lane they are; layers of its first half are
    joined again in its second. count: how many rows run."""
    L, B = given.u.shape
    scores, running, kept = torch.full((L, B), math.nan), [], {}
    hidden = torch.zeros(B, 1, 1)
    for layer in range(1, L + 1):
        if not (n := placement.bound):
            break
        lanes, runs = placement.row_to_lane.long(), count()
        assert len(lanes) == n >= runs
        hidden, source = (1000.0 * layer + lanes)[:, None, None], L + 1 - layer
        if source in kept:
            rows, by_lane, index = placement.skip(kept.pop(source))
            index = index if by_lane is None else index[by_lane]
            joined = rows[:n] if index is None else rows[index]
            assert joined[:runs].flatten().tolist() == (1000.0 * source + lanes[:runs]).tolist()
        u = None
        if layer in decision.scored:
            u = given.u[layer - 1][lanes].clone()
            u[runs:] = 0  # of rows that run in vain, below every threshold
            placement.record(scores[layer - 1], u)
        keeps = layer <= (L - 1) // 2
        if layer in decision.exit_layers:
            placement.exit(hidden, u, layer, keeps)
        if keeps:
            kept[layer] = placement.keep(hidden)
        if placement.learns and layer in decision.exit_layers:
            placement.advance(layer)
        running.append(placement.row_to_lane[: count()].tolist())
    placement.finish(hidden, L)
    return Walk(running, scores, placement.saved.flatten(), placement)


def by_host(given: Settings) -> Walk:
    decision = given.decision
    placement = HostPlacement(torch.zeros(len(given.t), 1, 1), decision, _int32(given.partner))
    return walk(given, decision, placement, lambda: placement.bound)


def by_device(given: Settings, count_sync: CountSync, rounds: bool, delays: list[float]) -> Walk:
    decision, B = given.decision, len(given.t)
    active = DeviceSet(B, CPU, word=LateWord(itertools.cycle(delays).__next__))
    active.start()
    hidden = torch.zeros(B, 1, 1)
    placement = DevicePlacement(active, hidden, decision, _int32(given.partner), count_sync, rounds)
    return walk(given, decision, placement, lambda: int(active.count))


def _int32(partner: Tensor | None) -> Tensor | None:
    return None if partner is None else partner.int()


def lane_by_lane(given: Settings) -> Tensor:
    """int64 [B]: where each lane exits, asking its own policy about it alone; of partners, where both may."""
    L, B = given.u.shape
    exit_layer, state = torch.full((B,), L), torch.zeros(B)
    partner = torch.arange(B) if given.partner is None else given.partner
    running = torch.ones(B, dtype=torch.bool)
    for layer in range(1, L):
        may = torch.zeros(B, dtype=torch.bool)
        for b in running.nonzero().flatten().tolist():
            policy = given.policies[0 if given.index is None else int(given.index[b])]
            if layer not in policy.exit_layers(L):
                continue
            u = torch.maximum(given.u[layer - 1, b], given.u[layer - 1, partner[b]])[None]
            own, zero = slice(b, b + 1), torch.zeros(1, dtype=torch.int64)
            ids = LaneIds(torch.tensor([b]), zero, zero)
            context = ExitContext(L, given.t[own], given.threshold[own], state[own], ids)
            may[b] = policy.exit_mask(u if policy.needs_scores else None, layer, context)
        exits = may & may[partner] & running
        exit_layer[exits], running = layer, running & ~exits
    return exit_layer


def assert_same(device: Walk, host: Walk, exact: bool) -> None:
    B = len(host.saved)
    found, wanted = device.placement, host.placement
    ran = len(host.running)  # the device runs on until the host knows that nobody is left
    assert device.running[:ran] == host.running
    assert device.running[ran:] == [[]] * (len(device.running) - ran)
    assert torch.equal(found.exit_layer, wanted.exit_layer)
    assert int(found.moved) == wanted.moved
    assert torch.equal(device.scores.nan_to_num(-1), host.scores.nan_to_num(-1))
    for own in (device, host):
        assert own.saved.tolist() == (1000.0 * own.placement.exit_layer + torch.arange(B)).tolist()
    if exact:
        assert found.exits == wanted.exits
        assert torch.equal(found.order, wanted.order)
    else:
        assert found.exits is found.order is None


COUNT_SYNCS = st.one_of(st.builds(Sync, st.integers(1, 4)), st.builds(Lagged, st.sampled_from([None, 1, 2, 5])))
DELAYS = st.lists(st.sampled_from([0, 1, 2, 3, math.inf]), min_size=1, max_size=8)


@pytest.mark.slow
@settings(max_examples=150)
@given(given=all_settings(), count_sync=COUNT_SYNCS, rounds=st.booleans(), delays=DELAYS)
def test_host_and_device_exit_by_the_same_algorithm(given, count_sync, rounds, delays) -> None:
    """And each lane as if it were alone."""
    host = by_host(given)
    assert_same(by_device(given, count_sync, rounds, delays), host, count_sync.exact)
    assert host.placement.exit_layer.tolist() == lane_by_lane(given).tolist()


@settings(max_examples=50)
@given(given=all_settings(whole_batch=True), rounds=st.booleans(), delays=DELAYS)
def test_policies_that_look_at_the_whole_batch_see_the_same_rows(given, rounds, delays) -> None:
    """Nobody but the rows that run, and of its own policy."""
    assert_same(by_device(given, Sync(), rounds, delays), by_host(given), exact=True)


def test_the_settings_drawn_say_something() -> None:
    """Lanes exit at many layers, partners together, and a device's rows run in vain."""
    layers, vain = set(), 0

    @settings(max_examples=50, database=None)
    @given(given=all_settings())
    def look(given: Settings) -> None:
        nonlocal vain
        walked = by_device(given, Lagged(), True, [math.inf])
        layers.update(walked.placement.exit_layer.tolist())
        vain += any(len(lanes) < len(given.t) for lanes in walked.running)

    look()
    assert layers >= set(range(1, 8))
    assert vain > 20


@pytest.mark.usefixtures("alone")
@settings(max_examples=15)
@given(given=all_settings(num_layers=7, B=BATCH), count_sync=COUNT_SYNCS, delays=DELAYS)
def test_whole_forward_passes_exit_by_the_same_algorithm(given, count_sync, delays) -> None:
    """With a network's own scores, bit for bit."""
    c = case("uvit", OFFICIAL, torch.float32)

    def run(count_sync: CountSync | None) -> ForwardOutput:
        return forward(
            c,
            *c.given.all,
            policy=given.policies,
            policy_index=given.index,
            threshold=given.threshold,
            cfg_partner=given.partner,
            execution=ExecutionOptions(count_sync=count_sync),
            record_scores=True,
        )

    wanted = run(None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        late(monkeypatch, itertools.cycle(delays).__next__)
        found = run(count_sync)
    assert torch.equal(found.exit_layer, wanted.exit_layer)
    assert torch.equal(found.prediction, wanted.prediction)
    assert torch.equal(found.scores.nan_to_num(-1), wanted.scores.nan_to_num(-1))
    assert (found.macs, found.rows_moved) == (wanted.macs, wanted.rows_moved)
