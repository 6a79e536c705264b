"""How a forward pass is executed. Options change results by rounding at most."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .count_sync import CountSync, count_sync_from

Runner = Literal["eager", "compiled", "captured"]


@dataclass(frozen=True)
class ExecutionOptions:
    """How a forward pass is executed.

    batch_invariant: compute every lane separately, on the CPU each on one thread, so that a lane's prediction, scores
    and exit are bit-identical in any batch (on one machine).
    runner: "eager"; "compiled": blocks go through torch.compile, for any number of rows (the first passes take seconds
    to minutes; blocks in which a lane caches or reuses a branch are not compiled); "captured", on a GPU: the work of
    every layer and number of rows is replayed as a CUDA graph, which takes little time on the host. Do not patch or
    hook the network after the first captured pass.
    max_lanes: for "captured": passes of up to this many lanes share graphs and memory (None: only passes of equally
    many lanes do).
    count_sync: how the host learns how many rows still run: "sync", "sync:4", "lagged", "lagged:2", or a `CountSync`.
    None: "sync" on a GPU, `Measured` with runner "captured"; on the CPU the host decides itself.
    group_size: lanes per block call on the CPU (None: about 2048 tokens).
    nvtx: name the blocks for NVIDIA's profilers.
    Raises ValueError for invalid values, and for options that exclude each other.
    """

    batch_invariant: bool = False
    runner: Runner = "eager"
    count_sync: CountSync | str | None = None
    group_size: int | None = None
    max_lanes: int | None = None
    nvtx: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "count_sync", count_sync_from(self.count_sync))
        if self.runner not in get_args(Runner):
            raise ValueError(f"runner must be one of {get_args(Runner)}, got {self.runner!r}")
        for name in ("batch_invariant", "nvtx"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("group_size", "max_lanes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of 1 or more lanes, got {value!r}")
        if self.batch_invariant and self.runner != "eager":
            raise ValueError(f"batch_invariant runs lane by lane, which is not {self.runner}; leave one of the two out")
        if self.max_lanes is not None and self.runner != "captured":
            raise ValueError(f"max_lanes is for runner='captured', got runner={self.runner!r}")
        if self.batch_invariant and self.count_sync is not None:
            raise ValueError("batch_invariant runs lane by lane, with the exact count; leave count_sync out")
        if self.group_size is not None and self.count_sync is not None:
            raise ValueError("groups are for a host that knows the count; leave count_sync or group_size out")
        if self.nvtx and not torch.backends.cuda.is_built():
            raise ValueError("nvtx names blocks for NVIDIA's profilers, which needs a PyTorch built for CUDA")


DEFAULT = ExecutionOptions()
