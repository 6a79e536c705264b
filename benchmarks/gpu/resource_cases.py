"""The cases that resources.py compiles: launchers, called with tensors without memory at shapes of real networks."""

from collections.abc import Callable
from typing import Any

import torch

FUSED = "_residual_uem_kernel"
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def fused(
    T: int, D: int, P: int, kind: str, x: torch.dtype, branch: torch.dtype | None = None, cached: bool = False
) -> None:
    """residual_uem for 64 rows. kind: the norm ("modulated" includes a gate), or "none". cached: half of the rows read
    a cached branch, and the others write theirs to the cache."""
    from adadiff_kernels.residual_uem import Cached, Norm, Score
    from adadiff_kernels.residual_uem.kernel import launch_residual_uem

    branch, n = branch or x, 64
    by_lane = tensor(n, 6 * D, dtype=branch)
    affine = (tensor(D, dtype=branch), tensor(D, dtype=branch))
    norm = {
        "none": None,
        "affine": Norm(1e-5, *affine),
        "modulated": Norm(1e-6, None, None, by_lane[:, :D], by_lane[:, D : 2 * D]),
    }[kind]
    index = tensor(n, dtype=torch.int32)
    launch_residual_uem(
        tensor(n, T, D, dtype=x),
        tensor(n // 2 if cached else n, T, D, dtype=branch),
        row_to_lane=index,
        gate=by_lane[:, 2 * D : 3 * D] if kind == "modulated" else None,
        bias=tensor(D, dtype=branch),
        score=Score(tensor(P, D), tensor(n, P), T % 256, tensor(n, dtype=torch.int32)) if P else None,
        norm=norm,
        cached=Cached(tensor(2 * n, T, D, dtype=branch), index, index) if cached else None,
    )


def joins(T: int, D: int, dtype: torch.dtype) -> None:
    from adadiff_kernels.join_skip.kernel import launch_join_skip

    rows, index = tensor(64, T, D, dtype=dtype), tensor(64, dtype=torch.int32)
    launch_join_skip(rows, rows, index, index)


def settles(T: int, D: int, dtype: torch.dtype, beside: bool = False) -> None:
    """settle_rows for 64 rows. beside: with their normalised rows."""
    from adadiff_kernels.settle_rows.kernel import launch_settle_rows

    rows = tensor(64, T, D, dtype=dtype)
    launch_settle_rows(tensor(64, 3, dtype=torch.int32), rows, rows, rows if beside else None)


def step(size: int, dtype: torch.dtype, everything: bool, channels: int = 4) -> None:
    """A solver step of 64 samples [channels, size, size]. everything: with guidance, noise and history; else DDIM."""
    from adadiff_kernels.solver_step import Guidance, Noise, SolverState, StepRows
    from adadiff_kernels.solver_step.kernel import launch_solver_step

    shape, whole = (64, channels, size, size), tensor(64, dtype=torch.int64)
    eps = tensor(*shape, dtype=dtype)
    flags = (everything, 3 * everything, everything, everything)  # data, history, inner, noise
    rows = StepRows(tensor(64, 9), tensor(64, dtype=torch.bool), tensor(64, dtype=torch.bool), *flags)
    if not everything:
        launch_solver_step(SolverState(tensor(*shape)), eps, rows)
        return
    state = SolverState(tensor(*shape), tensor(*shape), tensor(64, 3, *shape[1:]))
    guidance, noise = Guidance(eps, whole, tensor(64), whole), Noise(whole, whole, 1)
    launch_solver_step(state, eps, rows, whole, variance=eps, guidance=guidance, noise=noise)


# name -> kernel, launcher, its arguments
CASES: dict[str, tuple[str, Callable[..., None], tuple[Any, ...]]] = {
    "U-ViT-S/2, bf16": (FUSED, fused, (257, 512, 1, "affine", BRAIN)),
    "U-ViT-L/2, bf16": (FUSED, fused, (257, 1024, 1, "affine", BRAIN)),
    "U-ViT-L/2, bf16, no norm": (FUSED, fused, (257, 1024, 1, "none", BRAIN)),
    "U-ViT-L/2, bf16, no score": (FUSED, fused, (257, 1024, 0, "affine", BRAIN)),
    "U-ViT-L/2, bf16, map of 16": (FUSED, fused, (257, 1024, 16, "affine", BRAIN)),
    "U-ViT-H/2, mixed": (FUSED, fused, (258, 1152, 1, "affine", SINGLE, BRAIN)),
    "U-ViT-H/2, float32": (FUSED, fused, (258, 1152, 1, "affine", SINGLE)),
    "U-ViT-H/2, float32, map of 16": (FUSED, fused, (258, 1152, 16, "affine", SINGLE)),
    "DiT-XL/2, bf16": (FUSED, fused, (256, 1152, 1, "modulated", BRAIN)),
    "DiT-XL/2, fp16, map of 16": (FUSED, fused, (256, 1152, 16, "modulated", HALF)),
    "D = 1536, bf16, map of 64": (FUSED, fused, (334, 1536, 64, "affine", BRAIN)),
    "D = 1536, float32": (FUSED, fused, (334, 1536, 1, "modulated", SINGLE)),
    "T = 1024, bf16": (FUSED, fused, (1024, 512, 1, "none", BRAIN)),
    "U-ViT-S/2, bf16, cached": (FUSED, fused, (257, 512, 1, "affine", BRAIN, BRAIN, True)),
    "DiT-XL/2, bf16, cached": (FUSED, fused, (256, 1152, 1, "modulated", BRAIN, BRAIN, True)),
    "U-ViT-H/2, float32, cached": (FUSED, fused, (258, 1152, 1, "affine", SINGLE, SINGLE, True)),
    "settle, U-ViT-H/2, bf16": ("_settle_rows_kernel", settles, (258, 1152, BRAIN)),
    "settle, U-ViT-L/2, bf16": ("_settle_rows_kernel", settles, (257, 1024, BRAIN)),
    "settle, U-ViT-L/2, bf16, norms beside": ("_settle_rows_kernel", settles, (257, 1024, BRAIN, True)),
    "join, U-ViT-L/2, bf16": ("_join_skip_kernel", joins, (257, 1024, BRAIN)),
    "join, U-ViT-H/2, float32": ("_join_skip_kernel", joins, (258, 1152, SINGLE)),
    "step, 32x32 latents, everything": ("_solver_step_kernel", step, (32, BRAIN, True)),
    "step, 32x32 latents, DDIM": ("_solver_step_kernel", step, (32, SINGLE, False)),
}
# Triton compiles an argument of 1 as a constant, unlike its interpreter: these are different kernels.
ONES: dict[str, tuple[str, Callable[..., None], tuple[Any, ...]]] = {
    "one token, channel and output": (FUSED, fused, (1, 1, 1, "modulated", BRAIN)),
    "settle of one number": ("_settle_rows_kernel", settles, (1, 1, BRAIN)),
    "join of one number": ("_join_skip_kernel", joins, (1, 1, BRAIN)),
    "step of one number": ("_solver_step_kernel", step, (1, BRAIN, True, 1)),
}
