"""The result of a forward pass, and its cost in multiply-adds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from .feature_store import StoreUpdate


@dataclass(frozen=True)
class Costs:
    """Multiply-adds per lane. plain: the whole network without exits. by_exit_layer: [networks][L + 1], of a lane that
    exits after 0..L blocks. network: by lane, the index of the network it ran; None: there is only one. asks: by
    network, whether policies apply in it. own_head: by network, the extra cost of the heads of layers 1..L-1 over the
    network's own head; included in by_exit_layer. saved, branches: int64 [B, L + 1], multiply-adds and number of the
    branches that a lane reused, by the number of blocks it ran; None: no lane reused any."""

    plain: int
    by_exit_layer: tuple[tuple[int, ...], ...]
    network: tuple[int, ...] | None = None
    asks: tuple[bool, ...] = (True,)
    own_head: tuple[int, ...] = (0,)
    saved: np.ndarray | None = None
    branches: np.ndarray | None = None

    def total(self, exit_layer: Sequence[int], head_layer: Sequence[int] | None = None) -> int:
        """Multiply-adds of all lanes. exit_layer: by lane. head_layer: by lane, the layer whose head it used if it
        reused the rest of the network, else 0; None: no lane did."""
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

    def reused_branches(self, exit_layer: Sequence[int]) -> np.ndarray:
        """bool [B]: whether each lane reused a branch of an earlier step."""
        if self.branches is None:
            return np.zeros(len(exit_layer), dtype=bool)
        return self.branches[np.arange(len(exit_layer)), list(exit_layer)] > 0


@dataclass(frozen=True)
class ForwardOutput:
    """The result for B lanes. On a GPU the tensors may still be computed; reading their values synchronises.

    prediction: [B, C, H, W], of the network's prediction type and dtype. variance: [B, C, H, W], v of a learned range
    (see adadiff_kernels.solver_step), None without one. exit_layer: int32 [B], the number of blocks a lane ran, 1..L.
    rows: the number of rows each block ran over, including rows of exited lanes. moved: int32 [1] or int, see
    `rows_moved`. scores: float32 [L, B], NaN where a lane was not scored; None unless recorded.
    head_layer: int32 [B], the layer whose head a lane used if it reused the rest of the network, else 0; None if no
    lane's policy reuses it. updates: to be applied to the lanes' store once the step is complete.
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
        """Multiply-adds of all lanes, including scores and heads."""
        return self.costs.total(self.exit_layer.tolist(), None if self.head_layer is None else self.head_layer.tolist())

    @property
    def macs_full(self) -> int:
        """Multiply-adds of the same lanes in the plain network."""
        return len(self.exit_layer) * self.costs.plain

    @property
    def rows_moved(self) -> int:
        """The number of rows moved to keep running rows contiguous."""
        return int(self.moved)
