"""The fused pass: residual sum, uncertainty score of the layer, and the LayerNorm that follows. Formula and reference.

    y = x + gate[lane] * (branch + bias)                           (gate = 1, bias = 0 where there is none)
    s = W y_token + offset[lane]                                   for every patch token
    u = mean over patch tokens and outputs of sigmoid(s)
    h = LayerNorm(y)                                               affine, or times (1 + scale[lane]), plus shift[lane]

A row's branch may be cached from an earlier step, see cached.py.

n rows, T tokens, D channels, P outputs, B lanes; row_to_lane (int32 [n]) is the lane of each row. The score is the UEM
of AdaDiff (Tang et al., ECCV 2024, Eq. 8); its time term, one number per lane and output, is part of `offset`. Score
and norm read y as it is stored and accumulate in float32. `bias` is the bias of the branch's last linear layer, which
then does not add it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from adadiff_kernels import extension
from adadiff_kernels.dispatch import needs_grad
from adadiff_kernels.extension import traced
from adadiff_kernels.residual_uem.cached import Cached, check_cached

PARAMETERS = ("weight", "bias", "scale", "shift")


@dataclass(frozen=True)
class Norm:
    """LayerNorm over D: affine with `weight` and `bias` [D], or modulated with `scale` and `shift` [B, D], by lane.

    Raises ValueError for weight or bias, or scale or shift, without the other.
    """

    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.weight is None) != (self.bias is None) or (self.scale is None) != (self.shift is None):
            raise ValueError("a norm takes weight with bias, scale with shift, or none of them")

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.scale, self.shift


@dataclass(frozen=True)
class Score:
    """One layer's UEM: weight [P, D], offset float32 [B, P] by lane. Prefix tokens are excluded from the mean.

    tickets: int32, n elements or more, all zero: the programs of the GPU kernel count themselves here to find the last
    one of each row. They are zero again afterwards: later calls may share them, concurrent calls may not. None:
    allocated for each call.
    """

    weight: Tensor
    offset: Tensor
    num_prefix_tokens: int
    tickets: Tensor | None = None


def _by_row(values: Tensor, row_to_lane: Tensor) -> Tensor:
    """values: [B, D] by lane. Returns [n, 1, D], which broadcasts over rows [n, T, D]."""
    return values.index_select(0, row_to_lane)[:, None]


def layer_norm(x: Tensor, norm: Norm, row_to_lane: Tensor) -> Tensor:
    """x: [n, T, D]; row_to_lane: int32 [n]. Returns [n, T, D] in x's dtype; computed in float32 if dtypes differ."""
    given = {name: value for name in PARAMETERS if (value := getattr(norm, name)) is not None}
    if any(value.dtype != x.dtype for value in given.values()):
        work = torch.promote_types(x.dtype, torch.float32)
        wide = replace(norm, **{name: value.to(work) for name, value in given.items()})
        return layer_norm(x.to(work), wide, row_to_lane).to(x.dtype)
    h = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    if norm.scale is None:
        return h
    return torch.addcmul(_by_row(norm.shift, row_to_lane), h, 1 + _by_row(norm.scale, row_to_lane))


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Disables autocast on x's device: scores are float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def uem_score(y: Tensor, score: Score, row_to_lane: Tensor) -> Tensor:
    """y: [n, T, D]; row_to_lane: int32 [n]. Returns u, float32 [n]. Raises ValueError for other shapes or dtypes."""
    check_score(y, score, row_to_lane)
    return score_rows(y, score, row_to_lane)


def score_rows(y: Tensor, score: Score, row_to_lane: Tensor) -> Tensor:
    """`uem_score` without its checks, in C++ where `core_scores` allows it."""
    core = core_scores(y, score) and not traced(y) and not needs_grad(y, score.weight, score.offset)
    return uem_score_core(y, score, row_to_lane) if core else uem_score_reference(y, score, row_to_lane)


def uem_score_core(y: Tensor, score: Score, row_to_lane: Tensor) -> Tensor:
    """`uem_score` in C++, see `core_scores`."""
    n, T, D = y.shape
    u = torch.empty(n, dtype=torch.float32, device="cpu")
    weight, offset, row_to_lane = score.weight.float().contiguous(), score.offset, row_to_lane.contiguous()
    extension.core.uem_score(
        *(y.data_ptr(), y.dtype == torch.bfloat16, n, T, D, score.num_prefix_tokens, weight.data_ptr()),
        *(offset.data_ptr(), offset.stride(0), len(offset), row_to_lane.data_ptr(), u.data_ptr()),
    )
    return u


def uem_score_reference(y: Tensor, score: Score, row_to_lane: Tensor) -> Tensor:
    """`uem_score` in PyTorch, for any device, dtype and P."""
    n, T, D = y.shape
    # all tokens go through one product: slicing the prefix tokens off first would copy y
    with no_autocast(y):
        s = F.linear(y.float().reshape(n * T, D), score.weight.float()).view(n, T, len(score.weight))
    s = s[:, score.num_prefix_tokens :]
    return torch.sigmoid(s + _by_row(score.offset, row_to_lane)).mean(dim=(1, 2))


