"""The C++ core (csrc/). Pointers are integers from Tensor.data_ptr(), sizes in elements; bad input raises
ValueError."""

cuda_built: bool
"""Whether the CUDA kernels are in it. If not, compact, start and MappedWord are missing."""

max_lanes: int
"""How many lanes an exit takes at most."""

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
    """The rows that still run; 0 for a pointer that is not given. Writes `moves`, int32[n, 3], if somebody exits."""

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
    """Saves exiting rows and moves those that take their places; strides in bytes."""

def philox(seeds: int, steps: int, n: int, stream: int, blocks: int, words: int) -> None:
    """int64[n, blocks, 4] words of counters (block, step, stream, 0) with the seeds, int64[n], as keys."""

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
    """u, float32[n], of rows y, float32 or bfloat16 [n, tokens, channels]; whether some u lies below its lane's limit,
    float[num_lanes], or that is infinite (True without limits)."""

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
    """Queues one exit of a DeviceSet on a CUDA stream; 0 for a pointer that is not given. RuntimeError from CUDA."""

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
    """Queues the identity, the first `count` lanes running, and the next tick."""

class MappedWord:
    """A word of pinned host memory that a CUDA device writes: tick, layer, count; see DeviceSet."""

    device_address: int
    def __init__(self, device: int) -> None: ...
    def read(self) -> int: ...
    def poll(self, tick: int, layer: int, seconds: float) -> bool:
        """Reads until the word is of this tick and of `layer` or later; False if that took too long."""
