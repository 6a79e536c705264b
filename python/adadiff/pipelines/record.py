"""The record of an enabled transformer: which lanes ran which blocks at which step, and its printed form."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("adadiff")
WIDTH = 100  # characters per line of the printed picture
SHORT_RUNS = 4  # runs of one step each, after which a warning says that nothing was skipped


@dataclass(frozen=True)
class StepRecord:
    """One call of the transformer for B lanes. context: diffusers' cache context, "" without; call: its index among
    several calls in one step; step: from 0. t: float [B]; full: bool [B], lanes that ran all blocks; change: float32
    [B], by the gate, NaN or infinite if there was nothing to compare with, None without a gate. blocks: int64 [B], the
    number of blocks each lane ran. seconds: on the host's clock."""

    context: str
    call: int
    step: int
    t: Tensor
    full: Tensor
    change: Tensor | None
    blocks: Tensor
    seconds: float


@dataclass
class ReuseRecord:
    """Record of an enabled transformer; every call adds to it. steps: of the latest run of the pipeline.

    calls: of the transformer; passes: lanes, summed over calls. blocks, blocks_full: blocks run and of the full
    network, summed over lanes. cache_bytes: memory kept between steps. seconds: in the transformer, all calls. runs:
    number begun.
    """

    name: str
    policy: str
    num_blocks: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    calls: int = 0
    passes: int = 0
    blocks: int = 0
    blocks_full: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0
    runs: int = 0
    warned: bool = False

    @property
    def left_out(self) -> float:
        """The share of blocks skipped in all calls so far."""
        return 1 - self.blocks / self.blocks_full if self.blocks_full else 0.0

    def add(self, step: StepRecord) -> None:
        self.steps.append(step)
        self.calls += 1
        self.passes += len(step.full)
        self.blocks += int(step.blocks.sum())
        self.blocks_full += self.num_blocks * len(step.full)
        self.seconds += step.seconds

    def new_run(self) -> None:
        """Begins a run. Warns once if nothing was skipped in a run of several steps, or in several runs of one step."""
        self.check_acted()
        self.steps = []
        self.runs += 1

    def check_acted(self) -> None:
        repeated = any(step.step for step in self.steps)
        if self.blocks != self.blocks_full or self.warned or self.policy == "full":
            return
        if repeated or self.runs >= SHORT_RUNS:
            self.warned = True
            why = "" if repeated else f": they were counted as {self.runs} runs, the last of one step"
            log.warning("%s: policy '%s' left nothing out in %d calls%s", self.name, self.policy, self.calls, why)

    def summary(self) -> str:
        """A text about the latest run: a row per lane, a column per step; "#" ran all blocks, "." reused."""
        lines = [f"{self.name}: policy '{self.policy}', {self.num_blocks} blocks"]
        if not self.calls:
            return "\n".join([*lines, "no calls yet"])
        for key in dict.fromkeys((step.context, step.call, len(step.full)) for step in self.steps):
            steps = [s for s in self.steps if (s.context, s.call, len(s.full)) == key]
            lines += _picture(
                steps, key[0] or (f"call {key[1] + 1} of a step" if any(s.call for s in self.steps) else "each step")
            )
        lines.append(
            f"{self.left_out:.1%} of the blocks left out in {self.calls} calls, {self.seconds:.2f} s in them; "
            f"{self.cache_bytes / 2**20:.1f} MiB kept"
        )
        if self.blocks == self.blocks_full:
            lines.append("nothing was left out")
        return "\n".join(lines)

    def picture(self, path: str | Path) -> None:
        """Writes a PNG of the latest run: lanes by steps, darker where more blocks ran. Needs matplotlib."""
        from .picture import save_picture

        save_picture(self, path)


def _picture(steps: Sequence[StepRecord], title: str) -> list[str]:
    full = torch.stack([step.full for step in steps])  # [steps, B]
    lines = [f"{title}: {len(steps)} steps, {full.shape[1]} lanes (# all blocks, . reused)"]
    for lane, row in enumerate(full.T.tolist()):
        text = "".join("#" if ran else "." for ran in row)
        shown = text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
        lines.append(f"{lane:>4} {shown} {1 - sum(row) / len(row):4.0%} reused")
    return lines