def core_scores(y: Tensor, score: Score) -> bool:
    """Whether the C++ core can score y. With P > 1 the score is a matrix product, which is left to PyTorch."""
    return (
        extension.core is not None
        and len(score.weight) == 1
        and y.is_cpu
        and y.dtype in (torch.float32, torch.bfloat16)
        and y.is_contiguous()
    )


def residual_uem_reference(
    x: Tensor,
    branch: Tensor,
    *,
    row_to_lane: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    score: Score | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
    norm_out: Tensor | None = None,
    cached: Cached | None = None,
    scorer: Callable[[Tensor, Score, Tensor], Tensor] = uem_score_reference,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`residual_uem` in PyTorch, for any device, dtype, D and P. `cached.keep` makes it wait for the device."""
    if cached is not None:
        branch = cached.read(branch)
        cached.write(branch)
    mixed = any(part is not None and part.dtype != x.dtype for part in (branch, gate, bias))
    rounds = bias is not None and x.dtype.itemsize == 2  # else branch + bias would be rounded before the sum
    work = torch.promote_types(x.dtype, torch.float32) if mixed or rounds else x.dtype
    added = branch.to(work) if bias is None else branch.to(work) + bias.to(work)
    target = out if work == x.dtype else None
    if gate is None:
        y = torch.add(x.to(work), added, out=target)
    else:
        y = torch.addcmul(x.to(work), _by_row(gate, row_to_lane).to(work), added, out=target)
    if work != x.dtype:
        y = y.to(x.dtype) if out is None else out.copy_(y)
    u = None if score is None else scorer(y, score, row_to_lane)
    if norm is None:
        return y, None, u
    h = layer_norm(y, norm, row_to_lane).to(branch.dtype)
    return y, h if norm_out is None else norm_out.copy_(h), u


def check_sum(
    x: Tensor,
    branch: Tensor,
    row_to_lane: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    cached: Cached | None = None,
) -> None:
    """ValueError for shapes or dtypes that do not fit the sum."""
    if cached is not None:
        check_cached(x, branch, cached)
    elif x.ndim != 3 or branch.shape != x.shape:
        raise ValueError(f"x and branch must both be [n, T, D], got {tuple(x.shape)} and {tuple(branch.shape)}")
    n, _, D = x.shape
    if row_to_lane.shape != (n,):
        raise ValueError(f"row_to_lane must be [{n}], got {tuple(row_to_lane.shape)}")
    if gate is not None and (gate.ndim != 2 or gate.shape[1] != D):
        raise ValueError(f"gate must be [B, {D}], got {tuple(gate.shape)}")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias must be [{D}], got {tuple(bias.shape)}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise ValueError(f"out must be {tuple(x.shape)} {x.dtype}, got {tuple(out.shape)} {out.dtype}")


def check_norm_out(x: Tensor, branch: Tensor, norm: Norm | None, out: Tensor | None, norm_out: Tensor | None) -> None:
    """ValueError for norm_out without `norm` and `out`, or of another shape or dtype than the normalised rows."""
    if norm_out is None:
        return
    if norm is None or out is None:
        raise ValueError("norm_out receives normalised rows beside out; give norm and out, too")
    if norm_out.shape != x.shape or norm_out.dtype != branch.dtype:
        raise ValueError(
            f"norm_out must be {tuple(x.shape)} {branch.dtype}, got {tuple(norm_out.shape)} {norm_out.dtype}"
        )


def check_score(y: Tensor, score: Score, row_to_lane: Tensor) -> None:
    """ValueError for shapes or dtypes that do not fit the score."""
    n, T, D = y.shape
    weight, offset = score.weight, score.offset
    if row_to_lane.dtype != torch.int32 or row_to_lane.shape != (n,):
        raise ValueError(f"row_to_lane must be int32 [{n}], got {row_to_lane.dtype} {tuple(row_to_lane.shape)}")
    if weight.ndim != 2 or weight.shape[1] != D or offset.ndim != 2 or offset.shape[1] != len(weight):
        raise ValueError(
            f"score needs weight [P, {D}] and offset [B, P], got {tuple(weight.shape)} and {tuple(offset.shape)}"
        )
    if offset.dtype != torch.float32:
        raise ValueError(f"score.offset must be float32, got {offset.dtype}")
    if score.tickets is not None and (score.tickets.dtype != torch.int32 or score.tickets.shape[0] < n):
        raise ValueError(
            f"score.tickets must be int32 of {n} or more, got {score.tickets.dtype} {tuple(score.tickets.shape)}"
        )
    if not 0 <= score.num_prefix_tokens < T:
        raise ValueError(
            f"score.num_prefix_tokens must leave at least one of {T} tokens, got {score.num_prefix_tokens}"
        )
