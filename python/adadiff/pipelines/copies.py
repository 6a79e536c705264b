"""Copies of weights that are renewed when the weights change."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
VALUES = 2**18  # values compared in total, about
LEAST = 64  # values compared per tensor, at least


class Copy(Generic[T]):
    """Calling it returns the result of `make`, recomputed if the weights of `module` have changed since.

    Detects replaced tensors, other memory, dtype or device, and every in-place edit that PyTorch counts. Edits through
    `.data` (swapping in averages, merging adapters) are not counted, so some values of each tensor, in a small network
    all, are compared, too.
    """

    def __init__(self, module: nn.Module, make: Callable[[], T]):
        self._module, self._make = module, make
        self._tensors: list[tuple[object, ...]] = []
        self._parts: list[list[Tensor]] = []  # views of the weights, by device and dtype
        self._values: list[Tensor] = []
        self._made: T | None = None

    def __call__(self) -> T:
        weights = [*self._module.parameters(), *self._module.buffers()]
        tensors = [(id(v), v.data_ptr(), v.dtype, v.device, 0 if v.is_inference() else v._version) for v in weights]
        if self._made is not None and tensors == self._tensors and self._same_values():
            return self._made
        with torch.inference_mode(False), torch.no_grad():  # a later caller may be in another mode
            self._made = self._make()
        self._tensors, self._parts = tensors, _parts(weights)
        self._values = [_joined(part) for part in self._parts]
        return self._made

    def _same_values(self) -> bool:
        found = [_joined(part) for part in self._parts]
        return all(torch.equal(a, b) for a, b in zip(found, self._values, strict=True))


def _parts(tensors: list[Tensor]) -> list[list[Tensor]]:
    most, parts = max(LEAST, VALUES // max(1, len(tensors))), dict[tuple[torch.device, torch.dtype], list[Tensor]]()
    for value in tensors:
        if value.numel() and value.is_contiguous():
            step = -(-value.numel() // most)
            parts.setdefault((value.device, value.dtype), []).append(value.detach().view(-1)[::step])
    return list(parts.values())


def _joined(part: list[Tensor]) -> Tensor:
    """The values as bytes, so that NaN equals NaN."""
    return torch.cat(part).view(torch.uint8)
