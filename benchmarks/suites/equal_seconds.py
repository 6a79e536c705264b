"""Does early exit beat the alternatives at equal seconds? Measures quality and seconds of every method.

All methods draw the same samples (same noises, same labels). Seconds are measured separately from quality, on one
thread, in rounds in which all settings take turns. Plain networks, including DuoDiff's two, are timed in the ordinary
loop, eager and compiled, in batches of the best size, and in the engine; the other methods in the engine, eager and
compiled. The fastest way counts. Existing rows are not measured again, and an interrupted run continues with its next
setting or round. Only settings near a Pareto front are timed. For large networks, all settings are screened with a few
samples, and only those near a front are judged, on many other samples.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from shutil import copyfile

import torch
from torch import Tensor

from adadiff.diffusion.solvers import solver_from
from benchmarks.baselines import reuse
from benchmarks.baselines.alternatives import BATCH, BY_BUDGET, calibrate, methods
from benchmarks.baselines.sweeps import Networks, Sweep
from benchmarks.harness import interleave, threads
from benchmarks.report.fronts import points
from benchmarks.rows import Rows, say, versions
from benchmarks.suites import mates, screening
from benchmarks.suites.drawing import (
    Artist,
    Drawn,
    Method,
    compiled_network,
    draw,
    in_engine,
    in_plain_loop,
    kept_images,
    load,
    seeds_and_labels,
)
from benchmarks.suites.judging import Judging, judging_of_model
from benchmarks.suites.network import compiles
from benchmarks.suites.quality import depth

SUITE = "quality"
LOOP, COMPILED, ENGINE, COMPILED_ENGINE = "loop", "compiled loop", "engine", "compiled engine"
LARGER_BATCH = 2 * BATCH  # faster for shallow networks
LARGER = f"{COMPILED}, batches of {LARGER_BATCH}"
WHOLE_BATCH = ("batch mean", "cache, whole batch")
AT_ONCE, AT_ONCE_LARGE = 256, 64  # samples timed, and the engine's capacity; of large networks


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A data set, the networks that draw it, and the settings of the methods."""

    rows: Rows
    data: str
    networks: Networks
    sweep: Sweep

    def __post_init__(self) -> None:
        """Raises ValueError for networks that cannot be compared, or do not draw this data set."""
        self.networks.check()
        self.judging()

    def judging(self) -> Judging:
        return judging_of_model(self.data, self.networks.full)

    @property
    def cache(self) -> Path:
        return self.rows.folder / "cache"

    @property
    def at_once(self) -> int:
        return AT_ONCE_LARGE if self.networks.large else AT_ONCE

    def run(self, *, samples: int, runs: int, processes: int, timing: bool = True, screen: int = 0) -> None:
        """screen: number of samples for screening the settings; 0: judge all settings."""
        with Artist.of(processes) as artist:
            say(f"{self.data}: calibrations for {len(self.sweep.steps)} numbers of steps")
            folder = self.cache / "calibrated"
            picture = calibrate(self.networks, self.sweep, folder, artist)
            copyfile(picture, self.rows.folder / f"reliability-{self.data}.png")
            chosen = methods(self.networks, self.sweep, folder)
            if screen:
                chosen = self.screened(artist, chosen, screen)
            for run in range(runs):
                say(f"{self.data}: quality of {len(chosen)} settings, {samples} samples, run {run + 1} of {runs}")
                self.quality(artist, chosen, samples, run)
        mates.measure(self.rows, self.data, self.networks, self.sweep, self.judging().judge.classes)
        if timing:
            self.speed(self.near(chosen, "quality", screening.TIMED))

    def screened(self, artist: Artist, chosen: list[Method], samples: int) -> list[Method]:
        """The methods that are worth judging, those nearest to a front first."""
        say(f"{self.data}: screening of {len(chosen)} settings, {samples} samples")
        self.quality(artist, chosen, samples, screening.RUN, kind="screening")
        return list(dict.fromkeys(m for by in screening.JUDGED for m in self.near(chosen, "screening", by)))

    def near(self, chosen: list[Method], kind: str, by: Mapping[str, float]) -> list[Method]:
        """The methods whose rows of this kind are near a front, see `screening.near_a_front`."""
        near = screening.near_a_front(points(self.rows.rows, self.data, kind), by)
        kept = {(point.method, point.setting, point.steps, point.solver) for point in near}
        return [m for m in chosen if (m.name, m.setting, m.steps, m.solver) in kept]

    def quality(self, artist: Artist, chosen: Sequence[Method], samples: int, run: int, kind: str = "quality") -> None:
        """Writes the rows that are missing, one setting after the other; each is drawn and judged by one process."""
        more = {"samples": samples, "run": run, "reference_steps": self.sweep.reference_steps}
        parameters = {method: {**self.parameters(method), **more} for method in chosen}
        missing = [m for m in chosen if self.rows.find(SUITE, kind, m.name, parameters[m]) is None]
        drawing = Drawing(self.data, self.networks.full, samples, run, self.sweep.reference_steps, self.cache)
        if missing:
            drawing.reference(artist)  # drawn by all processes before each of them reads it
        found = artist.each(drawing.quality, missing, "settings")
        for method, measured in zip(missing, found, strict=True):
            self.rows.write(
                SUITE, kind, method.name, parameters[method], dtype="float32", policy=method.policy, **measured
            )

    def parameters(self, method: Method) -> dict[str, object]:
        return {
            "data": self.data,
            "setting": method.setting,
            "steps": method.steps,
            "solver": method.solver,
            "batch": BATCH,
            "calibrated_on": self.sweep.calibrated_on,
            "checkpoints": self.networks.checkpoints,
        }

    def speed(self, chosen: list[Method]) -> None:
        """Measures seconds of drawing `at_once` samples. The first variant, which is measured twice, is the full
        network."""
        missing = [m for m in chosen if self.rows.find(SUITE, "speed", m.name, self.parameters(m)) is None]
        if not missing:
            return
        say(f"{self.data}: seconds of {len(missing)} settings, {self.at_once} samples, one thread")
        with threads(1):
            inputs = seeds_and_labels(0, self.at_once, self.judging().judge.classes)
            first = max((m for m in chosen if m.name == "fewer steps"), key=lambda m: m.steps)
            compiles = can_compile(chosen, *inputs)
            variants: dict[str, Callable[[], object]] = {}
            for method in [first, *(m for m in missing if m != first)]:
                for way in ways(method, compiles):
                    variants[title(method, way)] = timed(method, way, *inputs)
            kept = self.rounds(variants)
            measured = interleave(
                variants, self.sweep.repeats, 0, limit=self.sweep.limit, kept=kept, label=f"{self.data}, seconds"
            )
            for method in missing:
                taken = {way: measured.median(title(method, way)) for way in ways(method, compiles)}
                way = min(taken, key=taken.__getitem__)
                name = title(method, way)
                self.rows.write(
                    SUITE,
                    "speed",
                    method.name,
                    self.parameters(method),
                    dtype="float32",
                    **measured.row(name),
                    rounds=list(measured.times[name].samples),
                    at_once=self.at_once,
                    seconds_per_image=measured.median(name) / self.at_once,
                    way=way,
                    ways=taken,
                )
        kept.unlink()

    def rounds(self, variants: Iterable[str]) -> Path:
        """File with the rounds of a comparison of these variants until its rows are written. Its name covers everything
        that seconds depend on."""
        what = (self.rows.machine, versions(), self.rows.commit, self.networks.checkpoints, *variants)
        return self.cache / f"rounds-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}.json"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What all settings of a run have in common. full: the network that they should reproduce; cache: folder."""

    data: str
    full: str
    samples: int
    run: int
    reference_steps: int
    cache: Path

    def reference(self, artist: Artist) -> Tensor:
        """Images of the full network with many steps; drawn once, then read."""
        method = Method("reference", self.full, steps=self.reference_steps, batch=BATCH)
        return kept_images(self.cache, artist, method, *self.seeds_and_labels(), self.run)

    def seeds_and_labels(self) -> tuple[Tensor, Tensor]:
        return seeds_and_labels(self.run, self.samples, judging_of_model(self.data, self.full).judge.classes)

    def quality(self, method: Method) -> dict[str, object]:
        """Entries of a row."""
        seeds, labels = self.seeds_and_labels()
        drawn, reference = draw(method, seeds, labels), self.reference(Artist(None))
        measured = judging_of_model(self.data, self.full).measure(drawn.images, labels, reference)
        return {**measured, **done(method, drawn, self.run)}


def ways(method: Method, compiles: bool) -> tuple[str, ...]:
    if method.policy != "full":
        return (ENGINE, COMPILED_ENGINE) if compiles else (ENGINE,)
    if method.reuse != 1:
        return (LOOP,)
    return (LOOP, ENGINE, COMPILED, LARGER) if compiles else (LOOP, ENGINE)


def can_compile(chosen: list[Method], seeds: Tensor, labels: Tensor) -> bool:
    """Compiles the networks of all methods. False, with a message, if that fails, e.g. without a C++ compiler."""
    torch.compiler.reset()
    compiled_network.cache_clear()
    calls: dict[str, Callable[[], object]] = {}
    for method in chosen:
        for way in {COMPILED, LARGER, COMPILED_ENGINE}.intersection(ways(method, True)):
            calls.setdefault(f"{method.name}, {way}", timed(method, way, seeds, labels))
    return compiles(*calls.values())


def title(method: Method, way: str) -> str:
    return f"{method.name}, {method.setting}, {method.solver}, {method.steps} steps, {way}"


def timed(method: Method, way: str, seeds: Tensor, labels: Tensor) -> Callable[[], object]:
    load(method.model)
    if way in (ENGINE, COMPILED_ENGINE):
        whole = method.name not in WHOLE_BATCH  # methods whose decisions depend on the batch keep its size
        batch, runner = len(seeds) if whole else BATCH, "compiled" if way == COMPILED_ENGINE else "eager"
        return lambda: in_engine(method, seeds, labels, batch, runner)
    return lambda: in_plain_loop(method, seeds, labels, LARGER_BATCH if way == LARGER else BATCH, compiled=way != LOOP)


def done(method: Method, drawn: Drawn, run: int) -> dict[str, object]:
    """Multiply-adds of an image and mean exit layer; for adaptive policies, run 0 also has exit histograms."""
    model = load(method.model)
    if drawn.macs is None:
        macs = reuse.macs(model.backbone, method.steps, method.reuse)
        whole = -(-method.steps // method.reuse) / method.steps
        return {"macs": macs, "mean_exit_layer": model.num_layers * whole}
    found = depth(drawn, model.num_layers)
    result = {"macs": drawn.macs[0] / len(drawn.images), "mean_exit_layer": found["mean_exit_layer"]}
    if method.name in (*BY_BUDGET, "ours, one threshold", "batch mean") and run == 0:
        table = solver_from(method.solver).table(model.schedule, method.steps)
        result |= {"exit_histogram": found["exit_histogram"], "times": [round(t, 1) for t in table.t.tolist()]}
    return result
