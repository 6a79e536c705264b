"""A sample does not depend on its batch-mates, their order or its place.

The package promises this bit for bit where every product does. Products of this machine's libraries round by the
number of their rows, so `alone` runs each of them lane by lane; without it, decisions may differ close to the
threshold, images are compared under replayed exits, and an injected rounding shows that the tests can fail.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from adadiff.policies.exits import Patience, Replay, Threshold
from adadiff.policies.interface import ExitPolicy
from adadiff.uem import OFFICIAL, PAPER, ExitConfig
from sampler.tiny import BATCH, case

NETWORKS = [
    pytest.param("uvit", PAPER, id="uvit-paper"),
    pytest.param("uvit", OFFICIAL, id="uvit-official"),
    pytest.param("dit", PAPER, id="dit-paper"),
    pytest.param("adaln", PAPER, id="adaln-paper"),
]


def spread(kind: str, config: ExitConfig) -> Tensor:
    """Thresholds by lane, of every size that matters, in no order."""
    u = case(kind, config, torch.float32).uncertainties[:-1]
    return u.flatten().quantile(torch.linspace(0.02, 0.6, BATCH))[torch.arange(BATCH) * 5 % BATCH]


def run(
    kind: str,
    config: ExitConfig,
    policy: ExitPolicy,
    lanes: Tensor,
    group_size: int | None = None,
    thresholds: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> ForwardOutput:
    c = case(kind, config, dtype)
    thresholds = spread(kind, config) if thresholds is None else thresholds
    options = {"execution": ExecutionOptions(group_size=group_size), "record_scores": True}
    return forward(c, *c.given[lanes].all, policy=policy, threshold=thresholds[lanes], **options)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("policy", [Threshold(0.5), Patience(0.5)], ids=["threshold", "patience"])
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
@settings(max_examples=6)
@given(lanes=st.permutations(range(BATCH)), n=st.integers(1, BATCH), group_size=st.sampled_from([None, 1, 4, 5]))
def test_bit_for_bit_among_any_mates_in_any_order(kind, config, policy, lanes, n, group_size) -> None:
    lanes = torch.tensor(lanes[:n])
    everybody = run(kind, config, policy, torch.arange(BATCH))
    assert len(everybody.exit_layer.unique()) >= 3
    some = run(kind, config, policy, lanes, group_size)
    assert torch.equal(some.exit_layer, everybody.exit_layer[lanes])
    assert torch.equal(some.prediction, everybody.prediction[lanes])
    assert torch.equal(some.scores.nan_to_num(-1), everybody.scores[:, lanes].nan_to_num(-1))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_bit_for_bit_alone(kind, config) -> None:
    everybody = run(kind, config, Threshold(0.5), torch.arange(BATCH))
    for lane in range(BATCH):
        one = run(kind, config, Threshold(0.5), torch.tensor([lane]))
        assert one.exit_layer[0] == everybody.exit_layer[lane]
        assert torch.equal(one.prediction[0], everybody.prediction[lane])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_bit_for_bit_whatever_the_mates_do(kind, config) -> None:
    """Lane 6 among mates with other images, timesteps, labels and thresholds."""
    c = case(kind, config, torch.float32)
    alone = run(kind, config, Threshold(0.5), torch.tensor([6]))
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        x, t = torch.randn(c.given.x.shape, generator=draw), torch.rand(BATCH, generator=draw) * 999
        context, thresholds = torch.randint(4, (BATCH,), generator=draw), torch.rand(BATCH, generator=draw)
        slot = [0, 5, 12][seed]
        for mine, theirs in (
            (x, c.given.x),
            (t, c.given.t),
            (context, c.given.context),
            (thresholds, spread(kind, config)),
        ):
            mine[slot] = theirs[6]
        result = forward(c, x, t, context, policy=Threshold(0.5), threshold=thresholds)
        assert result.exit_layer[slot] == alone.exit_layer[0]
        assert torch.equal(result.prediction[slot], alone.prediction[0])


@pytest.fixture
def rounding_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear map is off by up to 1e-4, and by how much depends on its number of rows."""
    for network in NETWORKS:
        case(*network.values, torch.float32)  # plain results are kept for other tests, so they are made before
    forward = nn.Linear.forward

    def rounded(self: nn.Linear, h: Tensor) -> Tensor:
        rows = h.numel() // self.in_features
        return forward(self, h) * (1 + 1e-4 * math.sin(rows))

    monkeypatch.setattr(nn.Linear, "forward", rounded)


@pytest.mark.usefixtures("rounding_by_rows")
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_rounding_by_rows_is_seen(kind, config) -> None:
    """The comparison above fails where the products are not the same for any batch, so it can fail."""
    exit_layer = torch.full((BATCH,), 3.0)
    everybody = run(kind, config, Replay(), torch.arange(BATCH), thresholds=exit_layer)
    half = run(kind, config, Replay(), torch.arange(6), thresholds=exit_layer)
    assert not torch.equal(half.prediction, everybody.prediction[:6])
    assert not torch.equal(half.scores[:2], everybody.scores[:2, :6])


def flips(kind: str, config: ExitConfig, dtype: torch.dtype, bound: float, images: float) -> int:
    """Runs lanes alone and together with every threshold at a u of its own lane, where rounding decides.

    Returns the number of lanes that then exit elsewhere; checks that none does unless |u - threshold| <= bound, and
    that under replayed exits no prediction differs by more than `images`.
    """
    L = case(kind, config, dtype).num_layers
    lanes, singles = torch.arange(BATCH), [torch.tensor([b]) for b in range(BATCH)]

    def both(policy: ExitPolicy, thresholds: Tensor) -> tuple[list[ForwardOutput], ForwardOutput]:
        options = {"thresholds": thresholds, "dtype": dtype}
        return [run(kind, config, policy, b, **options) for b in singles], run(kind, config, policy, lanes, **options)

    u = torch.cat([one.scores for one in both(Replay(), torch.full((BATCH,), float(L)))[0]], 1)
    count = 0
    for layer in range(L - 1):
        alone, together = both(Threshold(0.5), u[layer].contiguous())
        exits = torch.cat([one.exit_layer for one in alone])
        for b in (exits != together.exit_layer).nonzero().flatten().tolist():
            first = int(min(exits[b], together.exit_layer[b])) - 1
            assert abs(float(u[first, b] - u[layer, b])) <= bound
            assert abs(float(together.scores[first, b] - u[layer, b])) <= bound
            count += 1
        replayed = run(kind, config, Replay(), lanes, thresholds=exits.float(), dtype=dtype)
        assert torch.equal(replayed.exit_layer, exits)
        assert (replayed.prediction - torch.cat([one.prediction for one in alone])).abs().max() <= images
    return count


# the stated bounds on |u - threshold|, and what they let a prediction of standard deviation 0.7 differ by
BOUNDS = [
    pytest.param(torch.float32, 5e-6, 2e-5, id="float32"),
    pytest.param(torch.bfloat16, 2e-2, 2e-1, id="bfloat16"),
]


@pytest.mark.parametrize(("dtype", "bound", "images"), BOUNDS)
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_decisions_differ_only_within_the_bound(kind, config, dtype, bound, images) -> None:
    flips(kind, config, dtype, bound, images)


@pytest.mark.usefixtures("rounding_by_rows")
@pytest.mark.parametrize(("kind", "config"), NETWORKS)
def test_rounding_by_rows_flips_only_close_decisions(kind, config) -> None:
    assert flips(kind, config, torch.float32, bound=1e-3, images=1e-2) > 0
