"""What a forward pass returns, and what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from .feature_store import StoreUpdate


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of a lane. plain: of the whole network without exits. by_exit_layer: [networks][L + 1], of one that
    exits after so many blocks. network: by lane, which of the networks it ran; None: all ran the only one. asks: by
    network, whether policies decide in it. own_head: by network, what heads of layers 1..L-1 take beyond the network's
    own; by_exit_layer has it. saved, branches: int64 [B, L + 1], multiply-adds and number of the branches that a lane
    took from an earlier step, if it exits after so many blocks; None: nobody did."""

    plain: int
    by_exit_layer: tuple[tuple[int, ...], ...]
    network: tuple[int, ...] | None = None
    asks: tuple[bool, ...] = (True,)
    own_head: tuple[int, ...] = (0,)
    saved: np.ndarray | None = None
    branches: np.ndarray | None = None

    def total(self, exit_layer: Sequence[int], head_layer: Sequence[int] | None = None) -> int:
        """exit_layer: of every lane. head_layer: the layer whose head a lane took that reused the rest of the network,
        0 for the others; None: nobody did."""
        if self.network is None:
            table = self.by_exit_layer[0]
            total = sum([table[layer] for layer in exit_layer])
        else:
            total = sum([self.by_exit_layer[k][layer] for k, layer in zip(self.network, exit_layer, strict=True)])
        if self.saved is not None:
            total -= int(self.saved[np.arange(len(exit_layer)), list(exit_layer)].sum())
        if head_layer is None:
            return total
        network = (0,) * len(exit_layer) if self.network is None else self.network
        last = [len(table) - 1 for table in self.by_exit_layer]
        return total - sum([self.own_head[k] for k, head in zip(network, head_layer, strict=True) if head == last[k]])

    def branches_reused(self, exit_layer: Sequence[int]) -> np.ndarray:
        """int64 [B]: how many branches each lane took from an earlier step."""
        if self.branches is None:
            return np.zeros(len(exit_layer), dtype=np.int64)
        return self.branches[np.arange(len(exit_layer)), list(exit_layer)]


@dataclass(frozen=True)
class ForwardOutput:
    """B lanes. On a GPU the tensors may not be written yet; what reads their values waits.

    prediction: [B, C, H, W], of the network's prediction type and dtype. variance: likewise, v of a learned range (see
    adadiff_kernels.solver_step), None where none was learned. exit_layer: int32 [B], blocks a lane ran, 1..L.
    rows: rows that each block ran over, those in vain included. moved: int32 [1] or a number, see `rows_moved`.
    scores: float32 [L, B], NaN where nobody was asked; None unless recorded.
    head_layer: int32 [B], the layer whose head a lane took that reused the rest of the network, 0 for the others; None
    where no lane's policy reuses. updates: what the lanes' store is to be told once the step is complete.
    """

    prediction: Tensor
    exit_layer: Tensor
    costs: Costs
    rows: tuple[int, ...]
    moved: Tensor | int
    scores: Tensor | None = None
    variance: Tensor | None = None
    head_layer: Tensor | None = None
    updates: tuple[StoreUpdate, ...] = ()

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of all lanes, network and scores."""
        return self.costs.total(self.exit_layer.tolist(), None if self.head_layer is None else self.head_layer.tolist())

    @property
    def macs_full(self) -> int:
        """Those of the same lanes in the plain network."""
        return len(self.exit_layer) * self.costs.plain

    @property
    def rows_moved(self) -> int:
        """Rows that changed places to keep the running ones together."""
        return int(self.moved)
