"""Everything that is kept of the samples in flight, by slot."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import SolverState, upload

from ..diffusion.tables import PackedTables
from .sample_batch import SampleBatch
from .stages import Stages, Switch


class Kinds(Protocol):
    """A set that samples share, known by number."""

    def keep(self, used: np.ndarray) -> np.ndarray: ...


class SlotState:
    """By slot, of `capacity` slots. What the host decides by is NumPy's: on a few numbers its operations take a third
    of the time of PyTorch's. What the network and the solver read lies on `device`.

    running: bool, the sample still has steps to make. tenancy: how many samples the slot has had.
    number: of the sample among those it began with; seed, step, steps, table (of a TableSet), policy (of a PolicySet),
    choice (of a NetworkSet).
    threshold, guidance (scale - 1), interval [capacity, 2], channels, tied, record_scores: as in
    `SampleBatch`. stages: of samples that a student draws first.
    solver: x, base and history; context and null: None until somebody brings one.
    """

    def __init__(self, capacity: int, sample_shape: tuple[int, ...], device: torch.device):
        self.capacity, self.device = capacity, device
        self.running, self.tied, self.record_scores = np.zeros((3, capacity), dtype=bool)
        integers = np.zeros((9, capacity), dtype=np.int64)
        self.seed, self.step, self.steps, self.table, self.policy, self.choice, *integers = integers
        self.channels, self.number, self.tenancy = integers
        self.threshold, self.guidance = np.zeros((2, capacity), dtype=np.float32)
        self.interval = np.zeros((capacity, 2), dtype=np.float32)
        x = torch.zeros(capacity, *sample_shape, dtype=torch.float32, device=device)
        self.solver = SolverState.start(x, base=False, history=False)
        self.context: Tensor | None = None
        self.null: Tensor | None = None
        self.stages = Stages(capacity)
        self._free = list(range(capacity))[::-1]

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def taken(self) -> np.ndarray:
        """bool [capacity]: somebody's."""
        taken = np.ones(self.capacity, dtype=bool)
        taken[self._free] = False
        return taken

    def add(
        self,
        samples: SampleBatch,
        index: np.ndarray,
        table: np.ndarray,
        policy: int,
        choice: int,
        x: Tensor,
        packed: PackedTables,
        then: np.ndarray,
    ) -> np.ndarray:
        """Samples index: int64 [k] of `samples` begin at x: [k, C, H, W]. then: int64 [3, k], table, policy and choice
        of their second stage, if they have one. Returns their slots, int64 [k]."""
        solver = packed.widen(self.solver)
        if self.context is None and samples.context is not None:
            shape, dtype = samples.context.shape[1:], samples.context.dtype
            null = torch.zeros(self.capacity, *shape, dtype=dtype, device=self.device)
            self.context, self.null = torch.zeros_like(null), null  # both or none
        own = torch.from_numpy(index)
        left = len(self._free) - len(index)
        slots = np.array(self._free[left:][::-1], dtype=np.int64)  # theirs once all is written: memory may run out
        self.number[slots], self.table[slots], self.policy[slots], self.choice[slots] = index, table, policy, choice
        for name in ("steps", "threshold", "guidance", "interval", "channels"):
            getattr(self, name)[slots] = getattr(samples, name)[own].numpy()
        self.seed[slots], self.step[slots] = samples.seeds[own].numpy(), samples.first[own].numpy()
        self.tied[slots], self.record_scores[slots] = samples.tied, samples.record_scores
        self.stages.begin(self, slots, samples.draft, index, then)
        there = self.there(slots)
        if samples.context is not None:
            self.context[there] = upload(samples.context[own], self.device)
            if samples.null is not None:
                self.null[there] = upload(samples.null[own], self.device)
        self.solver = solver
        self.solver.restart(there, x)
        del self._free[left:]
        self.tenancy[slots] += 1
        self.running[slots] = True
        return slots

    def switch(self, switch: Switch) -> None:
        """Writes what `Stages.judge` has found."""
        if len(switch.slots):
            self.solver.restart(self.there(switch.slots), switch.x)
            self.stages.switch(self, switch.slots)

    def keep(self, name: str, kinds: Kinds) -> None:
        """What nobody uses any more of `kinds` is forgotten; `name` is what indexes it, one of stages.INDICES."""
        now, then, taken = getattr(self, name), self.stages.then[name], self.taken
        drafting = taken & self.stages.drafting
        used = kinds.keep(np.concatenate([now[taken], then[drafting]]))
        now[taken], then[drafting] = np.split(used, [np.count_nonzero(taken)])

    def release(self, slots: np.ndarray) -> None:
        self.running[slots] = False
        self._free.extend(slots.tolist())

    def there(self, value: np.ndarray) -> Tensor:
        """`value` on the device."""
        return upload(torch.from_numpy(value), self.device)
