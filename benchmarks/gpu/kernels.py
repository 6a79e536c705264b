"""Kernels that are measured and serve nothing yet: a count posted to the host, a product whose M the device knows."""

import functools
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from adadiff_kernels.launch import interpreted

TICKETS = 1 << 20
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _post_count_kernel(
    u_ptr,  # f32 [n]
    threshold_ptr,  # f32 [n]
    ticket_ptr,  # i64 [1]
    word_ptr,  # i64 [1], in the host's memory
    n,
    BLOCK: tl.constexpr,
):
    row = tl.arange(0, BLOCK)
    u = tl.load(u_ptr + row, mask=row < n, other=0.0)
    threshold = tl.load(threshold_ptr + row, mask=row < n, other=0.0)
    kept = tl.sum(((row < n) & ~(u < threshold)).to(tl.int64), 0)
    ticket = tl.load(ticket_ptr) + 1
    tl.store(ticket_ptr, ticket)
    tl.store(word_ptr, ticket * 1048576 + kept, cache_modifier=".wt")


class PostedCount:
    """Rows that stay, written by the device to a word of host memory that the host polls."""

    def __init__(self, u: Tensor, threshold: Tensor) -> None:
        """u, threshold: float32 [n], n below TICKETS."""
        self.u, self.threshold = u, threshold
        self.ticket = torch.zeros(1, dtype=torch.int64, device=u.device)
        self.word = torch.zeros(1, dtype=torch.int64, pin_memory=u.is_cuda)
        self.seen = self.word.numpy()  # the same memory, without PyTorch's price for each look

    def post(self) -> None:
        n = len(self.u)
        _post_count_kernel[(1,)](
            *(self.u, self.threshold, self.ticket, self.word, n),
            BLOCK=triton.next_power_of_2(n),
            num_warps=1,
            enable_fp_fusion=True,
        )

    def after(self, post: Callable[[], object]) -> int:
        """Calls `post`, which posts once, and waits for the count. Nothing else may be under way."""
        before = int(self.seen[0])
        post()
        late = time.perf_counter() + 5
        while (word := int(self.seen[0])) == before:
            if time.perf_counter() > late:
                raise RuntimeError("the device wrote no count to the host's memory in 5 seconds")
        return word % TICKETS


@triton.jit
def _product_kernel(
    a,  # descriptor of bf16 [rows, K], tiles of [BLOCK_M, BLOCK_K]
    w,  # descriptor of bf16 [N, K], tiles of [BLOCK_N, BLOCK_K]
    out_ptr,  # [rows, N]
    rows_ptr,  # i32 [1]: M
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    M = tl.load(rows_ptr)
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = 8 * across  # tiles of eight rows of tiles, which share what they read of w in the cache
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        top = tile // band * 8
        height = tl.minimum(down - top, 8)
        i = top + tile % band % height
        j = tile % band // height
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            part, weight = a.load([i * BLOCK_M, k]), w.load([j * BLOCK_N, k])
            if INTERPRETED:  # NumPy has no bfloat16
                part, weight = part.to(tl.float32), weight.to(tl.float32)
            acc = tl.dot(part, weight.T, acc)
        row = (i * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        column = (j * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        tl.store(out_ptr + row * N + column, acc.to(out_ptr.dtype.element_ty), mask=(row < M) & (column < N))


class Product:
    """out[:M] = a[:M] w^T with one tile size for any M, so a row's bits do not depend on M. Persistent: a program a
    multiprocessor, each taking every PROGRAMS-th tile."""

    def __init__(self, a: Tensor, w: Tensor, rows: Tensor, tile: tuple[int, int, int], programs: int) -> None:
        """a: [rows, K]; w: [N, K]; both contiguous, rows of 16-byte multiples; rows: int32 [1] on the device."""
        BLOCK_M, BLOCK_N, BLOCK_K = tile
        self.out = a.new_empty(len(a), len(w))
        self._call = functools.partial(
            _product_kernel[(programs,)],
            TensorDescriptor.from_tensor(a, [BLOCK_M, BLOCK_K]),
            TensorDescriptor.from_tensor(w, [BLOCK_N, BLOCK_K]),
            *(self.out, rows, len(w), a.shape[1]),
            *(BLOCK_M, BLOCK_N, BLOCK_K, programs),
            num_warps=8,
            num_stages=3,
            enable_fp_fusion=True,
        )

    def __call__(self) -> Tensor:
        self._call()
        return self.out
