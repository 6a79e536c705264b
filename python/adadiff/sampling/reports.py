"""Reports of runs: exit layers, blocks, multiply-adds, seconds."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from ..policies.exits import Full
from ..policies.interface import ExitPolicy

VERBS = {"exit": "exit", "reuse": "reuse", "width": "run narrow"}  # by part of a policy, for messages


def never_acted_text(parts: Sequence[str]) -> str:
    """A message about parts of a policy (keys of VERBS) that never acted."""
    return f"the policy never let a sample {_verbs(parts)}"


def _verbs(parts: Sequence[str]) -> str:
    return " or ".join(VERBS[part] for part in parts)


def asks_for_exits(policy: ExitPolicy) -> bool:
    return not isinstance(policy, Full)


@lru_cache(maxsize=256)
def log_never_acted(policy: str, parts: tuple[str, ...], whole: bool) -> None:
    """Logs a warning, once per policy. parts: those that never acted. whole: whether every block was run."""
    message = "policy %s never let a sample %s" + (": every block was run" if whole else "")
    logging.getLogger("adadiff").warning(message, policy, _verbs(parts))


@dataclass(frozen=True)
class ExitRecord:
    """Exits of n samples. exit_layer: uint8 [steps, n, 2], blocks that each sample's lanes (conditional, unconditional)
    ran at each step, 0 where there was no lane. num_layers: blocks of the network. scores: float32 [steps, n, 2, L],
    each layer's uncertainty, NaN where the sample's policy did not score it; None unless recorded. asks: whether the
    policy may skip work. acted: whether it did; None: derived from exit_layer (not possible with a shallow network).
    reused: bool [steps, n, 2], lanes that reused features of an earlier step; None without a reuse policy.
    For a cascade the student's steps come first, then the teacher's. went_on: bool [n], samples that the oracle sent on
    to the teacher; oracle_scores: float32 [n], NaN if not scored yet; both None without a cascade."""

    exit_layer: Tensor
    num_layers: int
    scores: Tensor | None
    asks: bool = field(default=False, kw_only=True)
    acted: bool | None = field(default=None, kw_only=True)
    reused: Tensor | None = field(default=None, kw_only=True)
    went_on: Tensor | None = field(default=None, kw_only=True)
    oracle_scores: Tensor | None = field(default=None, kw_only=True)

    @property
    def never_acted(self) -> bool:
        """Whether a policy that may skip work has skipped none."""
        acted = self.blocks < self.blocks_full or self.reuses > 0 if self.acted is None else self.acted
        return self.asks and self.blocks > 0 and not acted

    @property
    def passes(self) -> int:
        """The number of lanes that went through the network, summed over steps."""
        return int((self.exit_layer > 0).sum())

    @property
    def reuses(self) -> int:
        """The number of `passes` in which a lane reused features of an earlier step."""
        return 0 if self.reused is None else int(self.reused.sum())

    @property
    def steps(self) -> Tensor:
        """int64 [n]: steps that each sample has made, as far as known."""
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
    """Report of a run of `adadiff.sample`. macs: multiply-adds of networks, scores and oracles, without the solver;
    macs_full: of as many passes of the full network. rows_moved: rows moved by compaction. idle: parts of the policy
    ("exit", "reuse", "width") that never acted."""

    macs: int
    macs_full: int
    rows_moved: int
    seconds: float
    idle: tuple[str, ...] = field(default=(), kw_only=True)

    def __str__(self) -> str:
        n, never = self.exit_layer.shape[1], never_acted_text(self.idle or ("exit",))
        if not self.passes:
            return f"{n} samples, nothing to compute"
        return (
            f"{n} samples in {self.seconds:.2f} s ({n / self.seconds:.1f}/s); "
            f"{self.mean_exit_layer:.2f} of {self.num_layers} blocks a step ({self.blocks / self.blocks_full:.1%}), "
            f"{self.macs / self.macs_full:.1%} of the multiply-adds of the full network"
            f"{'' if self.reused is None else f'; {self.reuses / self.passes:.1%} of the steps reused an earlier one'}"
            f"{f'; {never}' if self.never_acted else ''}"
            f"{'' if self.went_on is None else f'; {int(self.went_on.sum())} went on to the teacher'}"
        )


@dataclass(frozen=True)
class RequestReport(ExitRecord):
    """Report of one request of an `adadiff.Engine`: exit_layer [steps, 1, 2], without the last step while the request
    runs; waited: seconds in the queue; seconds: from then on."""

    waited: float
    seconds: float


@dataclass
class Totals:
    """Counters of a batch. All lane counts are summed over ticks. passes: lanes that went through the network; asked:
    lanes whose policy may skip work, without those of a shallow network; exited: lanes among `asked` that exited early
    or reused. reused: lanes that reused an earlier step. asked_exit, asked_reuse, asked_width: lanes whose policy has
    this part; left: lanes among asked_exit that exited early; narrow: lanes that ran at a width below 1."""

    ticks: int = 0
    passes: int = 0
    blocks: int = 0
    macs: int = 0
    macs_full: int = 0
    rows_moved: int = 0
    halvings: int = 0  # forward passes that ran out of memory and were repeated in halves
    asked: int = 0
    exited: int = 0
    reused: int = 0
    asked_exit: int = 0
    left: int = 0
    asked_reuse: int = 0
    asked_width: int = 0
    narrow: int = 0

    @property
    def mean_exit_layer(self) -> float:
        return self.blocks / self.passes if self.passes else math.nan

    @property
    def never_acted(self) -> bool:
        """Whether policies that may skip work have skipped none: no block, or no share of a block's width."""
        return (self.asked > 0 and not self.exited) or (self.asked_width > 0 and not self.narrow)

    @property
    def idle(self) -> tuple[str, ...]:
        """Parts of policies that never acted."""
        parts = {
            "exit": (self.asked_exit, self.left),
            "reuse": (self.asked_reuse, self.reused),
            "width": (self.asked_width, self.narrow),
        }
        return tuple(name for name, (asked, acted) in parts.items() if asked and not acted)

    def log_idle(self, policy: str) -> None:
        """Logs parts that never acted, once per policy."""
        if self.idle:
            log_never_acted(policy, self.idle, self.asked > 0 and not self.exited)
