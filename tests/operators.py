"""Calls of every operator, and arguments for n of B rows, for tests of graphs that hold them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adadiff_kernels import (
    Guidance,
    Noise,
    Norm,
    Score,
    SolverState,
    StepRows,
    extension,
    join_skip,
    residual_uem,
    settle_rows,
    solver_step,
)
from adadiff_kernels.launch import triton_missing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B = 7
Results = tuple[Tensor | None, ...]
Case = tuple[Callable[..., Results], tuple]  # a function and what to call it with


def serves(backend: str) -> str:
    """The same name, where there is what it names."""
    if backend == "triton" and triton_missing() is not None:
        pytest.skip("Triton is not installed")
    if backend == "cpu" and (extension.core is None or DEVICE != "cpu"):
        pytest.skip("for tensors of the CPU, where the extension is built")
    return backend


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def some_lanes(n: int) -> Tensor:
    return torch.randperm(B, device=DEVICE)[:n].int()


class Step:
    """n of B samples of 4 x 1 x 3 take a step with everything that it may have."""

    def __init__(self, n: int):
        one = (4, 1, 3)
        self.state = (normal(B, *one), normal(B, *one), normal(B, 3, *one))
        self.slots = some_lanes(n).long()
        kinds = torch.arange(n, device=DEVICE) % 3
        self.rows = (normal(n, 9), kinds < 2, kinds > 0, True, 3, True, True)
        self.guidance = (normal(3, *one), kinds - 1, normal(n), kinds + 1)
        self.noise = (self.slots * 2**40, kinds + 5, 2**32 - 1)
        self.eps, self.variance = normal(n, *one), normal(n, *one)

    def flat(self, backend: str) -> tuple:
        return (
            *(*self.state, self.eps, *self.rows, self.slots, None, self.variance),
            *(*self.guidance, *self.noise, backend),
        )


def fused_pass(n: int, backend: str | None, P: int = 1) -> Case:
    def call(x: Tensor, branch: Tensor, lanes: Tensor, gate: Tensor, score: tuple, norm: tuple) -> Results:
        score, norm = Score(*score), Norm(*norm)
        own = branch @ branch.mT @ branch  # ours to overwrite
        _, h, u = residual_uem(x, own, row_to_lane=lanes, gate=gate, score=score, norm=norm, out=own, backend=backend)
        y, _, same = residual_uem(x.relu(), branch, row_to_lane=lanes, score=score, backend=backend)
        norms = torch.empty_like(x)
        given = {"norm": norm, "out": x, "norm_out": norms}
        residual_uem(x, branch, row_to_lane=lanes, **given, backend=backend)
        return own, h, u, y, same, x, norms

    score, norm = (normal(P, 8) / 8, normal(B, P), 1), (1e-6, None, None, normal(B, 8), normal(B, 8))
    return call, (normal(n, 3, 8), normal(n, 3, 8), some_lanes(n), normal(B, 8), score, norm)


def skips(n: int, backend: str | None) -> Case:
    def call(x: Tensor, skip: Tensor, lanes: Tensor, index: Tensor) -> Results:
        return join_skip(x.relu(), skip, lanes, index, backend=backend), join_skip(x, skip, backend=backend)

    return call, (normal(n, 3, 4), normal(B, 3, 4), some_lanes(n), torch.randperm(B, device=DEVICE).int())


def settles(n: int, backend: str | None) -> Case:
    def call(moves: Tensor, rows: Tensor, saved: Tensor) -> Results:
        own, beside = rows.relu(), rows.exp()
        settle_rows(moves, own, saved, backend=backend)
        settle_rows(moves, own, saved, beside, backend=backend)
        return own, saved, beside

    moves = torch.tensor(
        [[0, 5, n - 1 if n > 2 else -1], [1, 2, -1], *([[-1] * 3] * (n - 2))], dtype=torch.int32, device=DEVICE
    )
    return call, (moves[:n], normal(n, 3, 4), normal(B, 3, 4))


def steps(n: int, backend: str | None) -> Case:
    def call(
        state: tuple, eps: Tensor, rows: tuple, slots: Tensor, v: Tensor, guidance: tuple, noise: tuple
    ) -> Results:
        parts = {"guidance": Guidance(*guidance), "noise": Noise(*noise)}
        solver_step(SolverState(*state), eps.relu(), StepRows(*rows), slots, None, v, **parts, backend=backend)
        return state

    p = Step(n)
    return call, (p.state, p.eps, p.rows, p.slots, p.variance, p.guidance, p.noise)


CASES = [fused_pass, skips, settles, steps]
