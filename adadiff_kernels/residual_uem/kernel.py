"""The fused pass on a GPU. Formula, letters and reference: reference.py.

One program takes a tile of BLOCK_M tokens of one row, BLOCK_T at a time, a token or two to a warp. D channels come in
CHUNKS of BLOCK_D, 16 bytes a thread, which all stay in registers, so D need be no power of two. x and branch are read
once; y, the normalised rows and one partial sum of the score are written. With P > 1 the score is a matrix product of
the tile, which reads y back from cache in slices. The last program of a row adds its partial sums in a fixed order. No
program reads two rows and no block size depends on n, so a row's result is the same in any batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adadiff_kernels.launch import FLOATS, cdiv, interpreted, need, next_power_of_2
from adadiff_kernels.residual_uem import MAX_CHANNELS, MAX_OUTPUTS, Cached, Norm, Score

MAP_TILE = 32  # tokens of a program where P > 1: enough to repay reading the weights of the score
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _dot(a, b, acc):
    """a [M, K] times b [N, K] transposed, added to acc [M, N] in float32."""
    if INTERPRETED:  # NumPy has no bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), acc, input_precision="tf32x3")


@triton.jit
def _vector(pointer, channel, BLOCK_T: tl.constexpr, D: tl.constexpr):
    """f32 [BLOCK_T, BLOCK_D]: a parameter at channel [1, BLOCK_D].

    Each warp loads it in the layout of its tokens: one load for all warps would need shared memory and barriers.
    """
    at = tl.broadcast_to(channel, [BLOCK_T, channel.shape[1]])
    return tl.load(pointer + at, mask=at < D, other=0.0).to(tl.float32)


@triton.jit
def _residual_uem_kernel(
    x_ptr,  # [n, T, D]
    branch_ptr,  # [n, T, D], or [m, T, D] beside cached rows
    row_to_lane_ptr,  # i32 [n]
    gate_ptr,  # [B, D] or None
    bias_ptr,  # [D] or None
    score_ptr,  # [P, D] or None
    offset_ptr,  # f32 [B, P]
    weight_ptr,  # [D] or None
    own_bias_ptr,  # [D], of the norm
    scale_ptr,  # [B, D] or None
    shift_ptr,  # [B, D]
    y_ptr,  # [n, T, D], may be x or branch
    h_ptr,  # [n, T, D] or None
    partial_ptr,  # f32 [n, tiles], or None without a score
    ticket_ptr,  # i32 [n], zeros before and after
    u_ptr,  # f32 [n]
    rows_ptr,  # [E, T, D] or None, cached branches
    source_ptr,  # i32 [n]
    keep_ptr,  # i32 [n] or None
    stride_gate,
    stride_offset,
    stride_scale,
    stride_shift,
    T,
    num_prefix_tokens,
    eps,
    count,  # patch tokens times P
    D: tl.constexpr,
    P: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_M)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    lane = tl.load(row_to_lane_ptr + row).to(tl.int64)
    x_ptr += row * T * D
    if rows_ptr is None:
        branch_ptr += row * T * D
    else:
        source = tl.load(source_ptr + row).to(tl.int64)
        branch_ptr = tl.where(source >= 0, rows_ptr + source * T * D, branch_ptr + (-1 - source) * T * D)
        if keep_ptr is not None:
            keep = tl.load(keep_ptr + row).to(tl.int64)
            rows_ptr += keep * T * D
    y_ptr += row * T * D
    if gate_ptr is not None:
        gate_ptr += lane * stride_gate
    if score_ptr is not None:
        offset_ptr += lane * stride_offset
    if h_ptr is not None:
        h_ptr += row * T * D
        if scale_ptr is not None:
            scale_ptr += lane * stride_scale
            shift_ptr += lane * stride_shift

    partial = 0.0
    for start in tl.range(0, BLOCK_M, BLOCK_T, num_stages=1):
        token = first + start + tl.arange(0, BLOCK_T)
        at = token[:, None] * D
        live = (token < T)[:, None]

        # Every load comes before the first store: y may be x, and the compiler moves no load above a store.
        ys = ()
        kept = ()
        for c in tl.static_range(CHUNKS):
            channel = c * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            inside = live & (channel < D)
            # Read once, so it bypasses the L1 cache, which serves the parameters.
            branch = tl.load(branch_ptr + at + channel, mask=inside, other=0.0, cache_modifier=".cg")
            if keep_ptr is not None:
                kept += (branch,)
            branch = branch.to(tl.float32)
            x = tl.load(x_ptr + at + channel, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            if bias_ptr is not None:
                branch += _vector(bias_ptr, channel, BLOCK_T, D)
            if gate_ptr is not None:
                branch *= _vector(gate_ptr, channel, BLOCK_T, D)
            ys += ((x + branch).to(y_ptr.dtype.element_ty),)

        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        product = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for c in tl.static_range(CHUNKS):
            channel = c * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            tl.store(y_ptr + at + channel, ys[c], mask=live & (channel < D))
            if keep_ptr is not None:  # noqa: SIM102  one test at compile time, one for each row
                if keep >= 0:
                    tl.store(rows_ptr + at + channel, kept[c], mask=live & (channel < D))
            total += ys[c].to(tl.float32)
            if score_ptr is not None and P == 1:
                product += ys[c].to(tl.float32) * _vector(score_ptr, channel, BLOCK_T, D)
        if score_ptr is not None and P == 1:
            s = tl.sum(product, 1) + tl.load(offset_ptr)
            partial += tl.sum(tl.where((token >= num_prefix_tokens) & (token < T), tl.sigmoid(s), 0.0), 0)

        if h_ptr is not None:
            mean = (tl.sum(total, 1) / D)[:, None]
            square = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            for c in tl.static_range(CHUNKS):
                channel = c * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
                centred = tl.where(channel < D, ys[c].to(tl.float32) - mean, 0.0)
                square += centred * centred
            rstd = tl.rsqrt(tl.sum(square, 1) / D + eps)[:, None]
            for c in tl.static_range(CHUNKS):
                channel = c * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
                h = (ys[c].to(tl.float32) - mean) * rstd
                if weight_ptr is not None:
                    h = h * _vector(weight_ptr, channel, BLOCK_T, D) + _vector(own_bias_ptr, channel, BLOCK_T, D)
                if scale_ptr is not None:
                    h = h * (1 + _vector(scale_ptr, channel, BLOCK_T, D)) + _vector(shift_ptr, channel, BLOCK_T, D)
                tl.store(h_ptr + at + channel, h.to(h_ptr.dtype.element_ty), mask=live & (channel < D))

    if score_ptr is not None:
        if P > 1:
            tl.debug_barrier()  # threads read y stored by other threads of the program
            tokens = first + tl.arange(0, BLOCK_M)[:, None]
            output = tl.arange(0, BLOCK_P)[:, None]
            logits = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
            for k in range(0, D, BLOCK_K):
                column = k + tl.arange(0, BLOCK_K)[None, :]
                part = tl.load(y_ptr + tokens * D + column, mask=(tokens < T) & (column < D), other=0.0)
                w = tl.load(score_ptr + output * D + column, mask=(output < P) & (column < D), other=0.0)
                near = w.to(part.dtype)
                logits = _dot(part, near, logits)
                if w.dtype != part.dtype:  # add the rounding error of w
                    logits = _dot(part, (w.to(tl.float32) - near.to(tl.float32)).to(part.dtype), logits)
            outputs = tl.arange(0, BLOCK_P)[None, :]
            logits += tl.load(offset_ptr + outputs, mask=outputs < P, other=0.0)
            patch = (tokens >= num_prefix_tokens) & (tokens < T) & (outputs < P)
            partial = tl.sum(tl.sum(tl.where(patch, tl.sigmoid(logits), 0.0), 1), 0)
        tl.store(partial_ptr + tl.program_id(0), partial)
        tl.debug_barrier()  # the partial sum is stored before the ticket is taken
        ticket = tl.atomic_add(ticket_ptr + row, 1, sem="acq_rel", scope="gpu")
        if ticket == tiles - 1:
            tile = tl.arange(0, TILES)
            at = partial_ptr + row * tiles + tile
            partials = tl.load(at, mask=tile < tiles, other=0.0, cache_modifier=".cg")  # by other programs
            tl.store(u_ptr + row, tl.sum(partials, 0) / count)
            tl.store(ticket_ptr + row, 0)


def launch_residual_uem(
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `residual_uem`. x, branch, out, norm_out, row_to_lane, bias, cached.rows and its indices, the score's weight
    and tickets must be contiguous; tensors by lane need contiguous rows; all are on one device; D is at most 1536, P at
    most 64. Not checked: lanes below B, cached indices below E, tickets zero."""
    n, T, D = x.shape
    P = 1 if score is None else len(score.weight)
    _check(x, branch, row_to_lane, gate, bias, score, norm, out, norm_out, cached)
    y = torch.empty_like(x) if out is None else out
    h = None if norm is None else x.new_empty(x.shape, dtype=branch.dtype) if norm_out is None else norm_out
    BLOCK_T = 8 if D <= 512 else 4  # two tokens a warp where they need few registers
    BLOCK_M = BLOCK_T if P == 1 else MAP_TILE
    BLOCK_D = min(512 // x.element_size(), max(16, next_power_of_2(D)))
    tiles = cdiv(T, BLOCK_M)
    u = partial = tickets = None
    if score is not None:
        u, partial = x.new_empty(n, dtype=torch.float32), x.new_empty(n, tiles, dtype=torch.float32)
        tickets = x.new_zeros(n, dtype=torch.int32) if score.tickets is None else score.tickets
    if y.numel() == 0:
        return y, h, u
    scale, shift = (None, None) if norm is None else (norm.scale, norm.shift)
    _residual_uem_kernel[(n * tiles,)](
        *(x, branch, row_to_lane, gate, bias),
        *((None, None) if score is None else (score.weight, score.offset)),
        *((None, None) if norm is None else (norm.weight, norm.bias)),
        *(scale, shift, y, h, partial, tickets, u),
        *((None, None, None) if cached is None else (cached.rows, cached.source, cached.keep)),
        0 if gate is None else gate.stride(0),
        0 if score is None else score.offset.stride(0),
        0 if scale is None else scale.stride(0),
        0 if shift is None else shift.stride(0),
        *(T, 0 if score is None else score.num_prefix_tokens, 0.0 if norm is None else norm.eps),
        0.0 if score is None else float((T - score.num_prefix_tokens) * P),
        D=D,
        P=P,
        CHUNKS=cdiv(D, BLOCK_D),
        BLOCK_M=BLOCK_M,
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        BLOCK_P=max(16, next_power_of_2(P)),
        BLOCK_K=min(256 // x.element_size(), max(16, next_power_of_2(D))),
        TILES=next_power_of_2(tiles),
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )
    return y, h, u


def _check(
    x: Tensor,
    branch: Tensor,
    row_to_lane: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    score: Score | None,
    norm: Norm | None,
    out: Tensor | None,
    norm_out: Tensor | None,
    cached: Cached | None,
) -> None:
    n, T, D = x.shape
    if not 1 <= D <= MAX_CHANNELS:
        raise ValueError(
            f"rows of 1 to {MAX_CHANNELS} channels fit in registers, got {D}; backend='reference' takes any"
        )
    need("x", x, (n, T, D), x)
    need("branch", branch, (n if cached is None else "m", T, D), x)
    if cached is not None:
        need("cached.rows", cached.rows, ("E", T, D), x, (branch.dtype,))
        need("cached.source", cached.source, (n,), x, (torch.int32,))
        need("cached.keep", cached.keep, (n,), x, (torch.int32,))
    need("row_to_lane", row_to_lane, (n,), x, (torch.int32,))
    need("gate", gate, ("B", D), x, rows_apart=True)
    need("bias", bias, (D,), x)
    need("out", out, (n, T, D), x, (x.dtype,))
    need("norm_out", norm_out, (n, T, D), x, (branch.dtype,))
    if score is not None:
        if not 1 <= len(score.weight) <= MAX_OUTPUTS:
            raise ValueError(f"score takes 1 to {MAX_OUTPUTS} outputs a token, got {len(score.weight)}")
        need("score.weight", score.weight, ("P", D), x)
        need("score.offset", score.offset, ("B", len(score.weight)), x, (torch.float32,), rows_apart=True)
        need("score.tickets", score.tickets, ("B",), x, (torch.int32,))
    if norm is not None:
        need("norm.weight", norm.weight, (D,), x, FLOATS)
        need("norm.bias", norm.bias, (D,), x, FLOATS)
        need("norm.scale", norm.scale, ("B", D), x, FLOATS, rows_apart=True)
        need("norm.shift", norm.shift, ("B", D), x, FLOATS, rows_apart=True)
