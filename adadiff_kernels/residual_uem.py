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

from adadiff_kernels.extension import core as _C


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
    """y: [n, T, D]; lanes: i32 [n]. Returns u, float32 [n]. Raises ValueError where shapes or dtypes do not fit."""
    _check_score(y, score, lanes)
    return _score(y, score, lanes)


def _score(y: Tensor, score: Score, lanes: Tensor) -> Tensor:
    if not _core_scores(y, score):
        return uem_score_reference(y, score, lanes)
    n, T, D = y.shape
    u = torch.empty(n, dtype=torch.float32, device="cpu")
    weight, offset, lanes = score.weight.float().contiguous(), score.offset, lanes.contiguous()
    (_C.uem_score_float32 if y.dtype == torch.float32 else _C.uem_score_bfloat16)(
        *(y.data_ptr(), n, T, D, score.extras, weight.data_ptr()),
        *(offset.data_ptr(), offset.stride(0), len(offset), lanes.data_ptr(), u.data_ptr()),
    )
    return u


def uem_score_reference(y: Tensor, score: Score, lanes: Tensor) -> Tensor:
    """`uem_score` in PyTorch, for any device, dtype and P."""
    n, T, D = y.shape
    # all tokens go through one product: slicing the extras off first would copy y
    s = F.linear(y.float().reshape(n * T, D), score.weight.float()).view(n, T, len(score.weight))[:, score.extras :]
    return torch.sigmoid(s + _by_row(score.offset, lanes)).mean(dim=(1, 2))


def _core_scores(y: Tensor, score: Score) -> bool:
    """The compiled core takes one output a token; a map is a matrix product, which PyTorch does at full rate."""
    return (
        _C is not None
        and len(score.weight) == 1
        and y.is_cpu
        and y.dtype in (torch.float32, torch.bfloat16)
        and y.is_contiguous()
        and not torch.compiler.is_compiling()
    )


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
    _check(x, branch, lanes, gate, out)
    if score is not None:
        _check_score(x, score, lanes)
    y = torch.add(x, branch, out=out) if gate is None else torch.addcmul(x, _by_row(gate, lanes), branch, out=out)
    u = _score(y, score, lanes) if score is not None else None
    return y, layer_norm(y, norm, lanes) if norm is not None else None, u


def _check(x: Tensor, branch: Tensor, lanes: Tensor, gate: Tensor | None, out: Tensor | None) -> None:
    if x.ndim != 3 or branch.shape != x.shape:
        raise ValueError(f"x and branch must both be [n, T, D], got {tuple(x.shape)} and {tuple(branch.shape)}")
    n, _, D = x.shape
    if lanes.shape != (n,):
        raise ValueError(f"lanes must be [{n}], one lane per row, got {tuple(lanes.shape)}")
    if gate is not None and (gate.ndim != 2 or gate.shape[1] != D):
        raise ValueError(f"gate must be [B, {D}], got {tuple(gate.shape)}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise ValueError(f"out must be {tuple(x.shape)} {x.dtype}, got {tuple(out.shape)} {out.dtype}")


def _check_score(y: Tensor, score: Score, lanes: Tensor) -> None:
    n, T, D = y.shape
    weight, offset = score.weight, score.offset
    if lanes.dtype != torch.int32 or lanes.shape != (n,):
        raise ValueError(f"lanes must be int32 [{n}], one lane per row, got {lanes.dtype} {tuple(lanes.shape)}")
    if weight.ndim != 2 or weight.shape[1] != D or offset.ndim != 2 or offset.shape[1] != len(weight):
        raise ValueError(
            f"score needs weight [P, {D}] and offset [B, P], got {tuple(weight.shape)} and {tuple(offset.shape)}"
        )
    if offset.dtype != torch.float32:
        raise ValueError(f"score.offset must be float32, got {offset.dtype}")
    if not 0 <= score.extras < T:
        raise ValueError(f"score.extras must leave at least one of {T} tokens, got {score.extras}")
