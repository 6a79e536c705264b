"""Memory at fixed addresses for what captured pieces of a forward pass hand on to each other."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.interface import Conditioning
from .structure import Structure


class Embedded(NamedTuple):
    """B lanes before the first block. hidden: [B, T, D]. offsets: float32 [L, B, P], None if no layer is scored."""

    hidden: Tensor
    cond: Conditioning
    offsets: Tensor | None


class Memory:
    """Memory for up to `lanes` lanes; a pass uses the first ones.

    rows(layer): [lanes, T, D], the output of block `layer`; 0: the input of the first block. A block overwrites its
    input unless a later block joins it as a long skip. normed: [lanes, T, D], hidden states after the next block's
    first norm. saved: [lanes, T, D] by lane, of exited lanes. snapshots: int32 [lanes], of long skips, by block index.
    limits: float32 [L - 1, lanes]; partner: int32 [lanes], the lane itself if none; identity: int32 [lanes].
    u: float32 [lanes] by row, of the last block. scores: float32 [L, lanes] by lane. prediction: the head's output.
    embedded: the output of the stem, set by `store`. Parameters like, prediction: of one lane, to take shapes from.
    """

    def __init__(self, lanes: int, like: Embedded, prediction: Tensor, structure: Structure) -> None:
        shape, num_layers, device = (lanes, *like.hidden.shape[1:]), structure.num_layers, like.hidden.device
        self._shared, self.normed, self.saved = (like.hidden.new_empty(shape) for _ in range(3))
        self._joined = {index: like.hidden.new_empty(shape) for index in sorted(structure.skips)}
        self.identity = torch.arange(lanes, dtype=torch.int32, device=device)
        self.partner = self.identity.clone()
        self.snapshots = {index: self.identity.clone() for index in structure.skips}
        self.limits = torch.full((num_layers - 1, lanes), -torch.inf, dtype=torch.float32, device=device)
        self.scores = torch.empty(num_layers, lanes, dtype=torch.float32, device=device)
        self.u = torch.empty(lanes, dtype=torch.float32, device=device)
        cond = replace(like.cond, **{name: _zeros(lanes, value) for name, value in _by_lane(like.cond)})
        offsets = like.offsets
        if offsets is not None:
            offsets = offsets.new_zeros(offsets.shape[0], lanes, offsets.shape[2])
        self.embedded = Embedded(self._shared, cond, offsets)
        self.prediction = prediction.new_empty(lanes, *prediction.shape[1:])

    def rows(self, layer: int) -> Tensor:
        return self._joined.get(layer - 1, self._shared)

    def store(self, embedded: Embedded) -> None:
        """Copies the stem's output for the first lanes."""
        n, target = len(embedded.hidden), self.embedded
        target.hidden[:n].copy_(embedded.hidden)
        for name, value in _by_lane(embedded.cond):
            getattr(target.cond, name)[:n].copy_(value)
        if embedded.offsets is not None:
            target.offsets[:, :n].copy_(embedded.offsets)


def _by_lane(cond: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensor fields of a conditioning (a dataclass whose tensors are all by lane)."""
    for field in fields(cond):
        if isinstance(value := getattr(cond, field.name), Tensor):
            yield field.name, value


def _zeros(lanes: int, value: Tensor) -> Tensor:
    return value.new_zeros(lanes, *value.shape[1:])
