"""Admission by expected work: of the requests that wait, little work goes before much.

The earliest due begins first, see request_queue.py. By arrival everybody is due `max_wait` seconds after it was
submitted. By work it is share x max_wait seconds, share = w / (w + m): w are the blocks that the request is expected to
run, m those of a full network in 50 steps. That is shortest job first, which has the least mean latency (W. E. Smith,
1956), with ageing: since 0 < share < 1, whoever waits is overtaken only by requests submitted within the next
`max_wait` seconds, as by arrival, and a level of priority outweighs any difference in work. Requests of equal work go
by arrival.
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
RATE = 0.1  # weight of the newest request
MOST = 256  # kinds of requests that are remembered
USUAL_STEPS: int = SamplingParams.steps  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Kind:
    """What the work of a request depends on. names: of the requests that it is like, the closest ones first; text, so
    that nothing of a policy is kept. bins: int64 [steps to make], of their times. full: blocks of a step without exits.
    staged: of a cascade, of which nobody knows how many steps will be made."""

    names: tuple[str, ...]
    bins: np.ndarray
    full: int
    staged: bool


class ExpectedWork:
    """Blocks by timestep, learnt from requests that have been drawn: of the same policy and number of steps where there
    has been one, else of the same policy, else every block. `kind_of` may be called in any thread; the rest locks
    nothing."""

    def __init__(self, model: Model):
        self._schedule, self._num_layers = model.schedule, model.num_layers
        self._curves: dict[str, np.ndarray] = {}  # name -> blocks of a step by bin, NaN where none was

    def kind_of(self, samples: SampleBatch) -> Kind:
        """samples: one."""
        name = f"{samples.parts} {samples.threshold.tolist()} {samples.lanes}"
        steps, full = int(samples.steps), samples.lanes * self._num_layers
        if samples.draft is not None:  # its stages have times of their own
            bins = np.zeros(int(samples.most_steps), dtype=np.int64)
        else:
            bins = _bins_of(samples.solver, self._schedule, steps)[int(samples.first) :]
        return Kind((f"{name} {steps}", name), bins, full, samples.draft is not None)

    def blocks(self, kind: Kind) -> float:
        """That a request of this kind is expected to run."""
        curve = next((self._curves[name] for name in kind.names if name in self._curves), None)
        if curve is None:
            return float(len(kind.bins) * kind.full)
        seen = np.flatnonzero(~np.isnan(curve))
        return float(np.interp(kind.bins, seen, curve[seen]).sum())

    def share(self, kind: Kind) -> float:
        """Of `max_wait`, in (0, 1): after which a request of this kind is due."""
        blocks = max(1.0, self.blocks(kind))
        return blocks / (blocks + USUAL_STEPS * self._num_layers)

    def learn(self, kind: Kind, exit_layers: np.ndarray) -> set[str]:
        """A request has been drawn. exit_layers: integers [made, 2], blocks by step and half. Returns the names of
        which it is the first."""
        bins, blocks = kind.bins, exit_layers.sum(1).astype(np.float64)
        if kind.staged:
            blocks = np.full(len(bins), blocks.sum() / len(bins))
        count = np.bincount(bins, minlength=BINS)
        mean = np.divide(np.bincount(bins, blocks, BINS), count, out=np.full(BINS, np.nan), where=count > 0)
        new = {name for name in kind.names if name not in self._curves}
        for name in kind.names:
            known = self._curves.pop(name, mean)  # those heard of last are the last
            moved = np.where(np.isnan(mean), known, known + RATE * (mean - known))
            self._curves[name] = np.where(np.isnan(known), mean, moved)
        while len(self._curves) > MOST:
            del self._curves[next(iter(self._curves))]
        return new


def expected_work(admission: str, model: Model) -> ExpectedWork | None:
    """None for admission by arrival. ValueError for a name that is none."""
    if admission not in ADMISSIONS:
        raise ValueError(f"admission must be 'arrival' or 'work', got {admission!r}")
    return ExpectedWork(model) if admission == "work" else None


@lru_cache(maxsize=1024)
def _bins_of(solver: Solver, schedule: NoiseSchedule, steps: int) -> np.ndarray:
    t = solver.table(schedule, steps).t.numpy()
    return np.minimum((t * (BINS / 1000)).astype(np.int64), BINS - 1)
