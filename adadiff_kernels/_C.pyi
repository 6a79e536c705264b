"""The C++ core (csrc/). Pointers are integers from Tensor.data_ptr() (0: absent), sizes are in elements; bad input
raises ValueError."""

cuda_built: bool
"""Whether the CUDA parts were built: compact, start and MappedWord exist only then."""

max_lanes: int
"""The largest num_lanes of an exit."""

def exit_rows(
    u: int,
    threshold: int,
    mask: int,
    partner: int,
    row_to_lane: int,
    lane_to_row: int,
    exit_layer: int,
    moves: int,
    n: int,
    num_lanes: int,
    layer: int,
) -> int:
    """Returns the number of rows still running. Writes `moves`, int32[n, 3], if any row exits."""

def settle_rows(
    moves: int,
    k: int,
    rows: int,
    num_rows: int,
    rows_stride: int,
    saved: int,
    num_lanes: int,
    saved_stride: int,
    row_bytes: int,
) -> None:
    """Saves exiting rows and moves remaining rows into their places; strides in bytes."""

def philox(seeds: int, steps: int, n: int, stream: int, blocks: int, words: int) -> None:
    """Writes words, int64[n, blocks, 4], of counters (block, step, stream, 0) with the seeds, int64[n], as keys."""

def uem_score(
    y: int,
    is_bfloat16: bool,
    n: int,
    tokens: int,
    channels: int,
    num_prefix_tokens: int,
    weight: int,
    offset: int,
    offset_stride: int,
    num_lanes: int,
    row_to_lane: int,
    u: int,
    limit: int = 0,
) -> bool:
    """Writes u, float32[n], for rows y, float32 or bfloat16 [n, tokens, channels]. Returns whether any u is below its
    lane's limit, float32[num_lanes], or any limit is +inf (True without limits)."""

def compact(
    row_to_lane: int,
    lane_to_row: int,
    exit_layer: int,
    state: int,
    u: int,
    threshold: int,
    mask: int,
    partner: int,
    moves: int,
    snapshot: int,
    bound: int,
    num_lanes: int,
    layer: int,
    word: int,
    device: int,
    stream: int,
) -> None:
    """Queues one exit of a DeviceSet on a CUDA stream. CUDA errors raise RuntimeError."""

def start(
    row_to_lane: int,
    lane_to_row: int,
    exit_layer: int,
    state: int,
    num_lanes: int,
    count: int,
    word: int,
    device: int,
    stream: int,
) -> None:
    """Queues the next tick: rows as the identity, the first `count` lanes running."""

class MappedWord:
    """A word of pinned host memory, (tick, layer, count), that a CUDA device writes; see DeviceSet."""

    device_address: int
    def __init__(self, device: int) -> None: ...
    def read(self) -> int: ...
    def poll(self, tick: int, layer: int, seconds: float) -> bool:
        """Reads until the word is of `tick` and of `layer` or later; False after `seconds`."""
