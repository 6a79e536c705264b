"""Asynchronous copies from a device to the host."""

import threading

import torch
from torch import Tensor


class Arriving:
    """An asynchronous copy of `value` to the host, on a stream of its own, so that work queued next does not wait for
    it. For a CPU tensor, the tensor itself."""

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
        value.record_stream(beside)  # keeps its memory until the copy is done

    def read(self) -> Tensor:
        """The values on the CPU; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


_streams = threading.local()


def _beside(device: torch.device) -> "torch.cuda.Stream":
    """The copy stream, one for each thread and device."""
    known: dict[torch.device, torch.cuda.Stream] = _streams.__dict__.setdefault("of", {})
    if device not in known:
        known[device] = torch.cuda.Stream(device)
    return known[device]
