"""The trained digits model: speed of each way of sampling, and the cost of uncertainties if no sample exits.

Every sampler is DDIM, and all samples run in lockstep, so a tick is a step. Quality is measured in quality.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

import adadiff
from adadiff import Model, Report
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.solvers import DDIM
from adadiff.diffusion.tables import pack
from adadiff.policies.exits import Full, Threshold
from adadiff.policies.interface import ExitPolicy
from adadiff_kernels import solver_step
from benchmarks.baselines.attainable import Call, PlainPieces, rows_per_layer, share_of_flop_ideal
from benchmarks.harness import Comparison, best_micro_batch, interleave
from benchmarks.rows import Rows, dtype_name, machine, say
from benchmarks.suites import drawing
from benchmarks.suites.drawing import STEPS, lockstep, policy_of, seeds_and_labels
from benchmarks.suites.network import in_batches
from benchmarks.suites.quality import SUITE

MODEL = "digits"
PLAIN_MODEL = "digits_plain"  # trained with the same budget, without exits
THRESHOLDS = ("0.07", "0.115", "0.135,first=3", "0.18,first=3")  # as in the rows, see `policy_of`
FEWER_STEPS = (12, 8)
SAMPLES = 256  # of one timed run, all in one batch
OVERHEAD_BATCH = 64  # the default batch of adadiff.sample
NOBODY = 1e-6  # a threshold below every uncertainty
GRID = 12  # single blocks are timed on SAMPLES * i / GRID rows


@dataclass
class Variants:
    """Ways of sampling the same seeds and labels, by title; variants of the engine have a report."""

    model: Model
    samples: int
    steps: int
    calls: dict[str, Call] = field(default_factory=dict)
    settings: dict[str, tuple[str, str | int | None]] = field(default_factory=dict)  # title -> method, setting
    reports: dict[str, Report] = field(default_factory=dict)

    def plain(self, name: str, model: Model, batch: int, steps: int, setting: int | None = None) -> None:
        seeds, labels = seeds_and_labels(0, self.samples)
        self._add(name, setting, lambda: lockstep(model.backbone, model.schedule, seeds, labels, steps, batch))

    def engine(self, name: str, policy: str, setting: str | None = None) -> Report:
        """Adds a variant of the engine and runs it once, for its report and to warm up."""
        seeds, labels = seeds_and_labels(0, self.samples)
        settings = {
            "steps": self.steps,
            "policy": policy,
            "seed": seeds,
            "class_labels": labels,
            "batch": self.samples,
        }
        title = self._add(name, setting, lambda: adadiff.sample(self.model, self.samples, **settings))
        _, self.reports[title] = self.calls[title]()
        return self.reports[title]

    def _add(self, name: str, setting: str | int | None, call: Callable[[], object]) -> str:
        title = name if setting is None else f"{name} {setting}"
        self.calls[title], self.settings[title] = call, (name, setting)
        return title


def speed(
    rows: Rows,
    thresholds: Sequence[str] = THRESHOLDS,
    fewer: Sequence[int] = FEWER_STEPS,
    *,
    model: str = MODEL,
    plain_model: str = PLAIN_MODEL,
    samples: int = SAMPLES,
    steps: int = STEPS,
    repeats: int = 5,
    limit: float = 60.0,
    grid: int = GRID,
) -> None:
    """Measures images per second of every method, interleaved with each other and with single blocks of the plain
    network."""
    say(f"digits: speed, {samples} samples of {steps} steps, {torch.get_num_threads()} thread(s)")
    joint = drawing.load(model)
    seeds, labels = seeds_and_labels(0, samples)
    x, t = initial_noise(seeds, joint.backbone.sample_shape), torch.full((samples,), 500.0)
    best = best_micro_batch(lambda m: joint.backbone(x[:m], t[:m], labels[:m]), samples)

    variants = Variants(joint, samples, steps)
    variants.plain("full", joint, samples, steps)
    if best < samples:
        variants.plain("full, batches of", joint, best, steps, setting=best)
    baselines = list(variants.calls)
    for count in fewer:
        variants.plain("fewer steps", joint, best, count, setting=count)
    variants.plain("plain, equal budget", drawing.load(plain_model), best, steps)
    variants.engine("engine, no exits", "full")
    variants.engine("engine, nobody leaves", f"exit:{NOBODY}")
    for threshold in thresholds:
        mean = variants.engine("early exit", policy_of(threshold), threshold).mean_exit_layer
        variants.engine("fixed depth", f"exit:depth={mean:.4f}", threshold)

    counts = {max(1, samples * i // grid) for i in range(grid + 1)}
    pieces = PlainPieces(joint.backbone, (x, t, labels), {"in": counts, "out": counts}, {best})
    tables = pack([DDIM().table(joint.schedule, steps)])
    state, table = tables.start(x), np.zeros(samples, dtype=np.int64)

    def solver() -> None:
        _, coefficients = tables.rows(table, table)
        solver_step(state, torch.zeros_like(x), coefficients)

    measured = interleave(
        {**variants.calls, **pieces.variants(), "solver": solver},
        repeats,
        warmup=0,
        turn=0.02,
        limit=limit,
        label="digits, speed",
    )
    write(rows, variants, measured, baselines, pieces)


def write(rows: Rows, variants: Variants, measured: Comparison, baselines: Sequence[str], pieces: PlainPieces) -> None:
    n, L = variants.samples, variants.model.num_layers
    fastest = min(baselines, key=measured.median)
    for title, (name, setting) in variants.settings.items():
        seconds = measured.median(title)
        speedup = measured.ratio(fastest, title).median
        results: dict[str, object] = {}
        if title in variants.reports:
            report = variants.reports[title]
            counts = [rows_per_layer(step, L) for step in report.exit_layer[..., 0]]
            attainable = sum(pieces.seconds(measured, count) + measured.median("solver") for count in counts)
            results = {
                "mean_exit_layer": report.mean_exit_layer,
                "blocks": report.blocks,
                "blocks_full": report.blocks_full,
                "macs": report.macs,
                "macs_full": report.macs_full,
                "share_of_attainable": attainable / seconds,
                "share_of_flop_ideal": share_of_flop_ideal(speedup, report.macs, report.macs_full),
                "rows_moved": report.rows_moved,
            }
        rows.write(
            SUITE,
            "speed",
            name,
            {"setting": setting, "steps": setting if name == "fewer steps" else variants.steps, "samples": n},
            dtype="float32",
            **measured.row(title),
            images_per_second=n / seconds,
            speedup=speedup,
            fastest_plain=fastest,
            **results,
        )


def overhead(
    rows: Rows,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    *,
    model: str = MODEL,
    batch: int = OVERHEAD_BATCH,
    repeats: int = 60,
    limit: float = 15.0,
) -> None:
    """Measures forward passes without exits, with and without uncertainties."""
    for dtype in dtypes:
        emulated = dtype == torch.bfloat16 and not machine()["bfloat16"]
        say(f"digits: cost of scoring, {dtype_name(dtype)}{' (emulated on this CPU)' if emulated else ''}")
        _overhead(rows, adadiff.load(model).to(dtype), dtype, batch, repeats, limit)


def _overhead(rows: Rows, model: Model, dtype: torch.dtype, batch: int, repeats: int, limit: float) -> None:
    backbone = model.backbone
    seeds, labels = seeds_and_labels(0, batch)
    x, t = initial_noise(seeds, backbone.sample_shape), torch.linspace(0, 999, batch)

    def engine(policy: ExitPolicy) -> Call:
        return lambda: adadiff.forward(model, x, t, labels, policy=policy)

    calls: dict[str, Call] = {"plain, one batch": lambda: backbone(x, t, labels)}
    best = best_micro_batch(lambda m: backbone(x[:m], t[:m], labels[:m]), batch)
    if best < batch:
        calls[f"plain, batches of {best}"] = in_batches(backbone, (x, t, labels), best)
    baselines = list(calls)
    calls |= {"engine, no exits": engine(Full()), "engine, nobody leaves": engine(Threshold(NOBODY))}
    measured = interleave(calls, repeats, turn=0.05, limit=limit, label=f"cost of scoring, {dtype_name(dtype)}")
    fastest = min(baselines, key=measured.median)
    for name in calls:
        rows.write(
            SUITE,
            "overhead",
            name,
            {"batch": batch},
            dtype=dtype_name(dtype),
            **measured.row(name),
            fastest_plain=fastest,
            overhead=measured.ratio(name, fastest).median - 1,
        )
