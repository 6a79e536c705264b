"""Values of a device on their way to the host, which does not wait for them."""

import threading

import torch
from torch import Tensor


class Arriving:
    """A copy of `value` that begins when it has been computed, on a stream beside the one that computes, so that what
    is queued next need not wait for it. On a CPU it is there at once."""

    def __init__(self, value: Tensor) -> None:
        self._event = None
        if value.device.type == "cpu":
            self._host = value
            return
        self._host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
        if not value.is_cuda:
            self._host.copy_(value, non_blocking=True)
            return
        beside, current = _beside(value.device), torch.cuda.current_stream(value.device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        value.record_stream(beside)  # its memory is not to be used again before

    def read(self) -> Tensor:
        """The values, on the CPU; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


_streams = threading.local()


def _beside(device: torch.device) -> "torch.cuda.Stream":
    """One for each thread and device."""
    known: dict[torch.device, torch.cuda.Stream] = _streams.__dict__.setdefault("of", {})
    if device not in known:
        known[device] = torch.cuda.Stream(device)
    return known[device]
