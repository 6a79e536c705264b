"""Compares our solvers with their authors' code, from the same noise, and writes a table.

    python -m benchmarks.studies.solver_parity --reference U-ViT --dit DiT [--out FILE]

U-ViT and DiT are clones of github.com/baofff/U-ViT and github.com/facebookresearch/DiT, which stay outside this
repository. The network is a nonlinear function with a learned variance. float64: their code and our tables both in
float64, limit 1e-10; float32: both as they are used, limit 1e-4. Numbers are the largest difference divided by the
largest value.
"""

import argparse
import importlib
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from adadiff.diffusion.noise import initial_noise, step_noise
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.diffusion.solvers import solver_from
from adadiff.diffusion.tables import pack
from adadiff_kernels import solver_step, solver_step_reference

SEEDS = torch.arange(4)
SHAPE = (4, 16, 16)
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4}
OUT = Path(__file__).parents[1] / "results" / "solver-parity.md"


@dataclass(frozen=True)
class Case:
    """theirs: (x, function that draws the noise of the next step) -> result."""

    whose: str
    what: str
    solver: str
    schedule: str
    steps: int
    theirs: Callable[[Tensor, Callable[[], Tensor]], Tensor]


def network(x: Tensor, t: Tensor) -> Tensor:
    t = torch.as_tensor(t).to(x.dtype).expand(len(x)).view(-1, 1, 1, 1)
    return torch.tanh(x) * (0.3 + 0.7 * t / 1000) + 0.1 * torch.sin(t / 50)


def variance(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x + torch.as_tensor(t).to(x.dtype).expand(len(x)).view(-1, 1, 1, 1) / 100)


def noises(dtype: torch.dtype) -> Iterator[Tensor]:
    for i in range(1000):
        yield step_noise(SEEDS, torch.full_like(SEEDS, i), SHAPE).to(dtype)


def ours(case: Case, dtype: torch.dtype) -> Tensor:
    table = solver_from(case.solver).table(NoiseSchedule(case.schedule), case.steps)
    packed, zero, noise = pack([table]), np.zeros(len(SEEDS), dtype=np.int64), noises(dtype)
    state = packed.start(initial_noise(SEEDS, SHAPE).to(dtype))
    for i in range(case.steps):
        t, rows = packed.rows(zero, zero + i)
        z = next(noise)
        if dtype == torch.float32:
            t = torch.from_numpy(t)
            solver_step(state, network(state.x, t), rows, z=z, variance=variance(state.x, t))
        else:
            t = table.t[i]
            rows = replace(rows, coefficients=table.coefficients[i].expand(len(zero), -1))
            state = solver_step_reference(state, network(state.x, t), rows, z, variance(state.x, t))
    return state.x


