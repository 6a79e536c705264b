"""The noise of a sample: a function of its seed, its step index and its purpose (the stream), not of the batch."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from adadiff_kernels import philox_normal

INITIAL = 0  # initial noise
SOLVER_STEP = 1  # noise added by a stochastic solver
REFINEMENT = 2  # noise added to a student's image before a teacher refines it


def initial_noise(seeds: Tensor, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """seeds: int64[n] in [0, 2^63). Returns N(0, 1), float32[n, *shape], on `device` (default: as seeds)."""
    return _noise(seeds, torch.zeros_like(seeds), INITIAL, shape, device)


def refinement_noise(seeds: Tensor, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """As `initial_noise`, from another stream."""
    return _noise(seeds, torch.zeros_like(seeds), REFINEMENT, shape, device)


def step_noise(seeds: Tensor, step: Tensor, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """seeds: int64[n] in [0, 2^63); step: int64[n], each sample's step index. Returns N(0, 1), float32[n, *shape], on
    `device` (default: as seeds)."""
    return _noise(seeds, step, SOLVER_STEP, shape, device)


def _noise(seeds: Tensor, step: Tensor, stream: int, shape: Sequence[int], device: torch.device | str | None) -> Tensor:
    return philox_normal(seeds, step, stream, prod(shape), device).view(len(seeds), *shape)
