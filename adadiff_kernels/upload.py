"""Values of the host on their way to a device."""

import torch
from torch import Tensor

from adadiff_kernels.extension import traced


def upload(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`. From the CPU to a GPU it goes through pinned memory, and the host waits for nothing.

    Returns `value` itself where it lies there already. RuntimeError while a CUDA graph is captured: replays would read
    memory of the host that is no longer the value's.
    """
    if value.device == device:
        return value
    if value.is_cpu and device.type != "meta":
        if not traced(value) and captures(device):
            raise RuntimeError(f"a CUDA graph cannot hold a value of the CPU, {list(value.shape)}; move it to {device}")
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def captures(device: torch.device) -> bool:
    """Whether what is done on `device` now is recorded in a CUDA graph instead."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
