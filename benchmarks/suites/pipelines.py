"""A step of a diffusers transformer in which some samples reuse the residual of their later blocks. Measures our cache,
which decides for each sample, diffusers' own, which decides for the batch, and only the parts that have to run.

Networks of moderate size with the structure of FLUX and PixArt, random weights, one thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.baselines.lane_caches import (
    BATCH_FULL,
    BATCH_REUSED,
    PLAIN,
    SHARES,
    Call,
    Shape,
    Step,
    at_best,
    by_sample,
    flux,
    pixart,
)
from benchmarks.harness import Comparison, interleave, threads
from benchmarks.rows import Rows, say

SUITE = "diffusers"


def shapes(single: int) -> tuple[Shape, Shape]:
    """Two thirds of FLUX's blocks are single-stream blocks, as in FLUX.1; PixArt has the same number of blocks."""
    layers, wide = single // 2, {"heads": 8, "width": 64, "side": 16, "text": 64}
    return (
        flux("FLUX-shaped", layers, single, **wide, joint_attention_dim=512),
        pixart("PixArt-shaped", layers + single, **wide, captions=512),
    )


# Lower bound for each share; without reuse, it is the plain network itself.
PAIRS = {by_sample(share): at_best(share) if share else PLAIN for share in SHARES}
CPU = torch.device("cpu")
TOLERANCE = 1e-3  # relative error of reuse between two calls at nearly the same time


@dataclass(frozen=True)
class Sizes:
    """limits: batch -> seconds of a comparison, see `interleave`."""

    shapes: tuple[Shape, ...]
    limits: Mapping[int, float]
    repeats: int


FULL = Sizes(shapes(8), {4: 60.0, 8: 120.0}, repeats=15)
QUICK = Sizes(shapes(4), {4: 15.0}, repeats=3)


def run(rows: Rows, sizes: Sizes) -> None:
    with threads(1):
        for shape in sizes.shapes:
            for batch, limit in sizes.limits.items():
                say(f"{SUITE}: {shape.name}, {shape.blocks} blocks, batch {batch}, one thread")
                measure(rows, shape, batch, sizes.repeats, limit)


def measure(rows: Rows, shape: Shape, batch: int, repeats: int, limit: float) -> None:
    step = Step(shape, batch, CPU, torch.float32)
    step.check(TOLERANCE)
    measured = interleave(
        distinct(step),
        repeats,
        pairs=PAIRS,
        limit=limit,
        label=f"{shape.name}, batch {batch}",
    )
    for variant, results in results_of(step, measured).items():
        rows.write(SUITE, "step", variant, parameters(step), dtype="float32", **measured.row(variant), **results)


def distinct(step: Step) -> dict[str, Call]:
    """The calls to time, without duplicates."""
    return {name: call for name, call in step.calls.items() if name != at_best(0.0)}


def parameters(step: Step) -> dict[str, object]:
    return {"network": step.shape.name, "blocks": step.shape.blocks, "batch": step.B}


def results_of(step: Step, measured: Comparison) -> dict[str, dict[str, object]]:
    """Entries of each variant's row besides the seconds. over_best: ratio to the seconds of only the parts that have to
    run, by round; plain_steps: ratio to the plain network's seconds, i.e. its number of steps in the same time."""
    full = step.B * step.shape.blocks
    found: dict[str, dict[str, object]] = {PLAIN: {"plain_steps": 1.0, "blocks": full, "blocks_full": full}}
    for share in SHARES:
        name, best = by_sample(share), PAIRS[by_sample(share)]
        over = measured.ratio(name, best)
        found[name] = {
            "reuse": share,
            "over_best": over.median,
            "over_best_spread": [over.quantile(0.2), over.quantile(0.8)],
            "best_seconds": measured.median(best),
            "plain_steps": measured.ratio(name, PLAIN).median,
            "blocks": step.blocks(share),
            "blocks_full": full,
        }
    for name, share in ((BATCH_FULL, 0.0), (BATCH_REUSED, 1.0)):
        if name in measured.times:
            steps = measured.ratio(name, PLAIN).median
            found[name] = {"reuse": share, "plain_steps": steps, "blocks": step.blocks(share), "blocks_full": full}
    return found
