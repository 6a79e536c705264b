"""Where a captured forward pass keeps what crosses from one piece of work to the next, at addresses that stay."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.interface import Conditioning
from .structure import Structure


class Embedded(NamedTuple):
    """B lanes before the first block. hidden: [B, T, D]. offsets: float32 [L, B, P], None where nothing is scored."""

    hidden: Tensor
    cond: Conditioning
    offsets: Tensor | None


class Memory:
    """For up to `lanes` lanes, of which a pass uses the first ones.

    rows(layer): [lanes, T, D], what block `layer` writes, 0: the first block's input. A block writes over what it
    reads, unless a later block joins that. normed: [lanes, T, D], rows for the first norm of the next block. saved:
    [lanes, T, D] by lane, of those that exited. snapshots: int32 [lanes], of long skips, by the index of their block.
    limits: float32 [L - 1, lanes]; partner: int32 [lanes], a lane itself where it has none; identity: int32 [lanes].
    u: float32 [lanes] by row, of the last block. scores: float32 [L, lanes] by lane. prediction: of the head.
    embedded: what the network made of the lanes, `store`d. like, prediction: of one lane, which shapes are taken from.
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
        """Of the first lanes."""
        n, own = len(embedded.hidden), self.embedded
        own.hidden[:n].copy_(embedded.hidden)
        for name, value in _by_lane(embedded.cond):
            getattr(own.cond, name)[:n].copy_(value)
        if embedded.offsets is not None:
            own.offsets[:, :n].copy_(embedded.offsets)


def _by_lane(cond: Any) -> Iterator[tuple[str, Tensor]]:
    """What a conditioning holds: a dataclass, of which every tensor is by lane."""
    for field in fields(cond):
        if isinstance(value := getattr(cond, field.name), Tensor):
            yield field.name, value


def _zeros(lanes: int, value: Tensor) -> Tensor:
    return value.new_zeros(lanes, *value.shape[1:])
