"""Copies from the host to a device, without host synchronisation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels.extension import traced


def upload(value: Tensor, device: torch.device) -> Tensor:
    """Copies `value` to `device`; from the CPU to a GPU through pinned memory, without host synchronisation.

    Returns `value` itself if it is there already. RuntimeError during CUDA-graph capture: replays would read host
    memory that has been reused.
    """
    if value.device == device:
        return value
    if value.is_cpu and device.type != "meta":
        if not traced(value) and captures(device):
            raise RuntimeError(f"a CUDA graph cannot hold a value of the CPU, {list(value.shape)}; move it to {device}")
        return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)
    return value.to(device)


def upload_together(values: Sequence[np.ndarray | Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Copies CPU arrays and tensors to `device` in one transfer, without host synchronisation.

    Returns tensors in the order of `values`, None for None. With device "cpu" they share memory with the values.
    RuntimeError during CUDA-graph capture, see `upload`.
    """
    tensors = [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    if device.type == "cpu":
        return tensors
    starts, size = [], 0
    for value in tensors:
        starts.append(size)
        size += 0 if value is None else -(-value.nbytes // ALIGNED) * ALIGNED
    # a new buffer for every transfer: PyTorch does not reuse it before the transfer is done
    host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    staging = host.numpy()
    for start, value, tensor in zip(starts, values, tensors, strict=True):
        if value is not None and value.nbytes:
            if isinstance(value, np.ndarray):  # NumPy's views take a third of the time of PyTorch's
                own = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            else:
                own = tensor.contiguous().flatten().view(torch.uint8).numpy()
            staging[start : start + value.nbytes] = own
    uploaded = upload(host, device)
    return [
        None if value is None else uploaded[start : start + value.nbytes].view(value.dtype).view(value.shape)
        for start, value in zip(starts, tensors, strict=True)
    ]


ALIGNED = 16  # bytes


def captures(device: torch.device) -> bool:
    """Whether work queued on `device` now is captured in a CUDA graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
