"""One forward pass with exits, against blocks and heads run one sample at a time by the network's plain modules."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import BatchMean, Depth, Full, Patience, Replay, Threshold
from adadiff.uem import OFFICIAL, PAPER
from adadiff_kernels import LayerScores
from numerics import assert_as_accurate
from sampler.tiny import BATCH, case

F32, BF16 = torch.float32, torch.bfloat16
CASES = [
    pytest.param(kind, config, dtype, id=f"{kind}-{name}-{dtype_name}")
    for kind in ("uvit", "dit", "adaln")
    for name, config in (("paper", PAPER), ("official", OFFICIAL))  # a head per layer, or one for all
    for dtype_name, dtype in (("float32", F32), ("bfloat16", BF16))
]
FLOAT32 = [param for param in CASES if param.values[2] is F32]


def run(c, policy, group_size=None, **options) -> ForwardOutput:
    execution = ExecutionOptions(group_size=group_size)
    return forward(c, *options.pop("given", c.given).all, policy=policy, execution=execution, **options)


@pytest.mark.parametrize("policy", [Full(), Threshold(1e-6), Patience(1e-6), Depth(7)], ids=str)
@pytest.mark.parametrize(("kind", "config", "dtype"), CASES)
def test_never_exiting_is_the_plain_network(kind, config, dtype, policy) -> None:
    c, exact = case(kind, config, dtype), case(kind, config, dtype, exact=True)
    plain = c.backbone(*c.given.all)[:, : c.given.x.shape[1]]
    result = run(c, policy)
    assert result.exit_layer.tolist() == [c.num_layers] * BATCH
    if kind == "uvit":  # the same operators on the same shapes
        assert torch.equal(result.prediction, plain)
    else:  # the sum with a gate may be one fused multiply-add
        assert_as_accurate(result.prediction, plain, exact.predictions[-1])
    assert result.macs >= result.macs_full if policy.needs_scores else result.macs == result.macs_full


@pytest.mark.parametrize("group", [1, 4, 5, 12, 13, 50])
@pytest.mark.parametrize(("kind", "config", "dtype"), CASES)
def test_groups_change_rounding_only(kind, config, dtype, group) -> None:
    """Not bit for bit: a product over fewer rows may sum in another order."""
    c, exact = case(kind, config, dtype), case(kind, config, dtype, exact=True)
    result = run(c, Full(), group_size=group)
    assert_as_accurate(result.prediction, c.predictions[-1], exact.predictions[-1])


@pytest.mark.parametrize("group", [1, 4, 5, 6])
@pytest.mark.parametrize("policy", [Threshold(0.48), Patience(0.5)], ids=str)
@pytest.mark.parametrize(("kind", "config"), [("uvit", PAPER), ("uvit", OFFICIAL), ("dit", PAPER), ("adaln", PAPER)])
def test_groups_of_any_size_decide_the_same(kind, config, policy, group) -> None:
    """Groups of equal size follow each other, and each has its own scores."""
    c = case(kind, config, F32)
    whole, found = (run(c, policy, group_size=size, record_scores=True) for size in (None, group))
    assert found.exit_layer.tolist() == whole.exit_layer.tolist()
    torch.testing.assert_close(found.scores, whole.scores, rtol=0, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(found.prediction, whole.prediction, rtol=1e-3, atol=1e-3)
    assert len(set(whole.exit_layer.tolist())) > 1


def patterns(layers: int) -> dict[str, list[int]]:
    return {
        "nobody": [layers] * BATCH,
        "everybody": [1] * BATCH,
        "first lane": [1] + [layers] * (BATCH - 1),
        "last lane": [layers] * (BATCH - 1) + [1],
        "alternating": [1 + b % 2 for b in range(BATCH)],
        "one stays": [2] * 6 + [layers] + [2] * 6,
        "deeper and deeper": [1 + b * (layers - 1) // (BATCH - 1) for b in range(BATCH)],
        "shallower and shallower": [layers - b * (layers - 1) // (BATCH - 1) for b in range(BATCH)],
    }


def check_pattern(kind, config, dtype, exit_layer: list[int], group: int | None) -> None:
    c, exact = case(kind, config, dtype), case(kind, config, dtype, exact=True)
    wanted = torch.tensor(exit_layer)
    result = run(c, Replay(), threshold=wanted.float(), group_size=group)
    assert result.exit_layer.tolist() == exit_layer
    assert_as_accurate(result.prediction, c.exiting(wanted), exact.exiting(wanted))


@pytest.mark.parametrize("pattern", patterns(7))
@pytest.mark.parametrize(("kind", "config", "dtype"), CASES)
def test_exit_at_k_is_k_blocks_and_that_head(kind, config, dtype, pattern) -> None:
    check_pattern(kind, config, dtype, patterns(case(kind, config, dtype).num_layers)[pattern], None)


@pytest.mark.parametrize(("kind", "config"), [("uvit", PAPER), ("uvit", OFFICIAL), ("dit", PAPER), ("adaln", PAPER)])
@settings(max_examples=20)
@given(data=st.data(), group=st.sampled_from([None, 1, 4, 5]))
def test_exit_at_k_for_random_patterns(kind, config, data, group) -> None:
    layers = case(kind, config, F32).num_layers
    exit_layer = data.draw(st.lists(st.integers(1, layers), min_size=BATCH, max_size=BATCH))
    check_pattern(kind, config, F32, exit_layer, group)


def between(u: Tensor, quantile: float) -> Tensor:
    """A threshold near this quantile of u, in the middle of the widest gap there: no decision hangs on rounding."""
    values = u.flatten().sort().values
    start = min(int(quantile * len(values)), len(values) - 9)
    gaps = values[start : start + 9].diff()
    return (values[start:][gaps.argmax()] + gaps.max() / 2).float()


def first_below(u: Tensor, threshold: Tensor) -> list[int]:
    """u: [L, B]. The first layer of 1..L-1 with u < threshold, else L."""
    layers = len(u)
    assert float((u - threshold).abs().min()) > 1e-5
    return [
        next((layer for layer in range(1, layers) if u[layer - 1, b] < threshold[b]), layers) for b in range(u.shape[1])
    ]


@pytest.mark.parametrize("quantile", [0.05, 0.2, 0.4])
@pytest.mark.parametrize(("kind", "config", "dtype"), FLOAT32)
def test_exits_at_the_first_layer_below_the_threshold(kind, config, dtype, quantile) -> None:
    c, exact = case(kind, config, dtype), case(kind, config, dtype, exact=True)
    threshold = between(exact.uncertainties[:-1], quantile).expand(BATCH)
    wanted = first_below(exact.uncertainties, threshold)
    result = run(c, Threshold(float(threshold[0])))
    assert result.exit_layer.tolist() == wanted
    assert len(set(wanted)) > 1
    exit_layer = torch.tensor(wanted)
    assert_as_accurate(result.prediction, c.exiting(exit_layer), exact.exiting(exit_layer))


def test_thresholds_by_lane_replace_the_policys_own() -> None:
    c, exact = case("uvit", PAPER, F32), case("uvit", PAPER, F32, exact=True)
    threshold = torch.linspace(0.05, 0.9, BATCH)
    wanted = first_below(exact.uncertainties, threshold)
    assert run(c, Threshold(0.5), threshold=threshold).exit_layer.tolist() == wanted


@pytest.mark.parametrize(("kind", "config", "dtype"), CASES)
def test_recorded_scores_are_the_uncertainties_of_who_was_asked(kind, config, dtype) -> None:
    c, exact = case(kind, config, dtype), case(kind, config, dtype, exact=True)
    layers = torch.arange(1, c.num_layers + 1)[:, None]
    exit_layer = torch.tensor(patterns(c.num_layers)["deeper and deeper"])
    scores = run(c, Replay(), threshold=exit_layer.float(), record_scores=True).scores
    asked = (layers <= exit_layer) & (layers < c.num_layers)
    assert torch.equal(scores.isnan(), ~asked)
    assert_as_accurate(scores[asked], c.uncertainties[asked], exact.uncertainties[asked])
    assert run(c, Replay(needs_scores=False), threshold=exit_layer.float(), record_scores=True).scores.isnan().all()
    assert run(c, Full()).scores is None


@pytest.mark.parametrize(("kind", "config", "dtype"), FLOAT32)
def test_patience_equals_the_official_loop(kind, config, dtype) -> None:
    """The official loop over in-blocks counts triggers and returns at the second; the others return at once."""
    c, exact = case(kind, config, dtype), case(kind, config, dtype, exact=True)
    threshold = float(between(exact.uncertainties, 0.4))
    wanted = []
    for u in exact.uncertainties.T.tolist():
        triggers, exited = 0, c.num_layers
        for layer, value in enumerate(u[:-1], start=1):
            if layer <= c.num_layers // 2:
                triggers += value < threshold
                if triggers < 2:
                    continue
            if value < threshold:
                exited = layer
                break
        wanted.append(exited)
    assert run(c, Patience(threshold)).exit_layer.tolist() == wanted
    assert wanted != first_below(exact.uncertainties, torch.full((BATCH,), threshold))


def test_batch_mean_is_one_decision_for_all() -> None:
    c, exact = case("uvit", PAPER, F32), case("uvit", PAPER, F32, exact=True)
    means = exact.uncertainties.mean(1)  # falls under 0.5 at block 5 first
    assert means[:4].min() > 0.5 > means[4]
    for policy in (BatchMean(0.5), BatchMean(0.5, patience=False)):  # block 5 is an out-block: no trigger is ignored
        assert run(c, policy).exit_layer.tolist() == [5] * BATCH


def test_tied_lanes_exit_together_by_the_larger_uncertainty() -> None:
    c, exact = case("uvit", PAPER, F32), case("uvit", PAPER, F32, exact=True)
    pairs = torch.tensor([9, 1, 5, 12, 4, 2, 8, 7, 6, 0, 11, 10, 3])  # 1, 4 and 7 have no partner
    together = torch.maximum(exact.uncertainties, exact.uncertainties[:, pairs])
    threshold = torch.full((BATCH,), 0.48)
    wanted = first_below(together, threshold)
    result = run(c, Threshold(0.48), cfg_partner=pairs, record_scores=True)
    assert result.exit_layer.tolist() == wanted
    assert wanted != first_below(exact.uncertainties, threshold)
    ran = ~result.scores.isnan()  # the record holds each lane's own
    torch.testing.assert_close(result.scores[ran].double(), exact.uncertainties[ran], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pairs", [[1, 0], [1, 2, 0, *range(3, 13)], [13, *range(1, 13)], [-1, *range(1, 13)]], ids=str)
def test_pairs_that_are_none_are_refused(pairs: list[int]) -> None:
    with pytest.raises(ValueError, match="cfg_partner"):
        run(case("uvit", PAPER, F32), Threshold(0.5), cfg_partner=torch.tensor(pairs))


def test_tied_lanes_share_a_threshold() -> None:
    pairs, threshold = torch.arange(BATCH), torch.full((BATCH,), 0.5)
    pairs[:2] = torch.tensor([1, 0])
    threshold[1] = 0.4
    with pytest.raises(ValueError, match="partners exit together"):
        run(case("uvit", PAPER, F32), Threshold(0.5), cfg_partner=pairs, threshold=threshold)


@pytest.mark.parametrize(("kind", "config", "dtype"), CASES)
def test_nan_in_a_sample_never_exits_and_never_spreads(kind, config, dtype) -> None:
    c = case("dit_nan" if kind == "dit" else kind, config, dtype)
    hurt = c.given[torch.arange(BATCH)]
    hurt.x[4, 0, 1, 1] = math.nan
    others = torch.arange(BATCH) != 4
    threshold = float(between(c.uncertainties[:-1], 0.3))
    result = run(c, Threshold(threshold), given=hurt)
    assert result.exit_layer[4] == c.num_layers
    assert result.prediction[4].isnan().any()
    # the same rows in the same slots, so the same bits for the others
    clean = run(c, Replay(), threshold=result.exit_layer.float())
    assert torch.equal(result.prediction[others], clean.prediction[others])
    assert not result.prediction[others].isnan().any()
    assert len(result.exit_layer[others].unique()) > 1


@pytest.mark.parametrize("policy", [Threshold(0.99), Patience(0.99), BatchMean(0.99)], ids=str)
def test_nan_uncertainty_never_exits(policy) -> None:
    c = case("uvit", PAPER, F32)
    exits = copy.deepcopy(c.exits)
    exits.weight[:2] = math.nan
    result = forward(SimpleNamespace(backbone=c.backbone, exits=exits), *c.given.all, policy=policy)
    first = 4 if isinstance(policy, Patience | BatchMean) else 3  # which ignore the first layer below
    # blocks 1 and 2 are blind; at 3 everybody is under 0.99
    assert result.exit_layer.tolist() == [first] * BATCH
    exits.weight[:] = math.nan
    result = forward(SimpleNamespace(backbone=c.backbone, exits=exits), *c.given.all, policy=policy)
    assert result.exit_layer.tolist() == [c.num_layers] * BATCH
    assert torch.equal(result.prediction, c.backbone(*c.given.all))


def test_nan_in_one_lane_keeps_its_partner() -> None:
    c = case("uvit", PAPER, F32)
    hurt = c.given[torch.arange(BATCH)]
    hurt.x[4] = math.nan
    pairs = torch.arange(BATCH)
    pairs[[4, 11]] = torch.tensor([11, 4])
    exit_layer = run(c, Threshold(0.99), given=hurt, cfg_partner=pairs).exit_layer
    assert exit_layer.tolist() == [c.num_layers if b in (4, 11) else 1 for b in range(BATCH)]


@pytest.mark.parametrize(
    "policy", [Full(), Threshold(0.5), Patience(0.5), BatchMean(0.5), Depth(2.5), Replay()], ids=str
)
@pytest.mark.parametrize(("kind", "config", "dtype"), CASES)
def test_no_lanes_is_no_error(kind, config, dtype, policy) -> None:
    c = case(kind, config, dtype)
    nothing = c.given[slice(0, 0)]
    threshold = torch.empty(0) if isinstance(policy, Replay) else None
    result = run(c, policy, given=nothing, threshold=threshold, record_scores=True, cfg_partner=torch.empty(0).long())
    assert result.prediction.shape == (0, *c.backbone.sample_shape)
    assert result.prediction.dtype == dtype
    assert (result.macs, result.macs_full, result.rows_moved, result.exit_layer.tolist()) == (0, 0, 0, [])
    assert result.scores.shape == (c.num_layers, 0)


@pytest.mark.parametrize(("kind", "config", "dtype"), FLOAT32)
def test_one_lane_moves_nothing(kind, config, dtype) -> None:
    c = case(kind, config, dtype)
    result = run(c, Replay(), given=c.given[slice(3, 4)], threshold=torch.tensor([2.0]))
    assert result.rows_moved == 0
    torch.testing.assert_close(result.prediction, c.predictions[1, 3:4], rtol=1e-5, atol=1e-5)


def test_macs_by_hand() -> None:
    """Lanes that exit after blocks 1, 3, 4 (the mid block), 6 and 7 of the tiny U-ViT: D = 48, T = 18."""
    DD, TD = 18 * 48 * 48, 18 * 18 * 48
    plain = 3 * DD + DD + 4 * DD + 4 * DD + 2 * TD  # qkv, projection, two MLP products, attention
    skip = 2 * DD + plain
    ends = 16 * 12 * 48 + 16 * 48 * 12 + 9 * 3 * 3 * 64  # patches in, patches out, convolution
    after = {1: plain, 3: 3 * plain, 4: 4 * plain, 6: 4 * plain + 2 * skip, 7: 4 * plain + 3 * skip}
    wanted = torch.tensor([1, 7, 3, 4, 6])
    for config, outputs in ((PAPER, 1), (OFFICIAL, 12)):
        c = case("uvit", config, F32)
        few = c.given[slice(0, 5)]
        for needs_scores in (True, False):
            result = run(c, Replay(needs_scores=needs_scores), given=few, threshold=wanted.float())
            # nobody is asked after the last block
            scores = 16 * outputs * 48 * sum(min(k, 6) for k in after) if needs_scores else 0
            assert result.macs == sum(after.values()) + 5 * ends + scores
            assert result.macs_full == 5 * (after[7] + ends)


def test_depth_without_scores_computes_none(monkeypatch) -> None:
    c = case("uvit", PAPER, F32)
    monkeypatch.setattr(LayerScores, "__call__", lambda *_: pytest.fail("a score was asked for"))
    monkeypatch.setattr(LayerScores, "of", lambda *_: pytest.fail("a score was asked for"))
    monkeypatch.setattr(type(c.exits), "offsets", lambda *_: pytest.fail("offsets were asked for"))
    for policy in (Depth(3), Full(), Replay(needs_scores=False)):
        threshold = torch.full((BATCH,), 3.0) if isinstance(policy, Replay) else None
        wanted = 7 if policy == Full() else 3
        assert run(c, policy, threshold=threshold).exit_layer.tolist() == [wanted] * BATCH


def test_inputs_and_weights_are_left_as_they_were() -> None:
    c = case("uvit", PAPER, F32)
    before = [value.clone() for value in (*c.given.all, *c.backbone.state_dict().values())]
    run(c, Threshold(0.5), group_size=4)
    after = [*c.given.all, *c.backbone.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
