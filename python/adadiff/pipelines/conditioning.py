"""The conditioning of each lane in the arguments of a transformer's call: texts, labels, control."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .lane_cache import Kept
from .runs import held

CONDITIONING = ("encoder_hidden", "text", "prompt", "cap", "label", "pooled", "class", "image_embeds")


def by_lane(value: Any, B: int) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == B
    return isinstance(value, list | tuple) and len(value) == B and all(isinstance(one, Tensor) for one in value)


def conditioning(arguments: Mapping[str, Any], B: int) -> list[Kept]:
    """The values that must be unchanged for a lane to reuse: its texts and labels, and whether there is any control."""
    named = [*arguments.items()]
    for value in arguments.values():
        if isinstance(value, Mapping):  # such as image-prompt adapters, with a tensor by lane each
            named += [(key, one) for key in value for one in _tensors(value[key])]
    found = [
        Kept.of(held(value))
        for name, value in named
        if any(part in name for part in CONDITIONING) and by_lane(value, B)
    ]
    for name, value in arguments.items():
        tensors = _tensors(value) if "control" in name else []
        if tensors:
            found.append(Kept.of(_acts(tensors, B)))
    return found


def _acts(tensors: list[Tensor], B: int) -> Tensor:
    """bool [B], on the device of the first: whether any value of a lane (of a shared tensor: any value) is not 0."""
    device = tensors[0].device
    acts = torch.zeros(B, dtype=torch.bool, device=device)
    for one in tensors:
        of_lanes = one.ndim > 0 and len(one) == B
        acts = acts | ((one != 0).reshape(B, -1).any(1) if of_lanes else (one != 0).any()).to(device)
    return acts


def alike(arguments: Mapping[str, Any], B: int) -> bool:
    """Whether all lanes have equal arguments, so that a leak between lanes could not be detected."""
    for value in arguments.values():
        if by_lane(value, B) and any(one.shape != value[0].shape for one in value):
            return False
        if by_lane(value, B) and not all(torch.equal(one, value[0]) for one in value[1:]):
            return False
    return True


def tracked(arguments: Mapping[str, Any]) -> bool:
    """Whether any tensor requires a gradient."""
    return any(one.requires_grad for value in arguments.values() for one in _tensors(value))


def broken_lanes(output: Any, B: int) -> Tensor:
    """bool [B], on the CPU: lanes with NaN in a transformer's output, as far as it is by lane."""
    broken = torch.zeros(B, dtype=torch.bool, device="cpu")
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    for part in parts:
        if isinstance(part, Tensor) and part.ndim and len(part) == B and part.is_floating_point():
            broken |= part.isnan().flatten(1).any(1).cpu() if part.ndim > 1 else part.isnan().cpu()
        elif isinstance(part, list) and len(part) == B and all(isinstance(one, Tensor) for one in part):
            nans = [bool(one.isnan().any()) for one in part]
            broken |= torch.tensor(nans, dtype=torch.bool, device="cpu")
    return broken


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [one for part in parts for one in _tensors(part)]
