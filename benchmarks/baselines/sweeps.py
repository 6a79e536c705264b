"""What is compared: the networks of a data set, and the settings that are tried for every method."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from adadiff.checkpoint import find
from adadiff.forward.two_stage import what_it_draws
from benchmarks.baselines.reuse import macs
from benchmarks.suites.drawing import fingerprint, load
from benchmarks.suites.judging import DATA

LARGE_MACS = 20e6  # multiply-adds of an evaluation; a network with more is large


@dataclass(frozen=True)
class Networks:
    """Shipped names or files. full: the network with exits; plain: the same without exits, trained with the same
    budget; shallow: a separately trained shallow network; slim, widths: a slimmable network and its width schedule;
    cascade. Methods whose network is None are left out."""

    full: str
    plain: str | None
    shallow: str | None
    slim: str | None = None
    widths: str | None = None
    cascade: str | None = None

    @property
    def names(self) -> tuple[str | None, ...]:
        return self.full, self.plain, self.shallow

    @property
    def deep(self) -> tuple[str, ...]:
        """The networks of all blocks: the full one and, if there is one, the plain one."""
        return (self.full, self.plain) if self.plain else (self.full,)

    @property
    def checkpoints(self) -> list[str | None]:
        return [name and fingerprint(name) for name in self.names]

    @property
    def large(self) -> bool:
        return macs(load(self.full).backbone, 1, 1) >= LARGE_MACS

    def check(self) -> None:
        """Raises ValueError for networks that cannot be compared."""
        full = load(self.full)
        if full.exits is None:
            raise ValueError(f"{self.full} has no exits; it can only be the plain network")
        for name in filter(None, (self.plain, self.shallow)):
            ours, theirs = what_it_draws(full), what_it_draws(load(name))
            if ours != theirs:
                raise ValueError(f"{name} and {self.full} do not draw the same: {theirs} and {ours}")


def default_networks(data: str) -> Networks:
    """The shipped networks of a data set, else those in the run folders of `adadiff train DATA`, DATA_plain and
    DATA_shallow. Raises ValueError if there are none."""
    if data not in DATA:
        raise ValueError(f"no data {data!r}; there are {', '.join(DATA)}")

    def first(name: str) -> str | None:
        for candidate in (name, f"runs/{name}/model.safetensors"):
            try:
                find(candidate)
            except ValueError:
                continue
            return candidate
        return None

    full = first(data)
    if full is None:
        raise ValueError(f"no network for {data}: train it, `adadiff train {data}`, or give --models full=FILE")
    others = (first(f"{data}_{name}") for name in ("plain", "shallow", "slim"))
    folder = Path(str(resources.files("adadiff"))) / "checkpoints"
    shipped = {"widths": f"{data}_slim", "cascade": f"{data}_cascade"}
    files = {"widths": f"{data}_slim.json", "cascade": f"{data}_cascade.safetensors"}
    return Networks(full, *others, **{role: shipped[role] for role, file in files.items() if (folder / file).exists()})


@dataclass(frozen=True)
class Sweep:
    """The settings that are tried for every method. between, further_solvers: numbers of steps and solvers for plain
    networks only. estimated: solvers and numbers of steps of reuse by estimated errors."""

    steps: Sequence[int] = (4, 6, 8, 10, 14, 20, 30, 50)
    between: Sequence[int] = (5, 7, 9, 12, 17)
    solvers: Sequence[str] = ("ddim", "dpm++2m")
    further_solvers: Sequence[str] = ()
    budgets: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of policies and tables, shares of the multiply-adds
    aims: Sequence[str] = ("faithful", "distribution")
    calibrated_on: int = 256  # samples
    depths: Sequence[float] = (0.25, 0.4, 0.55, 0.7)  # shares of the blocks
    switches: Sequence[float] = (800.0, 700.0, 600.0, 500.0, 400.0, 300.0)
    shares: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the work for single thresholds
    first: Sequence[int] = (1, 3)  # first layers with exits, for single thresholds
    every: Sequence[int] = (2, 3, 5)
    changes: Sequence[float] = (0.02, 0.04, 0.08, 0.16, 0.3)  # thresholds of caches
    composed: Sequence[float] = (0.04, 0.08, 0.16)  # thresholds of caches that are combined with exits
    sent_on: Sequence[float] = (0.1, 0.3, 0.5)  # shares of a cascade's samples that go on to the teacher
    reference_steps: int = 100  # of the full network's reference images
    repeats: int = 9
    estimated: Sequence[tuple[str, int]] = (("dpm++2m", 10), ("dpm++2m", 14), ("dpm++2m", 20), ("dpm++2m", 30))
    estimated_on: int = 1024  # samples
    limit: float = 1200.0  # seconds of timing

    def __post_init__(self) -> None:
        steps = *self.steps, *self.between, *(steps for _, steps in self.estimated)
        if not self.steps or max(steps) >= self.reference_steps:
            raise ValueError(
                f"steps must be fewer than the {self.reference_steps} of the reference images, got {steps}"
            )


COARSE = Sweep(
    steps=(4, 6, 8, 10, 14, 20),
    budgets=(0.4, 0.55, 0.7, 0.9),
    depths=(0.3, 0.45),
    switches=(700.0, 500.0, 300.0),
    shares=(0.5, 0.7),
    first=(3,),
    every=(2, 3),
    changes=(0.04, 0.08, 0.16, 0.3),
    composed=(0.08, 0.16),
    sent_on=(0.3,),
    repeats=5,
    estimated=(("dpm++2m", 14), ("dpm++2m", 20), ("dpm++2m", 28)),
    limit=1800.0,
)
LARGE = dataclasses.replace(  # of large networks
    COARSE,
    steps=(6, 10, 14, 20),
    between=(4, 5, 7, 8, 9, 12, 17),
    solvers=("dpm++2m",),  # the better one of plain networks, by both measures and at all numbers of steps
    further_solvers=("ddim",),
    switches=(700.0, 500.0),
    composed=(0.16,),
    estimated=(("dpm++2m", 6), ("dpm++2m", 10), ("dpm++2m", 14), ("dpm++2m", 20)),  # 28: on letters, on no front
)
QUICK = Sweep(
    steps=(4, 8),
    between=(6,),
    solvers=("ddim",),
    budgets=(0.6,),
    calibrated_on=64,
    depths=(0.55,),
    switches=(600.0,),
    shares=(0.6,),
    first=(3,),
    every=(2,),
    changes=(0.08,),
    composed=(0.08,),
    sent_on=(0.3,),
    reference_steps=16,
    estimated=(("ddim", 8),),
    estimated_on=32,
    repeats=3,
    limit=30.0,
)
