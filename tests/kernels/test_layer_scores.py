"""The scores of all layers: as `uem_score` has each, and whether somebody may exit by them."""

import math

import pytest
import torch
from torch import Tensor

from adadiff_kernels import ActiveSet, LayerScores, Score, uem_score

L, B, T, D = 4, 9, 5, 24


class Problem:
    """P outputs; n rows of B lanes, in no order."""

    def __init__(self, P: int, n: int, dtype: torch.dtype, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(L, P, D, generator=draw).to(dtype)
        self.offset = torch.randn(B, L, P, generator=draw).transpose(0, 1)  # strides are the network's affair
        self.y = torch.randn(n, T, D, generator=draw).to(dtype)
        self.lanes = torch.randperm(B, generator=draw)[:n].int()

    def u(self, layer: int) -> Tensor:
        return uem_score(self.y, Score(self.weight[layer - 1], self.offset[layer - 1], 1), self.lanes)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("P", "n"), [(1, 6), (1, 1), (1, 0), (12, 6)])
def test_every_layer_is_scored_as_alone(P: int, n: int, dtype: torch.dtype) -> None:
    p = Problem(P, n, dtype)
    scores = LayerScores(p.weight, p.offset, 1)
    for layer in (1, 3, L, 2):
        torch.testing.assert_close(scores(p.y, layer, p.lanes), p.u(layer), rtol=0, atol=1e-6)
        assert scores.anybody  # nobody has limits to go by
        own = scores.of(layer)
        assert torch.equal(own.weight, p.weight[layer - 1])
        assert torch.equal(own.offset, p.offset[layer - 1])


@pytest.mark.usefixtures("core")
def test_nobody_is_missed_who_exits_by_the_limits() -> None:
    """NaN is below nothing, infinity above everything; after the last layer nobody is asked."""
    found = []
    for seed in range(20):
        p, draw = Problem(1, 6, torch.float32, seed), torch.Generator().manual_seed(seed)
        p.y[seed % 6, 2, 0] = math.nan
        limits = torch.rand(L - 1, B, generator=draw) * 0.5
        limits[torch.rand(L - 1, B, generator=draw) < 0.1] = math.inf
        limits[torch.rand(L - 1, B, generator=draw) < 0.8] = -math.inf
        scores = LayerScores(p.weight, p.offset, 1, limits)
        for layer in range(1, L):
            u, own = scores(p.y, layer, p.lanes), limits[layer - 1, p.lanes.long()]
            exits = bool(((u < own) | own.isposinf()).any())
            assert scores.anybody == exits or (scores.anybody and scores._core is None)  # PyTorch does not look
            found.append(exits)
        scores(p.y, L, p.lanes)
        assert scores.anybody
    assert 10 < sum(found) < len(found) - 10


@pytest.mark.parametrize("what", ["not contiguous", "float64", "gradients"])
def test_what_pytorch_serves_is_not_said_to_exit_nobody(what: str) -> None:
    """After a layer after which nobody could exit, one that is scored in another way: nobody has looked there."""
    p = Problem(1, 6, torch.float32)
    scores = LayerScores(p.weight, p.offset, 1, torch.full((L - 1, B), -math.inf))
    scores(p.y, 1, p.lanes)
    other = {
        "not contiguous": lambda: p.y.transpose(1, 2).contiguous().transpose(1, 2),
        "float64": p.y.double,
        "gradients": lambda: p.y.clone().requires_grad_(),
    }[what]()
    u = scores(other, 2, p.lanes)
    torch.testing.assert_close(u.detach().float(), p.u(2), rtol=0, atol=1e-6)
    assert scores.anybody


def test_an_exit_is_the_same_with_and_without_the_question() -> None:
    """A set lets nobody exit where the answer was that nobody may."""
    p = Problem(1, B, torch.float32)
    for share in torch.linspace(0, 1, 21):
        limits = torch.full((L - 1, B), float(share))
        scores, active = LayerScores(p.weight, p.offset, 1, limits), ActiveSet(B)
        u = scores(p.y, 1, p.lanes)
        by_lane = torch.empty(B).index_copy_(0, p.lanes.long(), u)
        active.exit_rows(by_lane, limits[0], 1)
        assert scores._core is None or scores.anybody == (active.count < B)


def test_a_score_at_its_limit_is_not_below_it() -> None:
    """Else nothing would be wrong but the time it takes to find that nobody exits."""
    p = Problem(1, 6, torch.float32)
    u = LayerScores(p.weight, p.offset, 1)(p.y, 1, p.lanes).clone()
    limits = torch.full((L - 1, B), -math.inf)
    for above in (False, True):
        limits[0, p.lanes.long()] = torch.where(torch.arange(6) == 3, u.nextafter(u + 1), u) if above else u
        scores = LayerScores(p.weight, p.offset, 1, limits)
        scores(p.y, 1, p.lanes)
        assert scores.anybody == above or scores._core is None


def test_shapes_that_do_not_fit() -> None:
    p = Problem(1, 6, torch.float32)
    for weight, offset in ((p.weight[:3], p.offset), (p.weight[0], p.offset), (p.weight, p.offset[:, :, :0])):
        with pytest.raises(ValueError, match="need weight"):
            LayerScores(weight, offset, 1)
    with pytest.raises(ValueError, match="offset must be float32"):
        LayerScores(p.weight, p.offset.double(), 1)
    for limits in (torch.zeros(L - 1, B + 1), torch.zeros(B, L - 1).T):
        with pytest.raises(ValueError, match="limits must be float32"):
            LayerScores(p.weight, p.offset, 1, limits)
    scores = LayerScores(p.weight, p.offset, 1)
    for y, lanes in ((p.y[:, :, :8].contiguous(), p.lanes), (p.y, p.lanes.long()), (p.y, p.lanes[:3])):
        with pytest.raises(ValueError, match=r"need y \[n, T, 24\]|must be int32|score needs"):
            scores(y, 1, lanes)
