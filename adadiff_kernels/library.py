"""The operators as PyTorch knows them: torch.ops.adadiff_kernels.<name>, with what each mutates and a fake of it.

An eager call goes straight to its implementation (ops.py): the dispatcher would add about a third of what a small call
costs. A call that is traced (`traced`) becomes one of the registered operator, which runs the same implementation, with
the same checks, when the graph runs. Where PyTorch serves instead of a kernel, its code is left for the compiler to
fuse, unless it depends on values.

The operators are opaque. With `torch.library.triton_op` a compiler would see the kernels, but there is nothing for it
to fuse, it would compile them anew with options of its own, and could take neither the compiled core nor Triton's
interpreter, in which they are proved.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from adadiff_kernels import device_set, ops
from adadiff_kernels.compaction import Swaps, check_rows
from adadiff_kernels.extension import traced
from adadiff_kernels.join_skip import check_join, join_skip_reference
from adadiff_kernels.ops import Backend
from adadiff_kernels.residual_uem import (
    Norm,
    Score,
    check_score,
    check_sum,
    core_scores,
    learns,
    residual_uem_reference,
)
from adadiff_kernels.settle_rows import check_settle
from adadiff_kernels.solver_step import Guidance, Noise, SolverState, StepRows, check_step

_LIBRARY = torch.library.Library("adadiff_kernels", "DEF")
# Kernels and core ask for contiguous memory: a compiler may not choose another layout for them.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def _register(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    """fake: makes of tensors without values what `run` makes of others, and raises where it would."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adadiff_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.adadiff_kernels, name).default


def _kernel_serves(backend: Backend | None, x: Tensor) -> bool:
    return backend in ("cpu", "triton") or (backend is None and x.is_cuda)


# residual_uem: two operators, since one may not return what it was given. Absent results are empty. Tickets are as
# before when a call ends, so they count as read only: where a graph mutates its inputs, compilers capture none.

_PASS = (
    "Tensor lanes, Tensor? gate, Tensor? bias, Tensor? score_weight, Tensor? score_offset, SymInt num_prefix_tokens, "
    "Tensor? tickets, float? eps, Tensor? norm_weight, Tensor? norm_bias, Tensor? norm_scale, Tensor? norm_shift, "
    "str? backend"
)


