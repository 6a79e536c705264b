"""Solvers as tables of coefficients: row i takes evaluation i of a run to evaluation i + 1 (see solver_step).

With a = alpha_bar at the evaluation and a' where its step lands: alpha = sqrt(a), sigma = sqrt(1 - a). All in
float64, rounded once by `pack`, which also lets samples with different solvers, step counts and step indices
share one gather.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from adadiff_kernels import COLUMNS, SolverState, StepRows, upload

from .schedules import NoiseSchedule

NOT_STORED = 2


@dataclass(frozen=True)
class SolverTable:
    """t: float64[steps], the times the network sees; coefficients: float64[steps, 8] in the order of COLUMNS;
    slot: int64[steps] in {0, 1, 2 (m is not stored)}; end: bool[steps], the row completes its step."""

    t: Tensor
    coefficients: Tensor
    slot: Tensor
    end: Tensor

    @property
    def steps(self) -> int:
        return len(self.t)


class Solver(Protocol):
    """A frozen dataclass of settings. `table` raises ValueError for steps or a spacing it has not."""

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable: ...


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling with the posterior variance ("fixed_small"; Ho et al. 2020, equation 7).

    `spread` = ln(beta / variance) / 2 makes it a learned range (Nichol and Dhariwal 2021, equation 15).
    Default spacing: "trailing", so that the first evaluation is at the noisiest timestep, where x_T is pure
    noise ("leading" would start up to 1000/steps below it); "uniform" for vp.
    """

    spacing: str | None = None

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        t, a, after = _grid(schedule, steps, self.spacing, "trailing")
        beta = 1 - a / after
        posterior = beta * (1 - after) / (1 - a)
        spread = 0.5 * torch.log((1 - a) / (1 - after))
        return _table(
            t,
            base=(after / a).sqrt(),
            cur=-beta * (after / a).sqrt() / (1 - a).sqrt(),
            noise=posterior.sqrt(),
            spread=spread.where(after < 1, 0),
        )


@dataclass(frozen=True)
class DDIM:
    """Song et al. 2021, equations 12 and 16: eta = 0 is deterministic, eta = 1 has the variance of DDPM.

    Default spacing: "trailing", for the reason given at DDPM; "uniform" for vp. ValueError for another eta.
    """

    eta: float = 0.0
    spacing: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        t, a, after = _grid(schedule, steps, self.spacing, "trailing")
        share = (1 - a / after) / (1 - a)  # of 1 - a', that eta = 1 replaces by fresh noise
        direction = ((1 - after) * (1 - self.eta**2 * share)).sqrt()
        return _table(
            t,
            base=(after / a).sqrt(),
            cur=direction - (after * (1 - a) / a).sqrt(),
            noise=self.eta * ((1 - after) * share).sqrt(),
        )


