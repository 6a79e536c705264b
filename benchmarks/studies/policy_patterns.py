"""Ticks of a batch in which half of the samples reuse, or run at another width, compared with the plain pieces.

python -m benchmarks.studies.policy_patterns [--batch 64]

U-ViT-S/2 at its CIFAR-10 shape, random weights, one thread; under ten minutes. A tick is a forward pass and a solver
step of every sample. The lower bound consists of the plain network's fastest pieces on only the rows that run: stem,
blocks, projections of long skips for samples that reuse, and head. A reused branch counts as one residual pass.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import adadiff
from adadiff.forward.narrow import narrow
from adadiff.policies.reuse import ReuseContext, ReusePolicy
from adadiff.policies.spelling import Policy
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from benchmarks.baselines.attainable import Call, kinds
from benchmarks.harness import best_micro_batch, interleave, threads
from benchmarks.rows import ROOT, Rows, say

SUITE, KIND = "network", "policy"
PRESET, WIDTHS, NARROW = "cifar10_uvit_small", (0.5, 1.0), 0.5
STEPS = 1000  # enough for samples to stay in flight during the measurement


@dataclass(frozen=True)
class EverySecond(ReusePolicy):
    """Reuses in every second step; the gate of a first-block cache is computed, but ignored."""

    first: int = 1
    gate = "residual"

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return context.age < 2


# Policies of the two halves of the samples. The second half begins a tick later, so that one half reuses in each tick.
CASES: dict[str, tuple[Policy, Policy]] = {
    "half reuse all branches": ("reuse:every=2,level=layer",) * 2,
    "half reuse the rest": (EverySecond(), EverySecond()),
    "two widths": ("width:1", f"width:{NARROW:g}"),
}


def run(rows: Rows, batch: int = 64, repeats: int = 5, limit: float = 240.0) -> None:
    say(f"network: policies, batch {batch}, one thread")
    with threads(1), torch.inference_mode():
        measure(rows, batch, repeats, limit)


def measure(rows: Rows, batch: int, repeats: int, limit: float) -> None:
    torch.manual_seed(0)
    model = slimmable(PRESET)
    half, backbone = batch // 2, model.backbone
    x, t = torch.randn(batch, *backbone.sample_shape), torch.rand(batch) * 999
    best = best_micro_batch(lambda m: backbone(x[:m], t[:m]), half)
    plain = Pieces(model, x, t, best)
    slim = Pieces(narrow(model, NARROW), x, t, best)
    ticks = {name: ticking(model, batch, policies) for name, policies in CASES.items()}
    ideal: dict[str, Sequence[Call]] = {
        "half reuse all branches": [plain.stem, *plain.blocks(half), *plain.reused(half), plain.head],
        "half reuse the rest": [plain.stem, *plain.blocks(batch)[:1], *plain.blocks(half)[1:], plain.head],
        "two widths": [plain.stem, *plain.blocks(half), *slim.blocks(half), plain.head],
    }
    pieces = {f"{name}: plain pieces": in_turn(calls) for name, calls in ideal.items()}
    variants = {"full": ticking(model, batch, ("full", "full")), **ticks, **pieces}
    pairs = {name: f"{name}: plain pieces" for name in CASES}
    measured = interleave(variants, repeats, 1, pairs=pairs, turn=0.02, limit=limit, label="policies")
    for name in CASES:
        share = measured.ratio(pairs[name], name)
        rows.write(
            SUITE,
            KIND,
            name,
            {"preset": PRESET, "batch": batch},
            dtype="float32",
            **measured.row(name),
            speedup=measured.ratio("full", name).median,
            share_of_attainable=share.median,
            share_of_attainable_spread=[share.quantile(0.2), share.quantile(0.8)],
        )


def slimmable(preset: str) -> adadiff.Model:
    config = dataclasses.replace(adadiff.build(preset).config, widths=WIDTHS)
    return adadiff.Model(config).requires_grad_(False).eval()


def ticking(model: adadiff.Model, batch: int, policies: tuple[Policy, Policy]) -> Callable[[], object]:
    """A call that runs a tick of a batch in which half of the samples follow each policy."""
    made = Batch(model, batch)
    for policy in policies:
        samples = SampleBatch.of(model, batch // 2, policy=policy, steps=STEPS)
        made.admit(samples, np.arange(batch // 2))
        made.tick()
    return made.tick


class Pieces:
    """Calls of parts of a plain network on some rows, in micro-batches of `best`."""

    def __init__(self, model: adadiff.Model, x: Tensor, t: Tensor, best: int) -> None:
        backbone = self._backbone = model.backbone
        self._cond = backbone.embed(x, t)[1]
        self._rows, self._skip = torch.randn(2, len(x), backbone.tokens, backbone.dim)
        self._best = best
        lanes = torch.arange(len(x), dtype=torch.int32)
        patches = self._rows[:, backbone.num_prefix_tokens :]
        self.stem = lambda: backbone.embed(x, t)
        self.head = lambda: backbone.head(patches, self._cond, lanes)

    def blocks(self, n: int) -> list[Call]:
        return [
            lambda block=block, kind=kind: self._block(block, kind == "out", n)
            for block, kind in zip(self._backbone.blocks, kinds(self._backbone), strict=True)
        ]

    def _block(self, block: torch.nn.Module, joins: bool, n: int) -> None:
        for rows, skip in zip(self._rows[:n].split(self._best), self._skip[:n].split(self._best), strict=True):
            block(rows, self._cond, skip if joins else None)

    def reused(self, n: int) -> list[Call]:
        """Calls for n lanes that reuse all branches: a residual pass for each, and the projections of long skips."""
        calls: list[Call] = []
        for block, kind in zip(self._backbone.blocks, kinds(self._backbone), strict=True):
            if kind == "out":
                calls.append(lambda block=block: block.join(self._rows[:n], self._skip[:n]))
            calls += [lambda: torch.add(self._rows[:n], self._skip[:n])] * len(block.branches)
        return calls


def in_turn(calls: Sequence[Call]) -> Call:
    def call() -> None:
        for piece in calls:
            piece()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="samples, an even number (default: 64)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "out" / "policies", help="folder for the rows"
    )
    options = parser.parse_args()
    rows = Rows(options.out)
    begun = len(rows.rows)
    run(rows, options.batch)
    for row in rows.rows[begun:]:
        share, mark = row["share_of_attainable"], "" if row["usable"] else " (!) the machine was busy"
        low, high = row["share_of_attainable_spread"]
        print(f"{row['variant']:24} {share:.3f} of attainable ({low:.3f} to {high:.3f}){mark}")


if __name__ == "__main__":
    main()