def _pass(
    x: Tensor,
    branch: Tensor,
    out: Tensor | None,
    lanes: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    offset: Tensor | None,
    num_prefix_tokens: int,
    tickets: Tensor | None,
    eps: float | None,
    *norm: Tensor | str | None,
    fake: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    *parameters, backend = norm
    score = None if weight is None else Score(weight, offset, num_prefix_tokens, tickets)
    given = {"lanes": lanes, "gate": gate, "bias": bias, "score": score}
    given["norm"] = None if eps is None else Norm(eps, *parameters)
    if fake:
        check_sum(x, branch, lanes, gate, bias, out)
        if score is not None:
            check_score(x, score, lanes)
        made = residual_uem_reference(x, branch, **given)
    else:
        made = ops.residual_uem(x, branch, **given, out=out, backend=backend)
    return tuple(x.new_empty(0) if part is None else part for part in made)


def _core_scores(x: Tensor, branch: Tensor, score: Score | None) -> bool:
    """The core is faster than what compilers make of the score. Gradients are PyTorch's."""
    return score is not None and not learns(x, branch) and core_scores(x, score)


_residual_uem = _register(
    f"residual_uem(Tensor x, Tensor branch, {_PASS}) -> (Tensor, Tensor, Tensor)",
    lambda x, branch, *given: _pass(x, branch, None, *given),
    lambda x, branch, *given: _pass(x, branch, None, *given, fake=True),
)
_residual_uem_out = _register(
    f"residual_uem_out(Tensor x, Tensor branch, Tensor(a!) out, {_PASS}) -> (Tensor, Tensor)",
    lambda *given: _pass(*given)[1:],
    lambda *given: _pass(*given, fake=True)[1:],
)


@wraps(ops.residual_uem)
def residual_uem(
    x: Tensor,
    branch: Tensor,
    *,
    lanes: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    score: Score | None = None,
    norm: Norm | None = None,
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not (traced(x) and (_kernel_serves(backend, x) or (backend is None and _core_scores(x, branch, score)))):
        return ops.residual_uem(
            x, branch, lanes=lanes, gate=gate, bias=bias, score=score, norm=norm, out=out, backend=backend
        )
    flat = (
        *(lanes, gate, bias),
        *(
            (None, None, 0, None)
            if score is None
            else (score.weight, score.offset, score.num_prefix_tokens, score.tickets)
        ),
        *((None,) * 5 if norm is None else (norm.eps, norm.weight, norm.bias, norm.scale, norm.shift)),
        backend,
    )
    y, h, u = _residual_uem(x, branch, *flat) if out is None else (out, *_residual_uem_out(x, branch, out, *flat))
    return y, None if norm is None else h, None if score is None else u


_swap_rows = _register(
    "swap_rows(Tensor pairs, SymInt before, Tensor(a!)[] rows, str? backend) -> ()",
    lambda pairs, before, rows, backend: ops.swap_rows(Swaps(pairs, before, 0), *rows, backend=backend),
    lambda pairs, before, rows, backend: check_rows(Swaps(pairs, before, 0), *rows),
)


@wraps(ops.swap_rows)
def swap_rows(swaps: Swaps, *rows: Tensor, backend: Backend | None = None) -> None:
    if not (rows and traced(rows[0])):
        return ops.swap_rows(swaps, *rows, backend=backend)
    return _swap_rows(swaps.pairs, swaps.before, list(rows), backend)


_join_skip = _register(
    "join_skip(Tensor x, Tensor skip, Tensor? lanes, Tensor? index, str? backend) -> Tensor",
    lambda *given: ops.join_skip(*given[:-1], backend=given[-1]),
    lambda *given: check_join(*given[:-1]) or join_skip_reference(*given[:-1]),
)


@wraps(ops.join_skip)
def join_skip(
    x: Tensor,
    skip: Tensor,
    lanes: Tensor | None = None,
    index: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    if traced(x) and _kernel_serves(backend, x):
        return _join_skip(x, skip, lanes, index, backend)
    return ops.join_skip(x, skip, lanes, index, backend=backend)


_settle_rows = _register(
    "settle_rows(Tensor moves, Tensor(a!) rows, Tensor(b!) saved, str? backend) -> ()",
    lambda *given: ops.settle_rows(*given[:-1], backend=given[-1]),
    lambda *given: check_settle(*given[:-1]),
)


@wraps(ops.settle_rows)
def settle_rows(moves: Tensor, rows: Tensor, saved: Tensor, *, backend: Backend | None = None) -> None:
    if traced(rows) and _kernel_serves(backend, rows):
        return _settle_rows(moves, rows, saved, backend)
    return ops.settle_rows(moves, rows, saved, backend=backend)


def _step(
    x: Tensor, base: Tensor | None, history: Tensor | None, eps: Tensor, *flat: Tensor | bool | int | str | None
) -> tuple:
    """The arguments of `solver_step`, the last of them the backend."""
    rows, (slots, z, variance), guidance, noise, backend = flat[:7], flat[7:10], flat[10:14], flat[14:17], flat[17]
    return (
        *(SolverState(x, base, history), eps, StepRows(*rows), slots, z, variance),
        *(
            None if first is None else kind(first, *rest)
            for kind, (first, *rest) in ((Guidance, guidance), (Noise, noise))
        ),
        backend,
    )


def _run_step(*flat: Tensor | bool | int | str | None) -> None:
    *given, guidance, noise, backend = _step(*flat)
    ops.solver_step(*given, guidance=guidance, noise=noise, backend=backend)


_solver_step = _register(
    "solver_step(Tensor(a!) x, Tensor(b!)? base, Tensor(c!)? history, Tensor eps, "
    "Tensor coefficients, Tensor slot, Tensor end, bool data, bool reads_history, bool inner, bool adds_noise, "
    "Tensor? slots, Tensor? z, Tensor? variance, Tensor? uncond, Tensor? uncond_row, Tensor? scale, Tensor? channels, "
    "Tensor? seeds, Tensor? step, SymInt stream, str? backend) -> ()",
    _run_step,
    lambda *flat: check_step(*_step(*flat)[:-1]),
)


@wraps(ops.solver_step)
def solver_step(
    state: SolverState,
    eps: Tensor,
    rows: StepRows,
    slots: Tensor | None = None,
    z: Tensor | None = None,
    variance: Tensor | None = None,
    *,
    guidance: Guidance | None = None,
    noise: Noise | None = None,
    backend: Backend | None = None,
) -> None:
    if not traced(eps):
        return ops.solver_step(state, eps, rows, slots, z, variance, guidance=guidance, noise=noise, backend=backend)
    return _solver_step(
        *(state.x, state.base, state.history, eps),
        *(rows.coefficients, rows.slot, rows.end, rows.data, rows.history, rows.inner, rows.noise),
        *(slots, z, variance),
        *((None,) * 4 if guidance is None else (guidance.uncond, guidance.row, guidance.scale, guidance.channels)),
        *((None, None, 0) if noise is None else (noise.seeds, noise.step, noise.stream)),
        backend,
    )


# The steps of a `DeviceSet`. word: address of the host's word, which the kernel writes; None: PyTorch, which does not.

_SET = "Tensor(a!) lane, Tensor(b!) row, Tensor(c!) exit_layer, Tensor(d!) state"
_register(f"device_start({_SET}, int? word) -> ()", device_set.start, lambda *given: None)
_register(
    f"device_leave({_SET}, Tensor? u, Tensor? threshold, Tensor? mask, Tensor? partner, Tensor(e!)? snapshot, "
    "SymInt bound, SymInt layer, int? word) -> Tensor",
    device_set.leave,
    lambda lane, row, exit_layer, state, u, threshold, mask, partner, snapshot, bound, *_: lane.new_empty(bound, 3),
)
