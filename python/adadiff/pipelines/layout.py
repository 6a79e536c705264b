"""What is known about a transformer's blocks: where they lie, what their arguments are called, and which output goes
where."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .families import SAMPLE, TIME, Family

# Names of arguments that may have the shape of the hidden states, and of which no block gives the next value.
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
    """What a block returns: `container` is tuple or list, None for a tensor alone; `sources`: for each output the
    argument that it is the next value of, None where the output is None."""

    container: type | None
    sources: tuple[str | None, ...]

    def parts(self, output: Any) -> list[Any]:
        return [output] if self.container is None else list(output)

    def join(self, parts: Sequence[Any]) -> Any:
        return parts[0] if self.container is None else self.container(parts)


@dataclass(frozen=True)
class Planned:
    """A call of a block. segment: calls of one list through which the same streams pass; "" where none is left out."""

    block: BlockId
    outputs: Outputs
    segment: str = ""


@dataclass(frozen=True)
class Layout:
    """The calls of blocks in one forward pass, in their order. The first `head` and those from `tail` on always run;
    `final`: of each segment, the position of its last call between them. `stays`: segments whose first inputs, and ""
    where the first block's input, nobody has changed in place. `inside`: segments that begin inside of another one, of
    which lanes that reuse hold nothing: what these add counts from the output of the first `head` calls on."""

    calls: tuple[Planned, ...]
    head: int
    tail: int
    final: Mapping[str, int]
    stays: frozenset[str]
    inside: frozenset[str]


def find_lists(transformer: nn.Module, names: Sequence[str], given: bool) -> dict[str, nn.ModuleList]:
    """Lists of blocks by name. given: the user named them, so each has to be there."""
    found: dict[str, nn.ModuleList] = {}
    if not given:  # in the order of the network's own
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
    own = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in own if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def named(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, those given by position first."""
    names = _parameters(type(module))
    by_position = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
    return {**by_position, **kwargs}


def split(arguments: Mapping[str, Any], count: int) -> tuple[list[Any], dict[str, Any]]:
    """The first `count` by position again, the others by name."""
    values = list(arguments.values())
    return values[:count], dict(list(arguments.items())[count:])


def argument(arguments: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of `names` that is among the arguments, None where none is."""
    return next((arguments[name] for name in names if arguments.get(name) is not None), None)


def has_time(transformer: nn.Module) -> bool:
    return any(name in _parameters(type(transformer)) for name in TIME)


def outputs_of(output: Any, arguments: Mapping[str, Any], family: Family, B: int) -> Outputs:
    """Each output is the next value of an argument of its shape. ValueError for an output that is nothing's next value.

    Of several arguments, those that are no streams by their names, such as embeddings of time and place and long skips,
    are left aside. A single output is then the first of them, hidden states before others; several outputs, which may
    come in any order, go to the nearest.
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
            raise ValueError(f"it returns {_described(part)}, the next value of none of its arguments")
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
