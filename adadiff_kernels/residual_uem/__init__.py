"""The fused pass and the score alone: formula in reference.py, GPU kernel in kernel.py."""

import logging
from functools import cache, wraps
from typing import Any

from torch import Tensor

from adadiff_kernels import dispatch
from adadiff_kernels.dispatch import Backend, is_opaque, needs_grad
from adadiff_kernels.extension import traced
from adadiff_kernels.launch import on_device_of
from adadiff_kernels.library import register
from adadiff_kernels.residual_uem.cached import Cached, check_apart
from adadiff_kernels.residual_uem.layer_scores import LayerScores
from adadiff_kernels.residual_uem.reference import (
    Norm,
    Score,
    check_norm_out,
    check_score,
    check_sum,
    core_scores,
    layer_norm,
    no_autocast,
    residual_uem_reference,
    score_rows,
    uem_score,
    uem_score_core,
    uem_score_reference,
)

MAX_CHANNELS = 1536  # a warp of the GPU kernel holds a token in registers
MAX_OUTPUTS = 64  # outputs of a score per token


def is_fused(x: Tensor, outputs: int = 1) -> bool:
    """Whether `residual_uem` runs as one kernel for x: [n, T, D], without gradients, with `outputs` score outputs per
    token. Where it does not, combining sum, score and norm in one call gains nothing."""
    return dispatch.choose(None, x, core=False) == "triton" and _fits(x.shape[-1], outputs)


def _fits(channels: int, outputs: int) -> bool:
    return (channels <= MAX_CHANNELS and outputs <= MAX_OUTPUTS) or _too_large(channels, outputs)


@cache
def _too_large(channels: int, outputs: int) -> bool:
    logging.getLogger("adadiff_kernels").warning(
        "residual_uem: %d channels with %d outputs are more than the GPU kernel takes (%d, %d); PyTorch serves instead",
        *(channels, outputs, MAX_CHANNELS, MAX_OUTPUTS),
    )
    return False


