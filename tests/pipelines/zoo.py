"""Tiny transformers of diffusers with random weights, and inputs for them, lane by lane and step by step."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from adadiff.pipelines.families import family_of
from pipelines.images import IMAGES
from pipelines.specs import ByCount, ByLane, Lane, Listed, Table, Time
from pipelines.videos import VIDEOS

CASES = {**IMAGES, **VIDEOS}


def kind_of(name: str) -> type[nn.Module]:
    return getattr(diffusers, CASES[name].kind or name)


@cache
def network(name: str) -> nn.Module:
    """Its weights are random, and none is zero: many blocks start as the identity."""
    torch.manual_seed(len(name))
    made = kind_of(name)(**CASES[name].config)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for value in made.parameters():
            scale = 0.08 if value.ndim < 2 else 0.7 / max(1, value.numel() // max(1, len(value))) ** 0.5
            noise = torch.randn(value.shape, generator=generator) * scale
            value.copy_(value + noise if value.ndim < 2 else noise)
    return made.eval().requires_grad_(False)


def _normal(shape: Sequence[int], *key: Any) -> Tensor:
    """The same for the same key."""
    seed = 0
    for part in "/".join(map(str, key)).encode():
        seed = (seed * 131 + part) % 2**31
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _of_lane(shape: Sequence[int], moves: bool, lane: int, step: int, name: str) -> Tensor:
    value = _normal(shape, name, lane)
    if not moves:
        return value
    # lanes move at paces of their own, from hardly to fast
    return value + step * (0.02 + 0.3 * (lane % 3)) * _normal(shape, name, lane, "pace")


def inputs(name: str, lanes: Sequence[int], step: int = 0, steps: int = 8) -> dict[str, Any]:
    """Arguments of a call for some lanes: a lane's own do not depend on the others."""
    case, B, made = CASES[name], len(lanes), dict[str, Any]()
    rising = family_of(network(name)).rising
    for key, spec in case.inputs.items():
        if isinstance(spec, Lane):
            parts = [_of_lane(spec.shape, spec.moves, lane, step, key) for lane in lanes]
            made[key] = torch.stack(parts)
            if case.extra.get("stack", ("",))[0] == key:  # by layer, then by lane
                made[key] = torch.stack([made[key] * (1 + i) for i in range(case.extra["stack"][1])])
        elif isinstance(spec, Table):
            made[key] = _normal(spec.shape, key)
        elif isinstance(spec, Time):
            share = [(step + 1 if rising else steps - step) / (steps + 1) + 0.003 * lane for lane in lanes]
            time = torch.tensor(share) * spec.unit
            made[key] = time.reshape(B, *[1 for _ in spec.shape]).expand(B, *spec.shape).contiguous()
        elif isinstance(spec, Listed) and spec.layers:
            made[key] = [torch.stack([_normal(spec.shape, key, i, lane) for lane in lanes]) for i in range(spec.layers)]
        elif isinstance(spec, Listed):
            made[key] = [_of_lane(spec.shape, spec.moves, lane, step, key) for lane in lanes]
        elif isinstance(spec, ByLane):
            made[key] = torch.stack([torch.as_tensor(spec.make(lane)) for lane in lanes])
        else:
            made[key] = spec.make(B) if isinstance(spec, ByCount) else spec
    return made


def parts_of(output: Any) -> list[Tensor]:
    """Tensors by lane of what a transformer returns with return_dict=False; of lists, one for each lane."""
    found = []
    for part in output if isinstance(output, tuple) else (output,):
        if isinstance(part, list):
            part = torch.stack(part)
        if isinstance(part, Tensor):
            found.append(part)
    return found


def call(name: str, lanes: Sequence[int], step: int = 0, module: nn.Module | None = None, **more: Any) -> list[Tensor]:
    given = inputs(name, lanes, step)
    with torch.no_grad():
        return parts_of((network(name) if module is None else module)(**given, return_dict=False, **more))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """What is floating point in it, as another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: cast(one, dtype) for key, one in value.items()}
    return [cast(one, dtype) for one in value] if isinstance(value, list) else value


def call_in(dtype: torch.dtype, name: str, lanes: Sequence[int], step: int, module: nn.Module) -> list[Tensor]:
    """As `call`, of a network in another dtype."""
    with torch.no_grad():
        return parts_of(module(**cast(inputs(name, lanes, step), dtype), return_dict=False))
