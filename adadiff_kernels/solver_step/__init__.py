"""One solver step with guidance and noise: formula in reference.py, GPU kernel in kernel.py."""

from functools import wraps

from torch import Tensor

from adadiff_kernels import dispatch
from adadiff_kernels.dispatch import Backend
from adadiff_kernels.extension import traced
from adadiff_kernels.launch import on_device_of
from adadiff_kernels.library import register
from adadiff_kernels.solver_step.reference import (
    COLUMNS,
    HISTORY,
    Guidance,
    Noise,
    SolverState,
    StepRows,
    check_step,
    guide,
    solver_step_pytorch,
    solver_step_reference,
)


def _run(
    state: SolverState,
    eps: Tensor,
    rows: StepRows,
    slots: Tensor | None = None,
    z: Tensor | None = None,
    variance: Tensor | None = None,
    *,
    guidance: Guidance | None = None,
    noise: Noise | None = None,
    backend: Backend | None = None,
) -> None:
    """Advances samples by one solver step, in place: all of the state, or those at slots: int64 [n], all different.

    eps (the network's prediction), z, variance: [n, ...] in the order of slots; eps and variance of any floating dtype.
    z: float32 noise, needed where rows.noise is true unless `noise` says how to draw it; zeros for samples whose noise
    coefficient is 0. With `guidance`, eps is first combined with the unconditional prediction.
    Raises ValueError for a state that is not float32, shapes that do not fit, missing noise, or a state without the
    base or history that the rows need.
    """
    given = (state, eps, rows, slots, z, variance, guidance, noise)
    check_step(*given)
    if dispatch.choose(backend, state.x, core=False) == "triton":
        from adadiff_kernels.solver_step.kernel import launch_solver_step

        with on_device_of(state.x):
            launch_solver_step(*given)
    else:
        solver_step_pytorch(*given)


def _unflatten(
    x: Tensor, base: Tensor | None, history: Tensor | None, eps: Tensor, *flat: Tensor | bool | int | str | None
) -> tuple:
    """The arguments of `solver_step` in order, with the backend last."""
    rows, (slots, z, variance), guidance, noise, backend = flat[:7], flat[7:10], flat[10:14], flat[14:17], flat[17]
    return (
        *(SolverState(x, base, history), eps, StepRows(*rows), slots, z, variance),
        *(
            None if first is None else kind(first, *rest)
            for kind, (first, *rest) in ((Guidance, guidance), (Noise, noise))
        ),
        backend,
    )


def _run_flat(*flat: Tensor | bool | int | str | None) -> None:
    *given, guidance, noise, backend = _unflatten(*flat)
    _run(*given, guidance=guidance, noise=noise, backend=backend)


_OPERATOR = register(
    "solver_step(Tensor(a!) x, Tensor(b!)? base, Tensor(c!)? history, Tensor eps, "
    "Tensor coefficients, Tensor push, Tensor end, bool data, int reach, bool inner, bool adds_noise, "
    "Tensor? slots, Tensor? z, Tensor? variance, Tensor? uncond, Tensor? uncond_row, Tensor? weight, Tensor? channels, "
    "Tensor? seeds, Tensor? step, SymInt stream, str? backend) -> ()",
    _run_flat,
    lambda *flat: check_step(*_unflatten(*flat)[:-1]),
)


@wraps(_run)
def solver_step(
    state: SolverState,
    eps: Tensor,
    rows: StepRows,
    slots: Tensor | None = None,
    z: Tensor | None = None,
    variance: Tensor | None = None,
    *,
    guidance: Guidance | None = None,
    noise: Noise | None = None,
    backend: Backend | None = None,
) -> None:
    if not traced(eps):
        return _run(state, eps, rows, slots, z, variance, guidance=guidance, noise=noise, backend=backend)
    return _OPERATOR(
        *(state.x, state.base, state.history, eps),
        *(rows.coefficients, rows.push, rows.end, rows.data, rows.history, rows.inner, rows.noise),
        *(slots, z, variance),
        *((None,) * 4 if guidance is None else (guidance.uncond, guidance.row, guidance.weight, guidance.channels)),
        *((None, None, 0) if noise is None else (noise.seeds, noise.step, noise.stream)),
        backend,
    )


__all__ = [
    "COLUMNS",
    "HISTORY",
    "Guidance",
    "Noise",
    "SolverState",
    "StepRows",
    "guide",
    "solver_step",
    "solver_step_reference",
]
