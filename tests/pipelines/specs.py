"""How tiny transformers and their inputs are described."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Lane:
    """Of each lane its own: standard normal of this shape. moves: it changes from step to step, as samples do."""

    shape: tuple[int, ...]
    moves: bool = False


@dataclass(frozen=True)
class Table:
    """One for all lanes, [S, D]."""

    shape: tuple[int, int]


@dataclass(frozen=True)
class Time:
    """shape: beyond the lanes. unit: largest time."""

    shape: tuple[int, ...] = ()
    unit: float = 1000.0


@dataclass(frozen=True)
class Listed:
    """A list of the lanes' tensors; or, of several, a list of tensors by lane."""

    shape: tuple[int, ...]
    moves: bool = False
    layers: int = 0


@dataclass(frozen=True)
class ByCount:
    """Made for B lanes, the same for each."""

    make: Callable[[int], Any]


@dataclass(frozen=True)
class ByLane:
    """Made for each lane by its number."""

    make: Callable[[int], Any]


def same(*values: Any) -> ByCount:
    """[B, ...] of one value."""
    return ByCount(lambda B: torch.tensor([values[0] if len(values) == 1 else list(values)] * B))


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> ByCount:
    return ByCount(lambda B: torch.ones(B, *shape, dtype=dtype))


@dataclass(frozen=True)
class Case:
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    kind: str = ""
    slow: bool = False
    blocks: tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def x(*shape: int) -> Lane:
    return Lane(shape, moves=True)
