"""Calls of a diffusers pipeline with any kind of prompt; results as rows of numbers."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Prompt = str | int | Mapping[str, Any]


def check_prompts(prompts: Sequence[Prompt], least: int) -> None:
    """Raises ValueError unless there are `least` prompts or more, all of one kind."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts must be a list of texts, class labels or arguments of calls, got {prompts!r}")
    if len(prompts) < least:
        raise ValueError(f"half of the prompts choose, half measure: give at least {least}, got {len(prompts)}")
    for kind in (str, int, Mapping):
        if all(isinstance(prompt, kind) and not isinstance(prompt, bool) for prompt in prompts):
            return
    raise ValueError("prompts must be all texts, all class labels, or all arguments of calls")


def draw(pipe: Any, prompts: Sequence[Prompt], seeds: Sequence[int], call: Mapping[str, Any]) -> Tensor:
    """The latents or images of one call, float64 [n, F] on the CPU. prompts: texts, labels, or a single mapping of
    arguments. Raises ValueError for arguments that the pipeline does not take."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    first = prompts[0]
    asked: dict[str, Any]
    if isinstance(first, Mapping):
        asked = {**first, "generator": generators[0]}
    else:
        asked = {"prompt" if isinstance(first, str) else "class_labels": list(prompts), "generator": generators}
    takes = inspect.signature(pipe.__call__).parameters
    if unknown := [name for name in (*call, *asked) if name not in takes and not _takes_any(takes)]:
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(map(repr, unknown))}")
    if "output_type" in takes:
        asked = {"output_type": "pt" if _without_latents(pipe) else "latent", **call, **asked}
    return as_rows(pipe(**{**call, **asked}))


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def _without_latents(pipe: Any) -> bool:
    return type(pipe).__name__ == "DiTPipeline"  # it ignores output_type="latent"


def as_rows(output: Any) -> Tensor:
    """The output of a pipeline as float64 [n, F]."""
    for name in ("images", "frames", "sample"):
        if getattr(output, name, None) is not None:
            output = getattr(output, name)
            break
    else:
        output = output[0]
    if isinstance(output, list | tuple):
        output = torch.stack([one if isinstance(one, Tensor) else torch.from_numpy(np.array(one)) for one in output])
    values = output if isinstance(output, Tensor) else torch.from_numpy(np.asarray(output))
    return values.detach().cpu().double().flatten(1)
