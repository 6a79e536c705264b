"""What runs did: exit layers, blocks, multiply-adds, seconds."""

import logging
import math
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from ..policies.exits import Full
from ..policies.interface import ExitPolicy

NEVER_ACTED = "the policy never let a sample exit"


def asks_for_exits(policy: ExitPolicy) -> bool:
    return not isinstance(policy, Full)


@lru_cache(maxsize=256)
def log_never_acted(policy: str) -> None:
    """Once for each policy."""
    logging.getLogger("adadiff").warning("policy %s never let a sample exit: every block was run", policy)


@dataclass(frozen=True)
class ExitRecord:
    """exit_layer: uint8 [steps, n, 2], blocks that each sample's lanes (conditional, unconditional) ran at each step, 0
    where there was none. num_layers: blocks of the network. scores: float32 [steps, n, 2, L], each layer's uncertainty,
    NaN where its policy did not ask; None unless they were asked for. asks: its policy is there to let samples exit.
    acted: it let some exit; None: as exit_layer tells, which cannot where a shallow network had a part."""

    exit_layer: Tensor
    num_layers: int
    scores: Tensor | None
    asks: bool = field(default=False, kw_only=True)
    acted: bool | None = field(default=None, kw_only=True)

    @property
    def never_acted(self) -> bool:
        """A policy that is there to let samples exit let none exit."""
        acted = self.blocks < self.blocks_full if self.acted is None else self.acted
        return self.asks and self.blocks > 0 and not acted

    @property
    def passes(self) -> int:
        """Lanes that went through the network, each step counted."""
        return int((self.exit_layer > 0).sum())

    @property
    def steps(self) -> Tensor:
        """int64 [n]: how many each sample has made, as far as is known."""
        return (self.exit_layer[:, :, 0] > 0).sum(0)

    @property
    def blocks(self) -> int:
        return int(self.exit_layer.sum())

    @property
    def blocks_full(self) -> int:
        return self.passes * self.num_layers

    @property
    def mean_exit_layer(self) -> float:
        return self.blocks / self.passes if self.passes else math.nan


@dataclass(frozen=True)
class Report(ExitRecord):
    """A run of `adadiff.sample`. Multiply-adds count network and scores, not the solver."""

    macs: int
    macs_full: int
    rows_moved: int
    seconds: float

    def __str__(self) -> str:
        n = self.exit_layer.shape[1]
        if not self.passes:
            return f"{n} samples, nothing to compute"
        return (
            f"{n} samples in {self.seconds:.2f} s ({n / self.seconds:.1f}/s); mean exit layer "
            f"{self.mean_exit_layer:.2f} of {self.num_layers}; {self.blocks / self.blocks_full:.1%} of the blocks, "
            f"{self.macs / self.macs_full:.1%} of the multiply-adds of the full network"
            f"{f'; {NEVER_ACTED}' if self.never_acted else ''}"
        )


@dataclass(frozen=True)
class RequestReport(ExitRecord):
    """One request of an `adadiff.Engine`: exit_layer [steps, 1, 2], without the last step while the request runs;
    seconds in the queue and from then on."""

    waited: float
    seconds: float


@dataclass
class Totals:
    """What a batch has done so far. passes: lanes that went through the network, each tick counted; asked: those of
    them whose policy is there to let them exit, without those of a shallow network; exited: those of these that did."""

    ticks: int = 0
    passes: int = 0
    blocks: int = 0
    macs: int = 0
    macs_full: int = 0
    rows_moved: int = 0
    halvings: int = 0  # ticks cut in two because memory ran out
    asked: int = 0
    exited: int = 0

    @property
    def mean_exit_layer(self) -> float:
        return self.blocks / self.passes if self.passes else math.nan

    @property
    def never_acted(self) -> bool:
        """Policies that are there to let samples exit let none exit."""
        return self.asked > 0 and not self.exited
