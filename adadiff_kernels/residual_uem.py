"""The fused pass: residual sum, uncertainty score of the layer, and the LayerNorm that follows.

    y = x + gate[lane] * branch                                    (gate = 1 where there is none)
    s = W y_token + offset[lane]                                   for every patch token
    u = mean over patch tokens and outputs of sigmoid(s)
    h = LayerNorm(y)                                               affine, or (1 + scale[lane]) * it + shift[lane]

n rows, T tokens, D channels, P outputs, B lanes; `lanes` (i32[n]) tells which lane a row carries. The score is the
UEM of AdaDiff (Tang et al., ECCV 2024, Eq. 8) with its time part, one number per lane and output, folded into `offset`.
Score and norm read y as it is stored; they accumulate in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Norm:
    """LayerNorm over D: affine with `weight` and `bias` [D], or modulated with `scale` and `shift` [B, D], by lane."""

    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.bias is None) or (self.scale is None) != (self.shift is None):
            raise ValueError("a norm takes weight with bias, scale with shift, or none of them")


@dataclass(frozen=True)
class Score:
    """One layer's UEM: `weight` [P, D], `offset` float32 [B, P] by lane; the first `extras` tokens have no say."""

    weight: Tensor
    offset: Tensor
    extras: int


def _by_row(values: Tensor, lanes: Tensor) -> Tensor:
    """values: [B, D]; lanes: i32 [n]. Returns [n, 1, D], to go with rows [n, T, D]."""
    return values.index_select(0, lanes)[:, None]


def layer_norm(x: Tensor, norm: Norm, lanes: Tensor) -> Tensor:
    """x: [n, T, D]; lanes: i32 [n]. Returns [n, T, D] in x's dtype."""
    h = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if norm.scale is None:
        return h
    return torch.addcmul(_by_row(norm.shift, lanes), h, 1 + _by_row(norm.scale, lanes))


def uem_score(y: Tensor, score: Score, lanes: Tensor) -> Tensor:
    """y: [n, T, D]; lanes: i32 [n]. Returns u, float32 [n]."""
    n, T, D = y.shape
    # all tokens go through one product: slicing the extras off first would copy y
    s = F.linear(y.float().reshape(n * T, D), score.weight.float()).view(n, T, len(score.weight))[:, score.extras :]
    return torch.sigmoid(s + _by_row(score.offset, lanes)).mean(dim=(1, 2))


def residual_uem(
    x: Tensor,
    branch: Tensor,
    *,
    lanes: Tensor,
    gate: Tensor | None = None,
    score: Score | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass over the residual stream.

    x, branch: [n, T, D]; lanes: i32 [n], row -> lane; gate: [B, D] by lane; out: [n, T, D], may be x or branch.
    Returns y in x's dtype, the normalised rows (None without `norm`) and u, float32 [n] (None without `score`).
    Raises ValueError where shapes or dtypes do not fit.
    """
    _check(x, branch, lanes, gate, score, out)
    y = torch.add(x, branch, out=out) if gate is None else torch.addcmul(x, _by_row(gate, lanes), branch, out=out)
    u = uem_score(y, score, lanes) if score is not None else None
    return y, layer_norm(y, norm, lanes) if norm is not None else None, u


def _check(
    x: Tensor, branch: Tensor, lanes: Tensor, gate: Tensor | None, score: Score | None, out: Tensor | None
) -> None:
    if x.ndim != 3 or branch.shape != x.shape:
        raise ValueError(f"x and branch must both be [n, T, D], got {tuple(x.shape)} and {tuple(branch.shape)}")
    n, T, D = x.shape
    if lanes.shape != (n,):
        raise ValueError(f"lanes must be [{n}], one lane per row, got {tuple(lanes.shape)}")
    if gate is not None and (gate.ndim != 2 or gate.shape[1] != D):
        raise ValueError(f"gate must be [B, {D}], got {tuple(gate.shape)}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise ValueError(f"out must be {tuple(x.shape)} {x.dtype}, got {tuple(out.shape)} {out.dtype}")
    if score is not None:
        P = score.weight.shape[0]
        if score.weight.shape != (P, D) or score.offset.ndim != 2 or score.offset.shape[1] != P:
            raise ValueError(
                f"score needs weight [P, {D}] and offset [B, P], "
                f"got {tuple(score.weight.shape)} and {tuple(score.offset.shape)}"
            )
        if not 0 <= score.extras < T:
            raise ValueError(f"score.extras must leave at least one of {T} tokens, got {score.extras}")
