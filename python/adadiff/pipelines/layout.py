"""The layout of a transformer's blocks: their lists, the names of their arguments, and the data flow between them."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .families import SAMPLE, TIME, Family

# Names of arguments that may have the shape of the hidden states, but that no block updates.
BESIDE = re.compile(r"(?:^|_)(?:skip|t?emb|embs?|embeds|rope|rotary|freqs?|pos|cos|sin|mask|shift|scale|gate)(?:$|_)")


@dataclass(frozen=True)
class BlockId:
    """Block `index` of the list called `name`."""

    name: str
    index: int

    def __str__(self) -> str:
        return f"{self.name}[{self.index}]"


@dataclass(frozen=True)
class Outputs:
    """The outputs of a block. container: tuple or list, None for a single tensor; sources: for each output the argument
    whose next value it is, None for an output of None."""

    container: type | None
    sources: tuple[str | None, ...]

    def parts(self, output: Any) -> list[Any]:
        return [output] if self.container is None else list(output)

    def join(self, parts: Sequence[Any]) -> Any:
        return parts[0] if self.container is None else self.container(parts)


@dataclass(frozen=True)
class Planned:
    """A call of a block. segment: the consecutive calls of one list that pass on the same streams; "" if never
    skipped."""

    block: BlockId
    outputs: Outputs
    segment: str = ""


@dataclass(frozen=True)
class Layout:
    """The calls of blocks in one forward pass, in order. The first `head` calls and those from `tail` on always run;
    final: for each segment, the position of its last call between them. stays: segments whose first inputs are never
    changed in place ("": the first block's input). inside: segments that begin within another one, where reusing lanes
    hold undefined values: what these segments add is relative to the output of the first `head` calls."""

    calls: tuple[Planned, ...]
    head: int
    tail: int
    final: Mapping[str, int]
    stays: frozenset[str]
    inside: frozenset[str]


def find_lists(transformer: nn.Module, names: Sequence[str], given: bool) -> dict[str, nn.ModuleList]:
    """Lists of blocks by name. given: whether the user named them, so that each must exist. Raises ValueError if none
    is found, or one that was named is missing."""
    found: dict[str, nn.ModuleList] = {}
    if not given:  # in the network's order
        names = [name for name, _ in transformer.named_children() if name in names]
    for name in names:
        value: Any = transformer
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, nn.ModuleList) and len(value):
            found[name] = value
        elif given:
            there = [name for name, child in transformer.named_children() if isinstance(child, nn.ModuleList)]
            raise ValueError(
                f"{type(transformer).__name__} has no list of blocks {name!r}; it has {', '.join(there) or 'none'}"
            )
    if not found:
        raise ValueError(f"{type(transformer).__name__} keeps no blocks in lists; name its lists with blocks=[...]")
    return found


@cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    forward = inspect.unwrap(kind.forward)
    without_self = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in without_self if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def named(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, positional ones first."""
    names = _parameters(type(module))
    by_position = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
    return {**by_position, **kwargs}


def split(arguments: Mapping[str, Any], count: int) -> tuple[list[Any], dict[str, Any]]:
    """The inverse of `named`: the first `count` arguments by position, the others by name."""
    values = list(arguments.values())
    return values[:count], dict(list(arguments.items())[count:])


def argument(arguments: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of `names` that is given and not None; else None."""
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def has_time(transformer: nn.Module) -> bool:
    return any(name in _parameters(type(transformer)) for name in TIME)


def outputs_of(output: Any, arguments: Mapping[str, Any], family: Family, B: int) -> Outputs:
    """Matches each output to the argument of the same shape whose next value it is. Raises ValueError if there is none.

    Among several arguments, those whose names show that they are not streams (time and position embeddings, long skips)
    are excluded. A single output then matches the first one, preferably the hidden states; several outputs, which may
    come in any order, match the nearest by value.
    """
    container = type(output) if isinstance(output, tuple | list) else None
    streams = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.ndim > 2}
    sources: list[str | None] = []
    parts = [output] if container is None else output
    alone = sum(part is not None for part in parts) == 1
    for part in parts:
        if part is None:
            sources.append(None)
            continue
        rows = part.shape[family.batch_dim] if isinstance(part, Tensor) and part.ndim > 2 else 0
        likely = [name for name, value in streams.items() if rows and value.shape == part.shape and name not in sources]
        if not likely or rows % B:
            raise ValueError(f"it returns {_described(part)}, which matches none of its arguments")
        likely = [name for name in likely if not BESIDE.search(name)] or likely
        if alone:
            sources.append(next((name for name in SAMPLE if name in likely), likely[0]))
        else:
            sources.append(min(likely, key=lambda name: _distance(part, streams[name])) if likely[1:] else likely[0])
    return Outputs(container, tuple(sources))


def _distance(a: Tensor, b: Tensor) -> float:
    value = float((a.float() - b.float()).abs().mean())
    return value if value == value else torch.inf


def _described(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
