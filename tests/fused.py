"""Problems for the fused pass, and what its Triton kernel must make of them: against float64, by the tolerance rule."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adadiff_kernels import Norm, Score, residual_uem
from numerics import assert_as_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    pytest.param((SINGLE, SINGLE), id="float32"),
    pytest.param((BRAIN, BRAIN), id="bfloat16"),
    pytest.param((HALF, HALF), id="float16"),
    pytest.param((SINGLE, BRAIN), id="mixed"),
]


def inside_nan(value: Tensor) -> Tensor:
    """The same values, contiguous, with NaN in the memory before and behind them."""
    parent = value.new_full((value.numel() + 512,), math.nan)
    parent[256:-256] = value.flatten()
    return parent[256:-256].view(value.shape)


class Problem:
    """Every input, of unlike rows; parameters by lane are columns of wider rows filled with NaN."""

    def __init__(self, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], weights: torch.dtype = SINGLE):
        self.n, self.T, self.D, self.P, self.num_prefix_tokens, self.B = shape
        self.draw = torch.Generator().manual_seed(0)
        self.x = inside_nan(self.normal(self.n, self.T, self.D, dtype=dtypes[0]) + 0.5)
        self.branch = inside_nan(self.normal(self.n, self.T, self.D, dtype=dtypes[1]))
        self.lanes = torch.randperm(self.B, generator=self.draw)[: self.n].int().to(DEVICE)
        self.gate, scale, shift = (self.by_lane(dtypes[1]) for _ in range(3))
        self.bias = inside_nan(self.normal(self.D, dtype=dtypes[1]))
        weight = inside_nan(self.normal(self.P, self.D, dtype=weights) / math.sqrt(self.D))
        offset = self.normal(self.B, self.P, dtype=SINGLE)
        self.score = Score(weight, offset, self.num_prefix_tokens)
        affine = inside_nan(self.normal(self.D, dtype=SINGLE) + 1), inside_nan(self.normal(self.D, dtype=SINGLE))
        self.norms = {
            "plain": Norm(1e-6),
            "affine": Norm(1e-5, *affine),
            "modulated": Norm(1e-6, None, None, scale, shift),
        }

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(DEVICE, dtype)

    def by_lane(self, dtype: torch.dtype) -> Tensor:
        wide = torch.full((self.B, 3 * self.D), math.nan, dtype=dtype, device=DEVICE)
        wide[:, self.D : 2 * self.D] = self.normal(self.B, self.D, dtype=dtype)
        return wide[:, self.D : 2 * self.D]

    def run(self, norm: str | None = "affine", backend: str = "triton", **change: object) -> tuple[Tensor, ...]:
        given = {"row_to_lane": self.lanes, "gate": self.gate, "bias": self.bias, "score": self.score, **change}
        chosen = None if norm is None else self.norms[norm]
        return residual_uem(self.x, self.branch, norm=chosen, backend=backend, **given)

    def exact_sum(self) -> Tensor:
        own = self.gate[self.lanes.long()].double()[:, None]
        return self.x.double() + own * (self.branch.double() + self.bias.double())

    def exact_score(self, y: Tensor) -> Tensor:
        s = y.double()[:, self.num_prefix_tokens :] @ self.score.weight.double().T
        return torch.sigmoid(s + self.score.offset.double()[self.lanes.long()][:, None]).mean((1, 2))

    def exact_norm(self, y: Tensor, norm: str, dtype: torch.dtype = torch.float64) -> Tensor:
        chosen = self.norms[norm]
        weight, bias = (None if value is None else value.to(dtype) for value in (chosen.weight, chosen.bias))
        h = F.layer_norm(y.to(dtype), (self.D,), weight, bias, chosen.eps)
        if chosen.scale is None:
            return h
        scale, shift = (value.to(dtype)[self.lanes.long()][:, None] for value in (chosen.scale, chosen.shift))
        return h * (1 + scale) + shift


def check(p: Problem, norm: str) -> None:
    y, h, u = p.run(norm)
    assert (y.dtype, h.dtype, u.dtype, u.shape) == (p.x.dtype, p.branch.dtype, SINGLE, (p.n,))
    gate = p.gate[p.lanes.long()][:, None]
    same = (p.x + (gate * (p.branch + p.bias)).to(p.x.dtype)).to(p.x.dtype)
    assert_as_accurate(y, same, p.exact_sum())
    # score and norm read y as it is stored, so their references start from the stored y
    assert_as_accurate(h, p.exact_norm(y, norm, h.dtype), p.exact_norm(y, norm))
    assert (u.double() - p.exact_score(y)).abs().max() <= 1e-6 if p.n else u.numel() == 0
