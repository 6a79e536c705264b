"""Values of the host on their way to a device."""

from collections.abc import Sequence

import numpy as np
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
        return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)
    return value.to(device)


def upload_together(values: Sequence[np.ndarray | Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Several arrays or tensors of the CPU, on `device`, in one transfer that the host does not wait for. On the CPU
    they share memory.

    RuntimeError while a CUDA graph is captured, see `upload`.
    """
    given = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    if device.type == "cpu":
        return given
    places, size = [], 0
    for value in given:
        places.append(size)
        size += 0 if value is None else -(-value.nbytes // ALIGNED) * ALIGNED
    # fresh memory for every transfer: PyTorch gives it to nobody else before the transfer is done
    host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    own = host.numpy()
    for place, value in zip(places, given, strict=True):
        if value is not None and value.nbytes:
            own[place : place + value.nbytes] = value.contiguous().flatten().view(torch.uint8).numpy()
    there = upload(host, device)
    return [
        None if value is None else there[place : place + value.nbytes].view(value.dtype).view(value.shape)
        for place, value in zip(places, given, strict=True)
    ]


ALIGNED = 16  # bytes


def captures(device: torch.device) -> bool:
    """Whether what is done on `device` now is recorded in a CUDA graph instead."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
