"""Compares every kernel once with its reference, at sizes that fill no tile; small enough for compute-sanitizer.

python3 -m benchmarks.gpu.small           on the CUDA device, with or without the compiled extension
python3 -m benchmarks.gpu.small --dry     on the CPU, kernels interpreted
"""

import argparse
import os

import torch
from torch import Tensor

from adadiff_kernels import (
    COLUMNS,
    DeviceSet,
    Guidance,
    Noise,
    Norm,
    Score,
    SolverState,
    StepRows,
    join_skip,
    residual_uem,
    settle_rows,
    solver_step,
)
from benchmarks.gpu.session import device_or_exit


def run(device: torch.device) -> list[str]:
    """Names of the kernels that ran. Raises RuntimeError if a kernel and its reference differ."""
    torch.manual_seed(0)
    checks = {"residual_uem": fused, "join_skip": join, "settle_rows": settle, "solver_step": step}
    checks["DeviceSet"] = exits
    for check in checks.values():
        check(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return list(checks)


def agree(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    if not torch.allclose(got.float(), want.float(), rtol=tolerance, atol=tolerance):
        raise RuntimeError(f"{name} differs from its reference by {(got.float() - want.float()).abs().max():.2e}")


def fused(device: torch.device) -> None:
    n, T, D, B = 3, 35, 72, 5
    lanes = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        x, branch = (torch.randn(n, T, D, device=device).to(dtype) for _ in range(2))
        gate, scale, shift = torch.randn(3, B, D, device=device).to(dtype).unbind()
        bias = torch.randn(D, device=device).to(dtype)
        for P, norm in ((1, Norm(1e-5, bias + 1, bias)), (12, Norm(1e-6, None, None, scale, shift)), (1, None)):
            tickets = torch.zeros(B, dtype=torch.int32, device=device)
            score = Score(torch.randn(P, D, device=device) / 8, torch.randn(B, P, device=device), 2, tickets)
            given = {"row_to_lane": lanes, "gate": gate, "bias": bias, "score": score, "norm": norm}
            got, want = (residual_uem(x, branch, **given, backend=backend) for backend in ("triton", "reference"))
            for part, one, other in zip("yhu", got, want, strict=True):
                if one is not None:
                    agree(f"residual_uem, {part}, P = {P}", one, other, tolerance)
            agree("tickets", tickets, torch.zeros_like(tickets), 0)


def join(device: torch.device) -> None:
    x, skip = torch.randn(3, 19, 40, device=device), torch.randn(6, 19, 40, device=device)
    lanes = torch.tensor([2, 0, 3], dtype=torch.int32, device=device)
    index = torch.tensor([5, 1, 3, 0], dtype=torch.int32, device=device)
    got, want = (join_skip(x, skip, lanes, index, backend=backend) for backend in ("triton", "reference"))
    agree("join_skip", got, want, 0)


def settle(device: torch.device) -> None:
    moves = torch.tensor([[0, 2, 3], [2, 5, -1], [-1, -1, -1]], dtype=torch.int32, device=device)
    rows, saved = torch.randn(4, 5, 1260, device=device), torch.randn(6, 5, 1260, device=device)
    others = rows.clone(), saved.clone()
    settle_rows(moves, rows, saved, backend="triton")
    settle_rows(moves, *others, backend="reference")
    for name, one, other in zip(("rows", "saved"), (rows, saved), others, strict=True):
        agree(f"settle_rows, {name}", one, other, 0)


def step(device: torch.device) -> None:
    n, C, E = 4, 2, 515
    whole = torch.arange(n, device=device)
    x, base, eps, variance = torch.randn(4, n, C, E, device=device).unbind()
    history, coefficients = torch.randn(n, 3, C, E, device=device), torch.randn(n, len(COLUMNS), device=device)
    rows = StepRows(coefficients, whole % 3 > 0, whole % 2 == 0)
    uncond, row = torch.randn(2, C, E, device=device), torch.tensor([1, -1, 0, -1], device=device)
    guidance = Guidance(uncond, row, whole.float(), whole % C + 1)
    states = [SolverState(x.clone(), base.clone(), history.clone()) for _ in range(2)]
    noise = Noise(whole + 7, whole * 3, 1)
    for state, backend in zip(states, ("triton", "reference"), strict=True):
        solver_step(state, eps, rows, variance=variance, guidance=guidance, noise=noise, backend=backend)
    agree("solver_step", states[0].x, states[1].x, 1e-4)


def exits(device: torch.device) -> None:
    """Tests DeviceSet, with the compiled kernel if it was built."""
    B = 77
    threshold = torch.full((B,), 0.5, device=device)
    own, want = DeviceSet(B, device), DeviceSet(B, device, backend="reference")
    for layer in (1, 2, 3):
        u = torch.rand(B, device=device)
        u[5] = torch.nan
        snapshots = [torch.empty_like(own.lane_to_row) for _ in range(2)]
        moves = [
            active.exit_rows(u, threshold, layer, bound=B, snapshot=snapshot)
            for active, snapshot in zip((own, want), snapshots, strict=True)
        ]
        counts = [active.wait(layer) for active in (own, want)]
        for name, one, other in (
            ("moves", *moves),
            ("snapshot", *snapshots),
            ("count", *(torch.tensor(count) for count in counts)),
            ("row_to_lane", own.row_to_lane, want.row_to_lane),
            ("lane_to_row", own.lane_to_row, want.lane_to_row),
            ("exit layer", own.exit_layer, want.exit_layer),
        ):
            agree(f"DeviceSet, {name} after layer {layer}", one, other, 0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    if parser.parse_args(argv).dry:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, which is later
        device = torch.device("cpu")
    else:
        device = device_or_exit("benchmarks.gpu.small")
    print("ran:", ", ".join(run(device)))


if __name__ == "__main__":
    main()