@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); first and last row are first-order, as in
    diffusers' DPMSolverMultistepScheduler with a final sigma of zero.

    Default spacing: "linspace", that scheduler's own, from the noisiest timestep too; "uniform" for vp.
    """

    spacing: str | None = None

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable:
        t, a, after = _grid(schedule, steps, self.spacing, "linspace")
        alpha, sigma, alpha_after, sigma_after = a.sqrt(), (1 - a).sqrt(), after.sqrt(), (1 - after).sqrt()
        lam = torch.log(alpha / sigma)
        h = lam[1:] - lam[:-1]
        # -alpha' (exp(-h) - 1), which is 1 on the last row, where sigma' is 0 and h infinite
        first = alpha_after - alpha * sigma_after / sigma
        second = torch.zeros(steps, dtype=torch.float64)
        second[1:-1] = first[1:-1] * h[1:] / (2 * h[:-1])  # first / (2 r0)
        row = torch.arange(steps)
        previous = -second
        return _table(
            t,
            px=1 / alpha,
            pe=-sigma / alpha,
            base=sigma_after / sigma,
            m0=previous.where(row % 2 == 1, 0),
            m1=previous.where(row % 2 == 0, 0),
            cur=first + second,
            slot=(row % 2).where(row < steps - 2, NOT_STORED),
        )


SOLVERS: dict[str, Callable[..., Solver]] = {"ddpm": DDPM, "ddim": DDIM, "dpm++2m": DPMSolverPP2M}


def solver_from(text: str) -> Solver:
    """The solver named "ddpm", "ddim", "ddim:0.5" (its eta) or "dpm++2m". ValueError for anything else."""
    name, colon, setting = text.partition(":")
    if name not in SOLVERS:
        raise ValueError(f"no solver {text!r}; there are {', '.join(SOLVERS)} and ddim:ETA")
    if not colon:
        return SOLVERS[name]()
    if name != "ddim":
        raise ValueError(f"solver {name!r} takes no setting, got {text!r}")
    try:
        eta = float(setting)
    except ValueError:
        raise ValueError(f"eta must be a number in [0, 1], got {text!r}") from None
    return DDIM(eta)


@dataclass(frozen=True)
class PackedTables:
    """Tables one below the other in float32, on one device; t and first, steps: int64[tables] stay on the CPU.

    needs: bool[rows, 4] on the CPU: m is not eps, the row touches history, does not end its step, adds noise.
    """

    t: Tensor
    coefficients: Tensor
    slot: Tensor
    end: Tensor
    first: Tensor
    steps: Tensor
    needs: Tensor

    def start(self, x: Tensor) -> SolverState:
        """A solver state that begins at x: [n, ...], with the memory that these tables need."""
        _, history, inner, _ = self.needs.any(0).tolist()
        return SolverState.start(x, base=inner, history=history)

    def widen(self, state: SolverState) -> SolverState:
        """`state`, with base and history added where these tables need them and no earlier ones did."""
        _, history, inner, _ = self.needs.any(0).tolist()
        if (state.base is not None or not inner) and (state.history is not None or not history):
            return state
        fresh = SolverState.start(state.x, inner and state.base is None, history and state.history is None)
        return SolverState(
            state.x,
            fresh.base if state.base is None else state.base,
            fresh.history if state.history is None else state.history,
        )

    def rows(self, table: Tensor, step: Tensor) -> tuple[Tensor, StepRows]:
        """Times float32[n], on the CPU, and rows of n samples: row step[i] of table[i]. table, step: int64[n], CPU.

        ValueError where there is no such table or step.
        """
        if table.shape != step.shape or table.dim() != 1:
            raise ValueError(f"table and step must be [n], got {list(table.shape)} and {list(step.shape)}")
        if not bool(((table >= 0) & (table < len(self.first))).all()):
            raise ValueError(f"table must lie in [0, {len(self.first)}), got {table.tolist()}")
        if not bool(((step >= 0) & (step < self.steps[table])).all()):
            raise ValueError(f"step must lie in [0, {self.steps[table].tolist()}), got {step.tolist()}")
        index = self.first[table] + step
        data, history, inner, noise = self.needs[index].any(0).tolist()
        own = upload(index, self.coefficients.device)
        return self.t[index], StepRows(
            self.coefficients[own], self.slot[own], self.end[own], data, history, inner, noise
        )


def pack(tables: Sequence[SolverTable], device: torch.device | str = "cpu") -> PackedTables:
    """Put tables together for gathering; table k of the result is tables[k]. ValueError if there is none."""
    if not tables:
        raise ValueError("pack needs at least one table")
    coefficients = torch.cat([table.coefficients for table in tables])
    slot, end = torch.cat([table.slot for table in tables]), torch.cat([table.end for table in tables])
    px, pe, _, m0, m1, _, noise, _ = coefficients.unbind(1)
    steps = torch.tensor([table.steps for table in tables])
    return PackedTables(
        t=torch.cat([table.t for table in tables]).float(),
        coefficients=coefficients.float().to(device),
        slot=slot.to(device),
        end=end.to(device),
        first=steps.cumsum(0) - steps,
        steps=steps,
        needs=torch.stack([(px != 0) | (pe != 1), (m0 != 0) | (m1 != 0) | (slot != NOT_STORED), ~end, noise != 0], 1),
    )


class TableSet:
    """The tables that samples in flight share, one for each solver, number of steps and step to begin at."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu"):
        self._schedule, self._device = schedule, device
        self._tables: dict[tuple[Solver, int, int], SolverTable] = {}
        self.packed: PackedTables | None = None

    def __len__(self) -> int:
        return len(self._tables)

    def add(self, solver: Solver, steps: Tensor, first: Tensor | None = None) -> Tensor:
        """steps, first: int64[n], of each sample how many there are and the one it begins at (default 0). Returns the
        index of its table, int64[n]; those that are new are made."""
        first = torch.zeros_like(steps) if first is None else first
        keys = [(solver, *pair) for pair in zip(steps.tolist(), first.tolist(), strict=True)]
        new = {key: _begin(solver.table(self._schedule, key[1]), key[2]) for key in keys if key not in self._tables}
        if new:
            self._tables.update(new)
            self._pack()
        index = {key: i for i, key in enumerate(self._tables)}
        return torch.tensor([index[key] for key in keys], dtype=torch.int64)

    def keep(self, used: Tensor) -> Tensor:
        """Forgets all but the tables used: int64[n]. Returns their new indices, int64[n]."""
        kept, index = used.unique(return_inverse=True)
        items = list(self._tables.items())
        self._tables = dict(items[i] for i in kept.tolist())
        self._pack()
        return index

    def alpha_bar(self, table: Tensor, step: Tensor) -> Tensor:
        """float64[n]: that of evaluation step[i] of table[i]. table, step: int64[n]."""
        tables = list(self._tables.values())
        t = torch.stack([tables[i].t[k] for i, k in zip(table.tolist(), step.tolist(), strict=True)])
        return self._schedule.alpha_bar(t)

    def _pack(self) -> None:
        self.packed = pack(list(self._tables.values()), self._device) if self._tables else None


def _begin(table: SolverTable, first: int) -> SolverTable:
    """`table` for samples that begin at row `first`: there is no history yet, so m takes its place. The first step of a
    multistep solver is then of first order, as in diffusers."""
    coefficients, (m0, m1, cur) = table.coefficients.clone(), map(COLUMNS.index, ("m0", "m1", "cur"))
    coefficients[first, cur] += coefficients[first, m0] + coefficients[first, m1]
    coefficients[first, [m0, m1]] = 0
    return replace(table, coefficients=coefficients)


def _grid(schedule: NoiseSchedule, steps: int, spacing: str | None, default: str) -> tuple[Tensor, Tensor, Tensor]:
    """Net time, alpha_bar and the alpha_bar that follows, float64[steps] each."""
    if spacing is None:
        spacing = default if default in schedule.spacings else "uniform"
    t, alpha_bar = schedule.grid(steps, spacing)
    return t, alpha_bar[:-1], alpha_bar[1:]


def _table(t: Tensor, slot: Tensor | None = None, **columns: Tensor) -> SolverTable:
    """Columns not given are 0, px and pe together mean m = eps; no slot means that nothing is stored."""
    if "pe" not in columns:
        columns["pe"] = torch.ones_like(t)
    rows = torch.stack([columns.get(name, torch.zeros_like(t)) for name in COLUMNS], 1)
    if slot is None:
        slot = torch.full_like(t, NOT_STORED, dtype=torch.int64)
    return SolverTable(t, rows, slot, torch.ones_like(t, dtype=torch.bool))