def from_u_vit() -> list[Case]:
    sys.modules.setdefault("absl", types.ModuleType("absl")).logging = logging  # sde.py logs through it
    sde, eps_form, x0_form = (importlib.import_module(m) for m in ("sde", "dpm_solver_pytorch", "dpm_solver_pp"))

    def euler_maruyama(x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        model = sde.ScoreModel(network, pred="noise_pred", sde=sde.VPSDE())
        with patch.object(torch, "randn_like", lambda _: draw()):
            return sde.euler_maruyama(sde.ReverseSDE(model), x, 1000)

    def fast(steps: int) -> Callable[..., Tensor]:
        def run(x: Tensor, _: object) -> Tensor:  # eval.py
            model = sde.ScoreModel(network, pred="noise_pred", sde=sde.VPSDE())
            schedule = eps_form.NoiseScheduleVP(schedule="linear")
            call = eps_form.model_wrapper(model.noise_pred, schedule, time_input_type="0", model_kwargs={})
            solver = eps_form.DPM_Solver(call, schedule)
            return solver.sample(x, steps=steps, eps=1e-4, adaptive_step_size=False, fast_version=True)

        return run

    def plus_plus_fast(steps: int) -> Callable[..., Tensor]:
        def run(x: Tensor, _: object) -> Tensor:  # eval_ldm_discrete.py
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            schedule = x0_form.NoiseScheduleVP(schedule="discrete", betas=betas.to(x.dtype))
            solver = x0_form.DPM_Solver(lambda x, t: network(x, t * 1000), schedule, predict_x0=True)
            return solver.sample(x, steps=steps, eps=1 / 1000, T=1.0)

        return run

    cases = [Case("U-ViT", "sde.euler_maruyama", "euler-maruyama", "vp", 1000, euler_maruyama)]
    for n in (20, 50):
        cases.append(Case("U-ViT", "dpm_solver_pytorch, fast", "dpm-fast", "vp", n, fast(n)))
        cases.append(Case("U-ViT", "dpm_solver_pp, fast", "dpm++fast", "stable_diffusion", n, plus_plus_fast(n)))
    return cases


def from_dit() -> list[Case]:
    diffusion = importlib.import_module("diffusion")
    inner = importlib.import_module("diffusion.gaussian_diffusion")

    def in_double(table: object, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(table)[t].view(-1, *[1] * (len(shape) - 1)).expand(shape)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([network(x, t), variance(x, t)], 1)

    def loop(steps: int, eta: float | None) -> Callable[..., Tensor]:
        def run(x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
            process, settings = diffusion.create_diffusion(str(steps)), {"clip_denoised": False, "device": "cpu"}
            wanted = in_double if x.dtype == torch.float64 else inner._extract_into_tensor  # theirs rounds to float32
            with (
                patch.object(torch, "randn_like", lambda _: draw()),
                patch.object(inner, "_extract_into_tensor", wanted),
            ):
                if eta is None:
                    return process.p_sample_loop(model, x.shape, x, **settings)
                return process.ddim_sample_loop(model, x.shape, x, eta=eta, **settings)

        return run

    cases = [Case("DiT", "p_sample_loop", "ddpm:spacing=respaced", "linear", n, loop(n, None)) for n in (250, 50)]
    for eta in (0.0, 0.7):
        spelling = f"ddim:{eta},spacing=respaced"
        cases.append(Case("DiT", f"ddim_sample_loop, eta {eta}", spelling, "linear", 50, loop(50, eta)))
    return cases


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)  # their grids of timesteps have the default dtype
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def difference(case: Case, dtype: torch.dtype) -> float:
    noise = noises(dtype)
    with default_dtype(dtype), redirect_stdout(StringIO()):  # U-ViT prints
        theirs = case.theirs(initial_noise(SEEDS, SHAPE).to(dtype), lambda: next(noise))
    assert theirs.dtype == dtype
    return float((ours(case, dtype) - theirs).abs().max() / theirs.abs().max())


def commit(folder: Path) -> str:
    """The commit of a clone, or "a copy without history"."""
    asked = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip() or "a copy without history"


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--reference", type=Path, required=True, help="clone of U-ViT")
    asked.add_argument("--dit", type=Path, required=True, help="clone of DiT")
    asked.add_argument("--out", type=Path, default=OUT)
    options = asked.parse_args()
    for folder, file in ((options.reference, "sde.py"), (options.dit, "diffusion/respace.py")):
        if not (folder / file).is_file():
            asked.error(f"{folder} holds no {file}")
    sys.path[:0] = [str(folder.resolve()) for folder in (options.dit, options.reference)]
    lines = [
        "# Solvers against their authors' code",
        "",
        f"U-ViT {commit(options.reference)}, DiT {commit(options.dit)}, torch {torch.__version__}; written by "
        "`benchmarks/studies/solver_parity.py`, which explains the comparison and the errors.",
        "",
        "| code | function | ours | schedule | evaluations | float64 | float32 |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    failed = []
    for case in (*from_u_vit(), *from_dit()):
        found = {dtype: difference(case, dtype) for dtype in LIMITS}
        failed += [case for dtype, limit in LIMITS.items() if not found[dtype] <= limit]
        numbers = " | ".join(f"{found[dtype]:.1e}" for dtype in LIMITS)
        lines.append(f"| {case.whose} | `{case.what}` | `{case.solver}` | {case.schedule} | {case.steps} | {numbers} |")
        print(lines[-1], flush=True)
    if failed:
        print(f"beyond its limit: {', '.join(f'{case.what} at {case.steps}' for case in failed)}", file=sys.stderr)
        return 1
    options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
