"""Values of the host on their way to a device."""

import torch
from torch import Tensor


def upload(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`. From the CPU to a GPU it goes through pinned memory, and the host waits for nothing.

    Returns `value` itself where it lies there already.
    """
    if value.device == device:
        return value
    if value.is_cpu and device.type != "meta":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
