"""The compiled core (csrc/). Pointers are integers from Tensor.data_ptr(); bad input raises ValueError."""

def leave(
    mask: int, lane: int, row: int, exit_layer: int, swaps: int, n: int, lanes: int, layer: int
) -> tuple[int, int]:
    """Rows that still run, and pairs written to `swaps` (int32[n // 2, 2])."""

def swap_rows(data: int, row_bytes: int, stride_bytes: int, rows: int, pairs: int, k: int) -> None:
    """Exchanges the rows of k int32 pairs in place."""
