"""The state of all samples in flight, by slot."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import SolverState, upload

from ..diffusion.tables import PackedTables
from .sample_batch import SampleBatch
from .stages import Stages, Switch


class Kinds(Protocol):
    """A set of shared objects, referred to by number."""

    def keep(self, used: np.ndarray) -> np.ndarray: ...


class SlotState:
    """Arrays with one entry per slot. Data for decisions of the host is in NumPy arrays, which take a third of the time
    of PyTorch tensors for a few numbers; data of network and solver is on `device`.

    running: bool, the sample still has steps to make. tenancy: the number of samples that the slot has held.
    number: the sample's index in its `SampleBatch`; seed, step, steps; table (of a TableSet), policy (of a PolicySet),
    choice (of a NetworkSet), by number.
    threshold, guidance (scale - 1), interval [capacity, 2], channels, tied, record_scores: as in
    `SampleBatch`. stages: the two stages of cascades.
    solver: x, base and history. context: [2 capacity, ...], that of the conditional lane of slot s at s, and of its
    unconditional lane at capacity + s; None until a sample has one.
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
        self.stages = Stages(capacity)
        self._free = list(range(capacity))[::-1]

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def taken(self) -> np.ndarray:
        """bool [capacity]: slots in use."""
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
        """Starts samples index: int64 [k] of `samples` at x: [k, C, H, W]. then: int64 [3, k], table, policy and choice
        of the second stage, if there is one. Returns their slots, int64 [k]."""
        solver = packed.widen(self.solver)
        if self.context is None and samples.context is not None:
            shape, dtype = samples.context.shape[1:], samples.context.dtype
            self.context = torch.zeros(2 * self.capacity, *shape, dtype=dtype, device=self.device)
        chosen = torch.from_numpy(index)
        left = len(self._free) - len(index)
        slots = np.array(self._free[left:][::-1], dtype=np.int64)  # taken only below: memory may run out before
        self.number[slots], self.table[slots], self.policy[slots], self.choice[slots] = index, table, policy, choice
        for name in ("steps", "threshold", "guidance", "interval", "channels"):
            getattr(self, name)[slots] = getattr(samples, name)[chosen].numpy()
        self.seed[slots], self.step[slots] = samples.seeds[chosen].numpy(), samples.first[chosen].numpy()
        self.tied[slots], self.record_scores[slots] = samples.tied, samples.record_scores
        self.stages.begin(self, slots, samples.draft, index, then)
        there = self.there(slots)
        if samples.context is not None:
            self.context[there] = upload(samples.context[chosen], self.device)
            if samples.null is not None:
                self.context[there + self.capacity] = upload(samples.null[chosen], self.device)
        self.solver = solver
        self.solver.restart(there, x)
        del self._free[left:]
        self.tenancy[slots] += 1
        self.running[slots] = True
        return slots

    def switch(self, switch: Switch) -> None:
        """Starts the second stage of the samples that `Stages.judge` found."""
        if len(switch.slots):
            self.solver.restart(self.there(switch.slots), switch.x)
            self.stages.switch(self, switch.slots)

    def keep(self, name: str, kinds: Kinds) -> None:
        """Drops unused members of `kinds`. name: the array of their numbers, one of stages.INDICES."""
        now, then, taken = getattr(self, name), self.stages.then[name], self.taken
        drafting = taken & self.stages.drafting
        used = kinds.keep(np.concatenate([now[taken], then[drafting]]))
        now[taken], then[drafting] = np.split(used, [np.count_nonzero(taken)])

    def release(self, slots: np.ndarray) -> None:
        self.running[slots] = False
        self._free.extend(slots.tolist())

    def there(self, value: np.ndarray) -> Tensor:
        """Uploads `value` to the device."""
        return upload(torch.from_numpy(value), self.device)
