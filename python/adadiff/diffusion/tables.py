"""Tables of solver coefficients: what a solver makes, and how samples with different tables share one gather.

Row i takes evaluation i of a run to evaluation i + 1 (see solver_step). All in float64, rounded once by `pack`.
"""

from collections.abc import Sequence
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

    @property
    def starts(self) -> Tensor:
        """bool[steps]: a step begins with the row, so that a sample may begin there, too."""
        return torch.cat([torch.ones(1, dtype=torch.bool), self.end[:-1]])


class Solver(Protocol):
    """A frozen dataclass of settings. `table` raises ValueError for steps or a spacing it has not."""

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable: ...


def make_table(t: Tensor, slot: Tensor | None = None, end: Tensor | None = None, **columns: Tensor) -> SolverTable:
    """Columns not given are 0, px and pe together mean m = eps; no slot means that nothing is stored, no end that
    every row completes its step."""
    if "pe" not in columns:
        columns["pe"] = torch.ones_like(t)
    rows = torch.stack([columns.get(name, torch.zeros_like(t)) for name in COLUMNS], 1)
    if slot is None:
        slot = torch.full_like(t, NOT_STORED, dtype=torch.int64)
    return SolverTable(t, rows, slot, torch.ones_like(t, dtype=torch.bool) if end is None else end)


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
        missing = dict.fromkeys(key for key in keys if key not in self._tables)
        new = {key: _begin(solver.table(self._schedule, key[1]), key[2]) for key in missing}
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
        return self._schedule.log_alpha_bar(t).exp()

    def _pack(self) -> None:
        self.packed = pack(list(self._tables.values()), self._device) if self._tables else None


def _begin(table: SolverTable, first: int) -> SolverTable:
    """`table` for samples that begin at row `first`: there is no history yet, so m takes its place. The first step of a
    multistep solver is then of first order, as in diffusers. ValueError for a row within a step."""
    if not table.starts[first]:
        raise ValueError(f"row {first} lies within a step; steps begin at {table.starts.nonzero().flatten().tolist()}")
    coefficients, (m0, m1, cur) = table.coefficients.clone(), map(COLUMNS.index, ("m0", "m1", "cur"))
    coefficients[first, cur] += coefficients[first, m0] + coefficients[first, m1]
    coefficients[first, [m0, m1]] = 0
    return replace(table, coefficients=coefficients)
