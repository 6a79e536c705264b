"""Policies of somebody's own, to be named as module:Class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adadiff.policies.interface import ExitContext, ExitPolicy


@dataclass(frozen=True)
class BelowATime(ExitPolicy):
    """Lanes whose time is below `below` exit after `depth` blocks."""

    depth: int = 1
    below: float = 1000.0
    strict: bool = False
    note: str = ""
    needs_scores = False

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")

    def exit_mask(self, u: Tensor | None, layer: int, context: ExitContext) -> Tensor:
        near = context.t < self.below if self.strict else context.t <= self.below
        return near & torch.tensor(layer >= self.depth)


class NoPolicy:
    def __init__(self, **_: object) -> None:
        raise AssertionError("what is no policy must not be called")
