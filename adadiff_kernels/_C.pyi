"""The compiled core (csrc/). Pointers are integers from Tensor.data_ptr(); bad input raises ValueError."""

def leave(
    mask: int, lane: int, row: int, exit_layer: int, swaps: int, n: int, lanes: int, layer: int
) -> tuple[int, int]:
    """Rows that still run, and pairs written to `swaps` (int32[n // 2, 2])."""

def philox(seeds: int, steps: int, n: int, stream: int, blocks: int, words: int) -> None:
    """int64[n, blocks, 4] words of counters (block, step, stream, 0) under the seeds, int64[n]."""

def uem_score_float32(
    y: int,
    n: int,
    tokens: int,
    channels: int,
    extras: int,
    weight: int,
    offset: int,
    offset_stride: int,
    B: int,
    lanes: int,
    u: int,
) -> None:
    """u, float32[n], of rows y, float32[n, tokens, channels]."""

def uem_score_bfloat16(
    y: int,
    n: int,
    tokens: int,
    channels: int,
    extras: int,
    weight: int,
    offset: int,
    offset_stride: int,
    B: int,
    lanes: int,
    u: int,
) -> None:
    """u, float32[n], of rows y, bfloat16[n, tokens, channels]."""

def swap_rows(data: int, row_bytes: int, stride_bytes: int, rows: int, pairs: int, k: int) -> None:
    """Exchanges the rows of k int32 pairs in place."""
