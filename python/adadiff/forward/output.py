"""What a forward pass returns, and what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of a lane. plain: of the whole network without exits. by_exit_layer: [networks][L + 1], of one that
    exits after so many blocks. network: by lane, which of the networks it ran; None: all ran the only one. asks: by
    network, whether policies decide in it."""

    plain: int
    by_exit_layer: tuple[tuple[int, ...], ...]
    network: tuple[int, ...] | None = None
    asks: tuple[bool, ...] = (True,)

    def total(self, exit_layer: Sequence[int]) -> int:
        """exit_layer: of every lane."""
        if self.network is None:
            table = self.by_exit_layer[0]
            return sum([table[layer] for layer in exit_layer])
        return sum([self.by_exit_layer[k][layer] for k, layer in zip(self.network, exit_layer, strict=True)])


@dataclass(frozen=True)
class ForwardOutput:
    """B lanes. On a GPU the tensors may not be written yet; what reads their values waits.

    prediction: [B, C, H, W], of the network's prediction type and dtype. variance: likewise, v of a learned range (see
    adadiff_kernels.solver_step), None where none was learned. exit_layer: int32 [B], blocks a lane ran, 1..L.
    rows: rows that each block ran over, those in vain included. moved: int32 [1] or a number, see `rows_moved`.
    scores: float32 [L, B], NaN where nobody was asked; None unless recorded.
    """

    prediction: Tensor
    exit_layer: Tensor
    costs: Costs
    rows: tuple[int, ...]
    moved: Tensor | int
    scores: Tensor | None = None
    variance: Tensor | None = None

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of all lanes, network and scores."""
        return self.costs.total(self.exit_layer.tolist())

    @property
    def macs_full(self) -> int:
        """Those of the same lanes in the plain network."""
        return len(self.exit_layer) * self.costs.plain

    @property
    def rows_moved(self) -> int:
        """Rows that changed places to keep the running ones together."""
        return int(self.moved)
