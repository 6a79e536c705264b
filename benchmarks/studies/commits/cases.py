"""Cases that two commits draw, independent of either's API: each commit has an adapter (base.py, current.py)."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

COMMIT = "28883ee"  # the reference
N = 64
STEPS = (5, 6, 8)  # samples take turns, so that they are at different steps
BATCH = 24  # fewer than N, so that slots are reused
PLACEMENTS = ("sample", "batch-invariant", "device, sync", "device, lagged", "engine")
SOLVERS = ("ddim", "ddim:0.5", "ddpm", "dpm++2m", "dpm-fast", "dpm++fast")
POLICIES = (
    ("full", {}),
    ("threshold", {"theta": 0.135, "first": 3}),
    ("patience", {"theta": 0.12, "first": 1}),
    ("batch-mean", {"theta": 0.12, "first": 1}),
    ("depth", {"depth": 7.3}),
    ("budget", {"share": 0.55}),
    ("table", {"share": 0.55}),
)
# Scales as in diffusers (1: none), chosen so that scale - 1 is exact; samples take turns.
GUIDANCE = (
    {"scales": (1.0,)},
    {"scales": (2.5,)},
    {"scales": (1.0, 2.5, 4.0), "tied": True},
    {"scales": (2.5,), "interval": (150.0, 800.0)},
)
EVERY = 5  # every fifth case is drawn for placements other than the first


@dataclass(frozen=True)
class Case:
    """policy, numbers: one of POLICIES. model: "canvases" if the policy needs a calibration, else "digits"."""

    placement: str
    solver: str
    policy: str
    numbers: dict = field(hash=False)
    scales: tuple[float, ...]
    tied: bool = False
    interval: tuple[float, float] | None = None

    @property
    def model(self) -> str:
        return "canvases" if "share" in self.numbers else "digits"

    @property
    def name(self) -> str:
        guidance = "/".join(map(str, self.scales)) + (" tied" if self.tied else "")
        guidance += f" in {self.interval}" if self.interval else ""
        return f"{self.placement}; {self.solver}; {self.policy}; guidance {guidance}"

    def by_sample(self, values: tuple) -> list:
        return [values[i % len(values)] for i in range(N)]


def cases() -> Iterator[Case]:
    for number, (solver, (policy, numbers), guidance) in enumerate(itertools.product(SOLVERS, POLICIES, GUIDANCE)):
        looks_at_the_batch = policy == "batch-mean"
        if looks_at_the_batch and guidance["scales"] != (1.0,):
            continue  # the reference commit decides for both halves together, unlike AdaDiff's sampler
        for k, placement in enumerate(PLACEMENTS):
            if k and (number % EVERY != k % EVERY or (looks_at_the_batch and placement in PLACEMENTS[3:])):
                continue  # its results depend on the batch, or it is refused there
            yield Case(placement, solver, policy, numbers, **guidance)
