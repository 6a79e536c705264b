"""Admission by expected work: waiting requests with less expected work begin first.

The request with the earliest due time begins first, see request_queue.py. With admission "arrival" a request is due
`max_wait` seconds after it was submitted. With "work" it is due after share x max_wait seconds, share = w / (w + m),
where w is the number of blocks that the request is expected to run, and m that of the full network in 50 steps. This is
shortest job first, which has the least mean latency (W. E. Smith, 1956), with ageing: since 0 < share < 1, a request is
overtaken only by requests submitted within the next `max_wait` seconds, as with "arrival", and a level of priority
outweighs any difference in work. Requests of equal work are admitted by arrival.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..diffusion.schedules import NoiseSchedule
from ..diffusion.tables import Solver
from ..model import Model
from ..sampling.params import SamplingParams
from ..sampling.sample_batch import SampleBatch

ADMISSIONS = ("arrival", "work")
BINS = 32  # over the network's time, 0..1000
RATE = 0.1  # weight of the newest request in the running mean
MOST = 256  # names of kinds that are kept
USUAL_STEPS: int = SamplingParams.steps  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Kind:
    """What the expected work of a request depends on. names: of similar requests, closest first; text, so that no
    policy object is kept alive. bins: int64 [steps], the time bin of each step. full: blocks of a step without exits.
    staged: whether it is a cascade, whose number of steps is unknown."""

    names: tuple[str, ...]
    bins: np.ndarray
    full: int
    staged: bool


class ExpectedWork:
    """Expected blocks by timestep, learnt from finished requests: those with the same policy and number of steps if
    any, else those with the same policy, else all blocks. `kind_of` is thread-safe; the other methods are not."""

    def __init__(self, model: Model):
        self._schedule, self._num_layers = model.schedule, model.num_layers
        self._curves: dict[str, np.ndarray] = {}  # name -> blocks of a step by bin, NaN if unknown

    def kind_of(self, samples: SampleBatch) -> Kind:
        """The kind of a request; samples: a batch of one."""
        name = f"{samples.parts} {samples.threshold.tolist()} {samples.lanes}"
        steps, full = int(samples.steps), samples.lanes * self._num_layers
        if samples.draft is not None:  # its two stages have different times
            bins = np.zeros(int(samples.most_steps), dtype=np.int64)
        else:
            bins = _bins_of(samples.solver, self._schedule, steps)[int(samples.first) :]
        return Kind((f"{name} {steps}", name), bins, full, samples.draft is not None)

    def blocks(self, kind: Kind) -> float:
        """The number of blocks that a request of this kind is expected to run."""
        curve = next((self._curves[name] for name in kind.names if name in self._curves), None)
        if curve is None:
            return float(len(kind.bins) * kind.full)
        seen = np.flatnonzero(~np.isnan(curve))
        return float(np.interp(kind.bins, seen, curve[seen]).sum())

    def share(self, kind: Kind) -> float:
        """The share of `max_wait`, in (0, 1), after which a request of this kind is due."""
        blocks = max(1.0, self.blocks(kind))
        return blocks / (blocks + USUAL_STEPS * self._num_layers)

    def learn(self, kind: Kind, exit_layers: np.ndarray) -> set[str]:
        """Learns from a finished request. exit_layers: int [steps, 2], blocks by step and half. Returns the names that
        are new."""
        bins, blocks = kind.bins, exit_layers.sum(1).astype(np.float64)
        if kind.staged:
            blocks = np.full(len(bins), blocks.sum() / len(bins))
        count = np.bincount(bins, minlength=BINS)
        mean = np.divide(np.bincount(bins, blocks, BINS), count, out=np.full(BINS, np.nan), where=count > 0)
        new = {name for name in kind.names if name not in self._curves}
        for name in kind.names:
            known = self._curves.pop(name, mean)  # re-inserted last: the oldest come first
            moved = np.where(np.isnan(mean), known, known + RATE * (mean - known))
            self._curves[name] = np.where(np.isnan(known), mean, moved)
        while len(self._curves) > MOST:
            del self._curves[next(iter(self._curves))]
        return new


def expected_work(admission: str, model: Model) -> ExpectedWork | None:
    """The estimate for admission "work", None for "arrival". Raises ValueError for another name."""
    if admission not in ADMISSIONS:
        raise ValueError(f"admission must be 'arrival' or 'work', got {admission!r}")
    return ExpectedWork(model) if admission == "work" else None


@lru_cache(maxsize=1024)
def _bins_of(solver: Solver, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    t = solver.table(schedule, steps).t.numpy()
    return np.minimum((t * (BINS / 1000)).astype(np.int64), BINS - 1)