def _run(
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
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass over the residual stream: y = x + gate * (branch + bias), its score and its norm.

    x, branch, out, norm_out: [n, T, D]; row_to_lane: int32 [n]; gate: [B, D] by lane; bias: [D]. out receives y and may
    be x or branch; norm_out receives the normalised rows, needs `norm` and `out`, and may be neither x nor branch. x
    may be float32 and branch 16-bit, as under autocast.
    cached: which rows take a cached branch of an earlier step, and which branches to cache, see `Cached`; branch is
    then [m, T, D], the fresh rows only, and out may be x, but neither branch nor cached.rows.
    Returns y in x's dtype, the normalised rows in branch's dtype (None without `norm`), and u, float32 [n] (None
    without `score`). Raises ValueError for shapes or dtypes that do not fit.
    """
    check_sum(x, branch, row_to_lane, gate, bias, out, cached)
    check_norm_out(x, branch, norm, out, norm_out)
    if cached is not None and not traced(x):  # traced tensors have no addresses
        check_apart(branch, cached, out=out, norm_out=norm_out)
    if score is not None:
        check_score(x, score, row_to_lane)
    parts = (*(() if score is None else (score.weight, score.offset)), *(() if norm is None else norm.parameters))
    chosen = dispatch.choose(backend, x, needs_grad=needs_grad(x, branch, gate, bias, *parts))
    given = {"row_to_lane": row_to_lane, "gate": gate, "bias": bias, "score": score, "norm": norm, "out": out}
    given |= {"norm_out": norm_out, "cached": cached}
    outputs = 1 if score is None else len(score.weight)
    if chosen == "triton" and (backend == "triton" or _fits(x.shape[-1], outputs)):
        from adadiff_kernels.residual_uem.kernel import launch_residual_uem

        with on_device_of(x):
            return launch_residual_uem(x, branch, **given)
    if chosen == "cpu" and score is not None and not core_scores(x, score):
        raise RuntimeError(
            "backend='cpu' scores one output per token of contiguous float32 or bfloat16 rows, got "
            f"{len(score.weight)} of {x.dtype}; use backend='reference'"
        )
    scorer = {"reference": uem_score_reference, "cpu": uem_score_core}.get(chosen, score_rows)
    return residual_uem_reference(x, branch, **given, scorer=scorer)


# Two operators, without and with `out`, since an operator may not return one of its inputs. Absent results are empty.
# Tickets are declared read-only, since a call leaves them as they were: compilers capture no function in a CUDA graph
# that mutates its inputs.
_ARGUMENTS = (
    "Tensor row_to_lane, Tensor? gate, Tensor? bias, Tensor? score_weight, Tensor? score_offset, "
    "SymInt num_prefix_tokens, Tensor? tickets, float? eps, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? norm_scale, Tensor? norm_shift, str? backend"
)


def _flat(
    x: Tensor,
    branch: Tensor,
    out: Tensor | None,
    norm_out: Tensor | None,
    row_to_lane: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    offset: Tensor | None,
    num_prefix_tokens: int,
    tickets: Tensor | None,
    eps: float | None,
    *norm: Tensor | str | None,
    cached: Cached | None = None,
    fake: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    *parameters, backend = norm
    score = None if weight is None else Score(weight, offset, num_prefix_tokens, tickets)
    given = {"row_to_lane": row_to_lane, "gate": gate, "bias": bias, "score": score}
    given["norm"] = None if eps is None else Norm(eps, *parameters)
    if fake:
        check_sum(x, branch, row_to_lane, gate, bias, out, cached)
        if score is not None:
            check_score(x, score, row_to_lane)
        check_norm_out(x, branch, given["norm"], out, norm_out)
        if cached is not None:
            branch = branch.new_empty(x.shape)
        made = residual_uem_reference(x, branch, **given)
    else:
        made = _run(x, branch, **given, out=out, norm_out=norm_out, cached=cached, backend=backend)
    if norm_out is not None:
        made = made[0], None, made[2]
    return tuple(x.new_empty(0) if part is None else part for part in made)


_OPERATOR = register(
    f"residual_uem(Tensor x, Tensor branch, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    lambda x, branch, *given: _flat(x, branch, None, None, *given),
    lambda x, branch, *given: _flat(x, branch, None, None, *given, fake=True),
)
_OPERATOR_OUT = register(
    "residual_uem_out(Tensor x, Tensor branch, Tensor(a!) out, Tensor(b!)? norm_out, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor)",
    lambda *given: _flat(*given)[1:],
    lambda *given: _flat(*given, fake=True)[1:],
)


def _flat_cached(x: Tensor, branch: Tensor, *given: Any, fake: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    out, norm_out, rows, source, keep, *rest = given
    return _flat(x, branch, out, norm_out, *rest, cached=Cached(rows, source, keep), fake=fake)


_CACHED = "Tensor source, Tensor? keep"
_OPERATOR_CACHED = register(
    f"residual_uem_cached(Tensor x, Tensor branch, Tensor(a!) rows, {_CACHED}, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)",
    lambda x, branch, *given: _flat_cached(x, branch, None, None, *given),
    lambda x, branch, *given: _flat_cached(x, branch, None, None, *given, fake=True),
)
_OPERATOR_CACHED_OUT = register(
    "residual_uem_cached_out(Tensor x, Tensor branch, Tensor(a!) out, Tensor(b!)? norm_out, Tensor(c!) rows, "
    f"{_CACHED}, {_ARGUMENTS}) -> (Tensor, Tensor)",
    lambda *given: _flat_cached(*given)[1:],
    lambda *given: _flat_cached(*given, fake=True)[1:],
)


@wraps(_run)
def residual_uem(
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
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not (traced(x) and (is_opaque(backend, x) or (backend is None and _core_is_faster(x, branch, score)))):
        given = {"row_to_lane": row_to_lane, "gate": gate, "bias": bias, "score": score, "norm": norm}
        return _run(x, branch, **given, out=out, norm_out=norm_out, cached=cached, backend=backend)
    check_norm_out(x, branch, norm, out, norm_out)
    flat = (
        *(row_to_lane, gate, bias),
        *(
            (None, None, 0, None)
            if score is None
            else (score.weight, score.offset, score.num_prefix_tokens, score.tickets)
        ),
        *((None,) * 5 if norm is None else (norm.eps, norm.weight, norm.bias, norm.scale, norm.shift)),
        backend,
    )
    whole, into = (_OPERATOR, _OPERATOR_OUT) if cached is None else (_OPERATOR_CACHED, _OPERATOR_CACHED_OUT)
    if cached is not None:
        flat = (cached.rows, cached.source, cached.keep, *flat)
    y, h, u = whole(x, branch, *flat) if out is None else (out, *into(x, branch, out, norm_out, *flat))
    h = h if norm_out is None else norm_out
    return y, None if norm is None else h, None if score is None else u


def _core_is_faster(x: Tensor, branch: Tensor, score: Score | None) -> bool:
    """Whether the C++ core scores faster than what a compiler makes of the PyTorch score."""
    return score is not None and not needs_grad(x, branch) and core_scores(x, score)


__all__ = [
    "Cached",
    "LayerScores",
    "Norm",
    "Score",
    "is_fused",
    "layer_norm",
    "no_autocast",
    "residual_uem",
    "residual_uem_reference",
    "uem_score",
    "uem_score_reference",
]
