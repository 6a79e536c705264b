"""A step of diffusers' FLUX.1-dev and PixArt-XL/2 (random weights, bfloat16, eager) in which some samples reuse the
residual of their later blocks: see `benchmarks.suites.pipelines`.

Without diffusers a line says that nothing is measured.
"""

import gc
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks.baselines.lane_caches import Shape, Step, flux, pixart
from benchmarks.gpu.session import Session, Task
from benchmarks.rows import say
from benchmarks.suites.pipelines import PAIRS, distinct, results_of

SUITE = "gpu-diffusers"
BRAIN = torch.bfloat16
TOLERANCE = 0.05  # bfloat16 rounding differs between matrix products of different sizes
FLUX_1024, FLUX_512 = (
    flux(f"FLUX.1-dev, {pixels}", 19, 38, 24, 128, pixels // 16, 512, guidance_embeds=True) for pixels in (1024, 512)
)
PIXART = pixart("PixArt-XL/2, 1024", 28, 16, 72, 64, 120)
TINY = {
    "flux": flux("tiny FLUX", 2, 2, 2, 32, 4, 5, joint_attention_dim=24, pooled_projection_dim=12),
    "pixart": pixart("tiny PixArt", 3, 2, 32, 4, 5, captions=24),
}
# repeats: rounds, about 60 s in all at 500 TFLOP/s
SETTINGS = ((FLUX_1024, 4, 3), (FLUX_512, 8, 3), (PIXART, 4, 7), (PIXART, 8, 7))
DRY = ((TINY["flux"], 4, 1), (TINY["pixart"], 4, 1))


def missing() -> list[str]:
    """Names of modules that this suite needs and that are not installed."""
    return [name for name in ("diffusers",) if find_spec(name) is None]


def tasks(session: Session) -> Iterator[Task]:
    if missing():
        say(f"{SUITE}: diffusers is not installed here, nothing is measured")
        return
    for shape, batch, repeats in DRY if session.dry else SETTINGS:
        given = {"network": shape.name, "blocks": shape.blocks, "batch": batch}
        yield Task("step", given, partial(measure, session, given, shape, batch, repeats))


def measure(session: Session, parameters: dict[str, object], shape: Shape, batch: int, repeats: int) -> None:
    step = Step(shape, batch, session.device, BRAIN)
    step.check(TOLERANCE)
    measured = session.compare(distinct(step), repeats, pairs=PAIRS)
    session.write(SUITE, "step", parameters, measured, results_of(step, measured), BRAIN)
    del step
    gc.collect()  # Step has reference cycles, and the next network needs its memory
