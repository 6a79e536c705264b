"""The compiled core (csrc/). Pointers are integers from Tensor.data_ptr(); bad input raises ValueError."""

cuda_built: bool
"""Whether compact.cu is in it. If not, max_lanes, compact, start and MappedWord are missing."""

max_lanes: int
"""How many lanes one thread block handles."""

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
    num_prefix_tokens: int,
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
    num_prefix_tokens: int,
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

def compact(
    lane: int,
    row: int,
    exit_layer: int,
    state: int,
    u: int,
    threshold: int,
    mask: int,
    partner: int,
    moves: int,
    snapshot: int,
    bound: int,
    lanes: int,
    layer: int,
    word: int,
    device: int,
    stream: int,
) -> None:
    """Queues one step of a DeviceSet on a CUDA stream; 0 for a pointer that is not given. RuntimeError from CUDA."""

def start(lane: int, row: int, exit_layer: int, state: int, lanes: int, word: int, device: int, stream: int) -> None:
    """Queues the identity, everybody running, and the next tick."""

class MappedWord:
    """A word of pinned host memory that a CUDA device writes to: tick, layer, count; see DeviceSet."""

    device_address: int
    def __init__(self, device: int) -> None: ...
    def read(self) -> int: ...
    def poll(self, tick: int, layer: int, seconds: float) -> bool:
        """Reads until the word is of this tick and of `layer` or later; False when that took too long."""
