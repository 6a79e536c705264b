"""One solver step with guidance and noise on a GPU. Formula and reference: reference.py, ../philox/reference.py.

One program takes BLOCK consecutive elements of one sample. Noise is drawn inside the kernel: the Philox integers equal
those of the CPU bit for bit, and so do the normal values, except where float64 functions differ in the last bit.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadiff_kernels.launch import FLOATS, cdiv, need
from adadiff_kernels.solver_step.reference import COLUMNS, Guidance, Noise, SolverState, StepRows


@triton.jit
def _normal_pair(first, second):
    """Two normal values, float64, from two random words (Box and Muller)."""
    u1 = (first.to(tl.float64) + 1) * 2.3283064365386963e-10  # 2^-32
    radius = tl.sqrt(tl.log(u1) * -2)
    angle = second.to(tl.float64) * 1.4629180792671596e-09  # 2 pi / 2^32
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _normal(seed, step, stream, start, BLOCK: tl.constexpr):
    """float32 [BLOCK]: elements [start, start + BLOCK) of a sample's noise; start a multiple of 4."""
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + step.to(tl.int32), zero + stream, zero)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3)).to(tl.float32)


@triton.jit
def _solver_step_kernel(
    x_ptr,  # f32 [slots, E]
    base_ptr,  # f32 [slots, E] or None
    history_ptr,  # f32 [slots, HELD, E] or None
    eps_ptr,  # [n, E]
    uncond_ptr,  # [g, E] or None
    uncond_row_ptr,  # i64 [n]
    weight_ptr,  # f32 [n]
    channels_ptr,  # i64 [n] or None
    coefficients_ptr,  # f32 [n, 9]
    push_ptr,  # bool [n]
    end_ptr,  # bool [n]
    places_ptr,  # i64 [n], slots, or None
    z_ptr,  # f32 [n, E] or None
    seeds_ptr,  # i64 [n] or None
    step_ptr,  # i64 [n]
    variance_ptr,  # [n, E] or None
    stream,
    E,
    per_channel,  # elements of a channel
    DATA: tl.constexpr,
    HELD: tl.constexpr,
    REACH: tl.constexpr,  # entries of HELD in use
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(E, BLOCK)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    element = start + tl.arange(0, BLOCK)
    inside = element < E
    own = i * E + element
    place = i
    if places_ptr is not None:
        place = tl.load(places_ptr + i)
    kept = place * E + element
    row = coefficients_ptr + i * 9

    x = tl.load(x_ptr + kept, mask=inside, other=0.0)
    m = tl.load(eps_ptr + own, mask=inside, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        other = tl.load(uncond_row_ptr + i)
        if other >= 0:
            guided = inside
            if channels_ptr is not None:
                guided &= element < tl.load(channels_ptr + i) * per_channel
            uncond = tl.load(uncond_ptr + other * E + element, mask=guided, other=0.0).to(tl.float32)
            change = tl.load(weight_ptr + i) * (m - uncond)
            if channels_ptr is not None:
                change = tl.where(guided, change, 0.0)
            m += change
    if DATA:
        m = tl.load(row) * x + tl.load(row + 1) * m
    base = x
    if base_ptr is not None:
        base = tl.load(base_ptr + kept, mask=inside, other=0.0)
    new = tl.load(row + 2) * base + tl.load(row + 3) * m
    if (z_ptr is not None) or (seeds_ptr is not None):
        amount = tl.load(row + 4)
        if variance_ptr is not None:
            v = tl.load(variance_ptr + own, mask=inside, other=0.0).to(tl.float32)
            spread = tl.exp(tl.load(row + 5) * (v + 1) / 2) * amount
        else:
            spread = tl.zeros([BLOCK], tl.float32) + amount
        if z_ptr is not None:
            new += spread * tl.load(z_ptr + own, mask=inside, other=0.0)
        else:
            new += spread * _normal(tl.load(seeds_ptr + i), tl.load(step_ptr + i), stream, start, BLOCK)
    if history_ptr is not None:
        older = history_ptr + place * HELD * E + element
        pushed = element < tl.load(push_ptr + i).to(tl.int32) * E  # all elements or none
        newer = m
        for k in tl.static_range(REACH):
            h = tl.load(older + k * E, mask=inside, other=0.0)
            new += tl.load(row + 6 + k) * h
            tl.store(older + k * E, newer, mask=pushed)
            newer = h
    tl.store(x_ptr + kept, new, mask=inside)
    if base_ptr is not None:
        ends = tl.load(end_ptr + i).to(tl.int32)
        tl.store(base_ptr + kept, new, mask=element < ends * E)


def launch_solver_step(
    state: SolverState,
    eps: Tensor,
    rows: StepRows,
    slots: Tensor | None = None,
    z: Tensor | None = None,
    variance: Tensor | None = None,
    guidance: Guidance | None = None,
    noise: Noise | None = None,
) -> None:
    """As `solver_step`, in place. All tensors must be contiguous and on the state's device; the ranges of slots and
    steps are not checked."""
    x, shape = state.x, tuple(eps.shape)
    n = shape[0]
    need("eps", eps, shape, x)
    need("slots", slots, (n,), x, (torch.int64,))
    need("coefficients", rows.coefficients, (n, len(COLUMNS)), x, (torch.float32,))
    need("push", rows.push, (n,), x, (torch.bool,))
    need("end", rows.end, (n,), x, (torch.bool,))
    need("z", z, shape, x, (torch.float32,))
    need("variance", variance, shape, x)
    if guidance is not None:
        need("uncond", guidance.uncond, ("g", *shape[1:]), x, FLOATS)
        need("guidance row", guidance.row, (n,), x, (torch.int64,))
        need("guidance weight", guidance.weight, (n,), x, (torch.float32,))
        need("guidance channels", guidance.channels, (n,), x, (torch.int64,))
    if noise is not None:
        need("seeds", noise.seeds, (n,), x, (torch.int64,))
        need("step", noise.step, (n,), x, (torch.int64,))
    E = math.prod(shape[1:])
    if n * E == 0:
        return
    noisy, BLOCK = rows.noise, 512  # one Philox counter a thread: float64 takes registers
    _solver_step_kernel[(n * cdiv(E, BLOCK),)](
        *(x, state.base, state.history if rows.history else None, eps),
        *((None,) * 4 if guidance is None else (guidance.uncond, guidance.row, guidance.weight, guidance.channels)),
        *(rows.coefficients, rows.push, rows.end, slots, z if noisy else None),
        *((noise.seeds, noise.step) if noise is not None and noisy else (None, None)),
        *(variance if noisy else None, 0 if noise is None else _signed(noise.stream), E, math.prod(shape[2:])),
        DATA=rows.data,
        HELD=state.held,
        REACH=rows.history,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _signed(word: int) -> int:
    """The int32 with the same bits."""
    return word - 2**32 if word >= 2**31 else word
