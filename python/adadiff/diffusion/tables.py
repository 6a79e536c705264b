"""Tables of solver coefficients, packed so that samples with different solvers share one gather.

Row i goes from evaluation i of a run to evaluation i + 1 (see solver_step). All in float64, rounded once by `pack`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import COLUMNS, HISTORY, SolverState, StepRows, upload

from .prediction import conversion
from .schedules import NoiseSchedule

OLDER = slice(COLUMNS.index(HISTORY[0]), len(COLUMNS))  # columns of the history, newest first


@dataclass(frozen=True)
class SolverTable:
    """The coefficients of a run. t: float64[steps], the network's times; coefficients: float64[steps, 9] in the order
    of COLUMNS; push: bool[steps], m is pushed to the history; end: bool[steps], the row completes its (macro-)step.

    px and pe are for a network that predicts eps, with schedule "flow" for one that predicts the velocity; see
    `converted` for others."""

    t: Tensor
    coefficients: Tensor
    push: Tensor
    end: Tensor

    @property
    def steps(self) -> int:
        return len(self.t)

    @property
    def starts(self) -> Tensor:
        """bool[steps]: a (macro-)step begins with the row, so a sample may begin there."""
        return torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), self.end[:-1]])

    @property
    def reach(self) -> Tensor:
        """int64[steps]: the number of history entries that samples of this table use; 0 at rows that use none."""
        read = self.coefficients[:, OLDER] != 0
        deepest = max([k + 1 for k in range(len(HISTORY)) if bool(read[:, k].any())], default=int(self.push.any()))
        return (read.any(1) | self.push).long() * deepest


@runtime_checkable
class Solver(Protocol):
    """A frozen dataclass of settings. `table` raises ValueError for unsupported steps, spacings and schedules."""

    def table(self, schedule: NoiseSchedule, steps: int) -> SolverTable: ...


@runtime_checkable
class StartingSolver(Solver, Protocol):
    """A solver whose rows depend on where a sample begins, as its order rises from there."""

    def table_from(self, schedule: NoiseSchedule, steps: int, first: int) -> SolverTable:
        """The table for samples that begin at row `first`; rows before it are not used."""


def make_table(t: Tensor, push: Tensor | None = None, end: Tensor | None = None, **columns: Tensor) -> SolverTable:
    """A table from its columns; missing ones are 0, except pe, which is 1 (m = eps). push: default no row; end: default
    every row."""
    if "pe" not in columns:
        columns["pe"] = torch.ones_like(t)
    rows = torch.stack([columns.get(name, torch.zeros_like(t)) for name in COLUMNS], 1)
    if push is None:
        push = torch.zeros_like(t, dtype=torch.bool)
    return SolverTable(t, rows, push, torch.ones_like(t, dtype=torch.bool) if end is None else end)


@dataclass(frozen=True)
class PackedTables:
    """Concatenated tables on one device: coefficients float32 [rows, 9]; flags bool [2, rows], push and end.

    On the host: t, float32 [rows]; first, steps: int64 [tables]; needs, int64 [rows, 4]: whether m is not eps, history
    entries in use, whether the row does not end its step, whether it adds noise.
    """

    coefficients: Tensor
    flags: Tensor
    t: np.ndarray
    first: np.ndarray
    steps: np.ndarray
    needs: np.ndarray

    @cached_property
    def same_needs(self) -> tuple[bool, int, bool, bool] | None:
        """The needs of every row if all are equal, else None."""
        return _needs(self.needs[:1]) if (self.needs == self.needs[0]).all() else None

    def start(self, x: Tensor) -> SolverState:
        """A solver state that begins at x: [n, ...], with the base and history that these tables need."""
        _, reach, inner, _ = _needs(self.needs)
        return SolverState.start(x, base=inner, history=reach)

    def widen(self, state: SolverState) -> SolverState:
        """`state`, with base and history entries added if these tables need more than it has."""
        _, reach, inner, _ = _needs(self.needs)
        if (state.base is not None or not inner) and state.held >= reach:
            return state
        fresh = SolverState.start(state.x, inner and state.base is None, max(0, reach - state.held))
        parts = [part for part in (state.history, fresh.history) if part is not None]
        return SolverState(
            state.x,
            fresh.base if state.base is None else state.base,
            torch.cat(parts, 1) if len(parts) > 1 else parts[0] if parts else None,
        )

    def rows(self, table: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, StepRows]:
        """Times float32 [n] and rows of n samples: row step[i] of table[i]. table, step: int64 [n].

        Raises ValueError if there is no such table or step.
        """
        if table.shape != step.shape or table.ndim != 1:
            raise ValueError(f"table and step must be [n], got {list(table.shape)} and {list(step.shape)}")
        # as unsigned numbers, negative ones exceed every bound
        if (table.view(np.uint64) >= len(self.first)).any():
            raise ValueError(f"table must lie in [0, {len(self.first)}), got {table.tolist()}")
        if (step.view(np.uint64) >= self.steps[table].view(np.uint64)).any():
            raise ValueError(f"step must lie in [0, {self.steps[table].tolist()}), got {step.tolist()}")
        index = self.locate(table, step)
        return self.t[index], self.take(index, upload(torch.from_numpy(index), self.coefficients.device))

    def locate(self, table: np.ndarray, step: np.ndarray) -> np.ndarray:
        """int64 [n]: the packed index of row step[i] of table[i], unchecked."""
        return self.first[table] + step

    def needs_of(self, index: np.ndarray) -> tuple[bool, int, bool, bool]:
        """What any of the rows at index: int64 [n] needs, in the order of `needs`."""
        return self.same_needs or _needs(self.needs[index])

    def take(self, index: np.ndarray, there: Tensor) -> StepRows:
        """The rows at index: int64 [n]; there: the same indices on the device."""
        push, end = self.flags.index_select(1, there).unbind()
        return StepRows(self.coefficients.index_select(0, there), push, end, *self.needs_of(index))


def _needs(rows: np.ndarray) -> tuple[bool, int, bool, bool]:
    """The maximum of needs over rows: int64 [n, 4]."""
    data, reach, inner, noise = rows.max(0, initial=0).tolist()
    return bool(data), reach, bool(inner), bool(noise)


def pack(tables: Sequence[SolverTable], device: torch.device | str = "cpu") -> PackedTables:
    """Concatenates tables for gathering; table k of the result is tables[k]. Raises ValueError if there is none."""
    if not tables:
        raise ValueError("pack needs at least one table")
    coefficients = torch.cat([table.coefficients for table in tables])
    flags = torch.cat([torch.stack([table.push, table.end]) for table in tables], 1)
    px, pe, noise = (coefficients[:, COLUMNS.index(name)] for name in ("px", "pe", "noise"))
    steps = np.array([table.steps for table in tables], dtype=np.int64)
    reach = torch.cat([table.reach for table in tables])
    needs = torch.stack([(px != 0) | (pe != 1), reach, ~flags[1], noise != 0], 1)
    return PackedTables(
        coefficients=upload(coefficients.float(), torch.device(device)),
        flags=upload(flags, torch.device(device)),
        t=torch.cat([table.t for table in tables]).float().numpy(),
        first=steps.cumsum() - steps,
        steps=steps,
        needs=needs.numpy(),
    )


def converted(table: SolverTable, schedule: NoiseSchedule, prediction_type: str) -> SolverTable:
    """`table` for a network of another prediction type, see prediction.py: changes px and pe."""
    if prediction_type == schedule.tables_for:
        return table
    coefficients, px, pe = table.coefficients.clone(), COLUMNS.index("px"), COLUMNS.index("pe")
    of_x, of_prediction = conversion(prediction_type, schedule.tables_for, *schedule.alpha_sigma(table.t))
    coefficients[:, px] += coefficients[:, pe] * of_x
    coefficients[:, pe] *= of_prediction
    return replace(table, coefficients=coefficients)


class TableSet:
    """The tables shared by samples in flight, one for each solver, number of steps and first step. prediction_type: of
    the network; None: `NoiseSchedule.tables_for`."""

    def __init__(self, schedule: NoiseSchedule, device: torch.device | str = "cpu", prediction_type: str | None = None):
        self._schedule, self._device = schedule, device
        self._prediction_type = prediction_type or schedule.tables_for
        self._tables: dict[tuple[Solver, int, int], SolverTable] = {}
        self.packed: PackedTables | None = None

    def __len__(self) -> int:
        return len(self._tables)

    def add(self, solver: Solver, steps: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
        """The index of each sample's table, int64 [n]; new tables are added. steps, first: int64 [n], number of steps
        and first step (default 0)."""
        first = np.zeros_like(steps) if first is None else first
        keys = [(solver, *pair) for pair in zip(steps.tolist(), first.tolist(), strict=True)]
        missing = dict.fromkeys(key for key in keys if key not in self._tables)
        made = {key: _table_from(solver, self._schedule, *key[1:]) for key in missing}
        new = {key: converted(table, self._schedule, self._prediction_type) for key, table in made.items()}
        if new:
            self._use(self._tables | new)
        index = {key: i for i, key in enumerate(self._tables)}
        return np.array([index[key] for key in keys], dtype=np.int64)

    def keep(self, used: np.ndarray) -> np.ndarray:
        """Drops all tables but those in used: int64 [n]. Returns their new indices, int64 [n]."""
        kept, index = np.unique(used, return_inverse=True)
        items = list(self._tables.items())
        self._use(dict(items[i] for i in kept.tolist()))
        return index

    def alpha_sigma(self, table: np.ndarray, step: np.ndarray) -> tuple[Tensor, Tensor]:
        """alpha and sigma, float64 [n], at evaluation step[i] of table[i]. table, step: int64 [n]."""
        tables = list(self._tables.values())
        t = torch.stack([tables[i].t[k] for i, k in zip(table.tolist(), step.tolist(), strict=True)])
        return self._schedule.alpha_sigma(t)

    def _use(self, tables: dict[tuple[Solver, int, int], SolverTable]) -> None:
        """Replaces the tables; changes nothing if memory runs out."""
        packed = pack(list(tables.values()), self._device) if tables else None
        self._tables, self.packed = tables, packed


def _table_from(solver: Solver, schedule: NoiseSchedule, steps: int, first: int) -> SolverTable:
    """The table for samples that begin at row `first`. Unless the solver has `table_from`, m replaces the history,
    which is empty there: the first step of a multistep solver is then first-order, as in diffusers. Raises ValueError
    for a row within a step."""
    if isinstance(solver, StartingSolver):
        return solver.table_from(schedule, steps, first)
    table = solver.table(schedule, steps)
    if not table.starts[first]:
        raise ValueError(f"row {first} lies within a step; steps begin at {table.starts.nonzero().flatten().tolist()}")
    coefficients = table.coefficients.clone()
    coefficients[first, COLUMNS.index("cur")] += coefficients[first, OLDER].sum()
    coefficients[first, OLDER] = 0
    return replace(table, coefficients=coefficients)
