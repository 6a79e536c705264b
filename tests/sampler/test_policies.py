"""Policies as pure functions: sequences of uncertainties by hand, and what a policy may and may not be given."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.policies.exits import BatchMean, Depth, Full, Patience, Replay, Threshold
from adadiff.policies.interface import ExitContext, ExitPolicy, LaneIds, LimitPolicy, exit_layers_of
from adadiff.policies.spelling import policy_from

L = 7  # three in-blocks, one mid block, three out-blocks


def depths(
    policy: ExitPolicy, u: Tensor, threshold: Tensor, t: Tensor | None = None, half: Tensor | None = None
) -> list[int]:
    """u: [L, n]; half: [n], 1 for unconditional lanes. The layer at which each lane exits when the policy is asked
    where it asks."""
    n = u.shape[1]
    half = torch.zeros(n, dtype=torch.int64) if half is None else half
    t = torch.zeros(n) if t is None else t
    state, exited = torch.zeros(n), torch.full((n,), L)
    running = torch.arange(n)
    for layer in policy.exit_layers(L):
        ids = LaneIds(running, running * 0, half[running])
        own = ExitContext(L, t[running], threshold[running], state[running], ids if policy.needs_ids else None)
        mask = policy.exit_mask(u[layer - 1, running], layer, own)
        assert mask.dtype == torch.bool
        assert mask.shape == running.shape
        if isinstance(policy, LimitPolicy):  # decided beforehand, by lane
            limits = policy.limits(ExitContext(L, t, threshold, torch.zeros(n)))
            assert (limits.dtype, limits.shape) == (torch.float32, (L - 1, n))
            limit = limits[layer - 1, running]
            assert torch.equal(mask, (u[layer - 1, running] < limit) | limit.isposinf())
        state[running] = own.state
        exited[running[mask]] = layer
        running = running[~mask]
    return exited.tolist()


def sequence(text: str) -> Tensor:
    """One lane from a picture: "-" above the threshold 0.5, "v" below it, "n" NaN. [L, 1]."""
    return torch.tensor([{"-": 0.7, "v": 0.3, "n": math.nan}[c] for c in text])[:, None]


@pytest.mark.parametrize(
    ("picture", "threshold", "patience"),
    [
        ("-------", 7, 7),
        ("vvvvvvv", 1, 2),
        ("-v-v---", 2, 4),  # the first trigger is ignored, the mid block exits at once
        ("v-v----", 1, 3),  # triggers need not follow each other
        ("--vv---", 3, 4),
        ("--v-v--", 3, 5),  # one trigger among the in-blocks, then an out-block
        ("v------", 1, 7),
        ("---v---", 4, 4),
        ("-----v-", 6, 6),
        ("------v", 7, 7),  # nobody is asked after the last
        ("nvnv---", 2, 4),  # NaN is no trigger
        ("nnnnnnn", 7, 7),
        ("vnnnnv-", 1, 6),
    ],
)
def test_sequences_by_hand(picture: str, threshold: int, patience: int) -> None:
    half = torch.tensor([0.5])
    assert depths(Threshold(0.5), sequence(picture), half) == [threshold]
    assert depths(Patience(0.5), sequence(picture), half) == [patience]


@given(
    u=st.lists(st.lists(st.sampled_from([0.2, 0.4, 0.6, math.nan]), min_size=L, max_size=L), max_size=9),
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.7]),
)
def test_patience_equals_the_official_count(u: list[list[float]], threshold: float) -> None:
    """libs/uvit.py: certainty 1 - u above 1 - threshold counts; in-blocks return when the count passes one."""
    wanted = []
    for lane in u:
        count, exited = 0, L
        for i in range(L - 1):
            if (1 - lane[i]) > (1 - threshold):
                count += 1
                if i >= L // 2 or count > 1:
                    exited = i + 1
                    break
        wanted.append(exited)
    grid = torch.tensor(u).reshape(len(u), L).T
    assert depths(Patience(threshold), grid, torch.full((len(u),), threshold)) == wanted


def test_lanes_are_decided_by_their_own_numbers() -> None:
    u = torch.tensor([0.4, 0.4, math.nan, 0.1, 0.5])
    threshold = torch.tensor([0.5, 0.3, 0.9, 0.2, 0.5])
    mask = Threshold(0.5).exit_mask(u, 1, ExitContext(L, torch.zeros(5), threshold, torch.zeros(5)))
    assert mask.tolist() == [True, False, False, True, False]  # equal is not below


def test_batch_mean_is_the_mean_of_those_who_run() -> None:
    u = torch.tensor([[0.9, 0.2, 0.3], [0.5, 0.2, 0.1], [0.1, 0.1, 0.1]])
    u = torch.cat([u, torch.full((4, 3), 0.1)])
    at_once = BatchMean(0.3, patience=False)
    assert depths(at_once, u, torch.full((3,), 0.3)) == [2, 2, 2]  # 0.467, then 0.267
    u[1, 2] = math.nan
    assert depths(at_once, u, torch.full((3,), 0.3)) == [3, 3, 3]


def authors_batch(u: list[list[float]], threshold: float, patient: bool) -> int:
    """Blocks that a batch runs in the authors' code, u[layer - 1] being the uncertainties of its samples: libs/uvit.py
    (`patient`) and libs/uvit_t2i.py. The certainty is 1 - u; a batch returns when its mean exceeds 1 - threshold."""
    triggers = 0
    for layer in range(1, L):
        certain = sum(1 - value for value in u[layer - 1]) / len(u[layer - 1])
        if not certain > 1 - threshold:
            continue
        in_block = layer <= L // 2
        triggers += in_block
        if not (patient and in_block) or triggers == 2:
            return layer
    return L


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_batch_mean_is_the_authors_sampler(patient: bool, seed: int) -> None:
    """Batches of 5 samples, of which the last three are guided: their unconditional halves are a batch of their own."""
    numbers = random.Random(seed)
    u = [[numbers.uniform(0.2, 0.6) + 0.3 * (lane >= 5) for lane in range(8)] for _ in range(L)]
    half = torch.tensor([0] * 5 + [1] * 3)
    policy, scores = BatchMean(0.41, patience=patient), torch.tensor(u, dtype=torch.float64)
    found = depths(policy, scores, torch.full((8,), 0.41), half=half)
    wanted = [authors_batch([row[part] for row in u], 0.41, patient) for part in (slice(0, 5), slice(5, 8))]
    assert found == [wanted[0]] * 5 + [wanted[1]] * 3


def test_a_half_with_nan_holds_back_itself_alone() -> None:
    u = torch.full((L, 4), 0.1)
    u[:, 3] = math.nan
    half = torch.tensor([0, 0, 1, 1])
    assert depths(BatchMean(0.3), u, torch.full((4,), 0.3), half=half) == [2, 2, L, L]


def test_the_first_layer_asked_may_come_later() -> None:
    half = torch.tensor([0.5])
    for picture, min_layer, threshold, patience in (
        ("vvvvvvv", 3, 3, 4),  # one in-block is left to be asked, so the mid block decides
        ("v-v-v--", 2, 3, 5),
        ("v------", 2, 7, 7),
        ("vvvvvvv", 6, 6, 6),
    ):
        assert depths(Threshold(0.5, min_layer=min_layer), sequence(picture), half) == [threshold]
        assert depths(Patience(0.5, min_layer=min_layer), sequence(picture), half) == [patience]


@pytest.mark.parametrize("min_layer", [0, -1, 2.0, True, None])
def test_a_first_layer_that_is_none_is_refused(min_layer: object) -> None:
    with pytest.raises(ValueError, match="whole number of 1 or more"):
        Threshold(0.5, min_layer=min_layer)


def test_full_asks_nobody() -> None:
    assert list(Full().exit_layers(L)) == []
    assert (
        not Full().exit_mask(None, 3, ExitContext(L, torch.zeros(4), torch.full((4,), math.nan), torch.zeros(4))).any()
    )


@pytest.mark.parametrize("policy", [Threshold(0.5), Patience(0.5), BatchMean(0.5), Depth(2), Replay()], ids=str)
def test_nobody_is_asked_after_the_last_layer(policy: ExitPolicy) -> None:
    assert list(policy.exit_layers(L)) == [1, 2, 3, 4, 5, 6]
    assert list(policy.exit_layers(1)) == []


def test_depth_and_replay_exit_after_so_many_blocks() -> None:
    wanted = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 9])
    u = torch.full((L, 8), math.nan)
    for policy in (Depth(1), Replay()):
        assert depths(policy, u, wanted, torch.arange(8.0) * 31) == [1, 2, 3, 4, 5, 6, 7, 7]


@pytest.mark.parametrize("steps", [10, 20, 25, 50, 100, 250])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("name", ["linear", "stable_diffusion", "vp"])
def test_a_fraction_of_a_depth_is_spread_over_timesteps(name: str, fraction: float, steps: int) -> None:
    schedule = NoiseSchedule(name)
    t, _ = schedule.grid(steps, "trailing" if name != "vp" else "uniform")
    threshold = torch.full((steps,), 3 + fraction)
    got = depths(Depth(3 + fraction), torch.full((L, steps), math.nan), threshold, t.float())
    assert set(got) <= {3, 4}
    assert abs(sum(got) / steps - (3 + fraction)) <= 0.02 + 1.5 / steps


def test_a_fraction_of_a_depth_approaches_it() -> None:
    t = torch.arange(1000.0)
    for fraction in (0.01, 0.3, 0.5, 0.99):
        got = depths(Depth(2 + fraction), torch.full((L, 1000), math.nan), torch.full((1000,), 2 + fraction), t)
        assert sum(got) / 1000 == pytest.approx(2 + fraction, abs=2e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf, -math.inf, 1e-50, 1 - 1e-12])
@pytest.mark.parametrize("policy", [Threshold, Patience, BatchMean])
def test_thresholds_outside_the_open_interval_are_refused(policy: type, value: float) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        policy(value)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        policy(0.5).check_thresholds(torch.tensor([0.5, value, 0.5]))


@pytest.mark.parametrize("value", [0, 0.99, -3, math.nan, math.inf])
def test_depths_below_one_block_are_refused(value: float) -> None:
    for check in (lambda: Depth(value), lambda: Depth(2).check_thresholds(torch.tensor([2.0, value]))):
        with pytest.raises(ValueError, match="at least 1 block"):
            check()


@pytest.mark.parametrize("value", [0.0, math.nan, -1.0])
def test_replayed_layers_below_one_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Replay().check_thresholds(torch.tensor([3.0, value]))


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", Full()),
        ("exit:0.07", Threshold(0.07)),
        ("exit:patience=.08", Patience(0.08)),
        ("exit:0.13,min_layer=3", Threshold(0.13, min_layer=3)),
        ("exit:patience=0.13,min_layer=2", Patience(0.13, min_layer=2)),
        ("exit:batch-mean=7e-2", BatchMean(0.07)),
        ("exit:batch-mean=0.07,patience=0", BatchMean(0.07, patience=False)),
        ("exit:batch-mean=0.07,min_layer=3,patience=1", BatchMean(0.07, min_layer=3)),
        ("exit:depth=7.5", Depth(7.5)),
        ("exit:depth=3", Depth(3)),
    ],
)
def test_spellings(text: str, policy: ExitPolicy) -> None:
    assert policy_from(text) == policy
    assert type(policy_from(text)) is type(policy)
    assert policy_from(policy) is policy
    assert policy_from(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no policy ''"),
        ("none", "there are full, exit:THRESHOLD"),
        ("full:3", "full takes no '3'"),
        ("replay:3", "no policy"),
        ("exit", "exit needs THRESHOLD. There are exit:THRESHOLD"),
        ("exit:", "threshold must be a number, got ''. There are exit:THRESHOLD"),
        ("exit:seven", "'seven'"),
        ("exit:0.07,min_layer=0", "whole number of 1 or more, got 0"),
        ("exit:0.07,min_layer=2.5", "'2.5'"),
        ("exit:0.07,min_layer=", "min_layer must be a whole number, got ''"),
        ("exit:0.07,min_layer=2,min_layer=3", "min_layer is given twice"),
        ("exit:0.07,last=3", "exit takes no 'last=3'"),
        ("exit:replay=3", "exit takes no 'replay=3'"),
        ("exit:depth=x", "depth must be a number, got 'x'.*exit:depth=BLOCKS"),
        ("exit:depth=3,min_layer=2", "exit takes no 'min_layer=2'"),
        ("exit:1.2", "strictly between 0 and 1"),
        ("exit:patience=nan", "strictly between 0 and 1"),
        ("exit:depth=0", "at least 1 block"),
        ("exit:depth=inf", "at least 1 block"),
        ("threshold:0.07", "no policy 'threshold:0.07'; there are full, exit:THRESHOLD"),
        ("exit:budget=0.5", "not calibrated"),
        ("exit:table=2", r"lies in \(0, 1\]"),
        (0.07, "'exit:0.1', got 0.07"),
        (None, "'exit:0.1', got None"),
        (Threshold, "'exit:0.1', got <class"),
    ],
)
def test_what_is_no_policy_is_named(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_from(text)


def test_a_scored_policy_that_asks_nobody_is_refused() -> None:
    assert exit_layers_of(Threshold(0.5, min_layer=L - 1), L) == {L - 1}
    assert exit_layers_of(Full(), L) == frozenset()
    with pytest.raises(ValueError, match=f"no exit layer in a network of {L} blocks"):
        exit_layers_of(Threshold(0.5, min_layer=L), L)


@pytest.mark.parametrize("layers", [[0, 1], [1, L], [-1]], ids=str)
def test_a_policy_that_asks_after_layers_that_are_none_is_refused(layers: list) -> None:
    class Elsewhere(ExitPolicy):
        def exit_layers(self, num_layers: int) -> list:
            return layers

    with pytest.raises(ValueError, match=rf"exits after layers .* are 1\.\.{L - 1}"):
        exit_layers_of(Elsewhere(), L)
