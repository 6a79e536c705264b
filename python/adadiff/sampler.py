"""The sampling loop. Every sample carries its own seed, label, step count, step index, guidance and threshold."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from adadiff_kernels import SolverState, guide, solver_step

from .engine import evaluate
from .model import Model
from .noise import initial_noise, step_noise
from .rules import Rule, layers_asked, rule_from
from .solvers import Solver, pack, solver_from


@dataclass(frozen=True)
class Report:
    """What a run did. exit_layer: uint8 [steps, n, 2], blocks run at each step by each sample's lanes (conditional,
    unconditional), 0 where there was no evaluation. Multiply-adds count network and scores, not the solver."""

    exit_layer: Tensor
    layers: int
    macs: int
    macs_full: int
    rows_moved: int
    seconds: float

    @property
    def evaluations(self) -> int:
        return int((self.exit_layer > 0).sum())

    @property
    def blocks(self) -> int:
        return int(self.exit_layer.sum())

    @property
    def blocks_full(self) -> int:
        return self.evaluations * self.layers

    @property
    def mean_exit_layer(self) -> float:
        return self.blocks / self.evaluations if self.evaluations else math.nan

    def __str__(self) -> str:
        n = self.exit_layer.shape[1]
        if not self.evaluations:
            return f"{n} samples, nothing to evaluate"
        return (
            f"{n} samples in {self.seconds:.2f} s ({n / self.seconds:.1f}/s); mean exit layer "
            f"{self.mean_exit_layer:.2f} of {self.layers}; {self.blocks / self.blocks_full:.1%} of the blocks, "
            f"{self.macs / self.macs_full:.1%} of the multiply-adds of the full network"
        )


def sample(model: Model, n: int, **settings: object) -> tuple[Tensor, Report]:
    """Draws n samples; `settings` are those of `Sampling`.

    Returns float32 [n, C, H, W] in slot order (nominally in [-1, 1], not clipped; latents for latent models), and the
    report. n = 0 returns empty ones.
    """
    sampling = Sampling(model, n, **settings)
    images = torch.empty(n, *model.backbone.sample_shape)
    for slots, finished in sampling:
        images[slots] = finished.cpu()
    return images, sampling.report


class Sampling:
    """A run of n samples, `batch` of them at a time. Iterating draws them: yields (slots int64 [k], images
    [k, C, H, W]) as samples finish; when one finishes, the next takes its place. `report` tells what was done so far.

    steps: an int, or one per sample. solver: "ddim", "ddim:ETA", "ddpm", "dpm++2m" or a Solver.
    rule: "full", "threshold:0.07", "patience:0.08", "depth:8", "batch-mean:0.07" or a Rule.
    thresholds: one per sample, instead of the rule's. seeds: one int in [0, 2^63) per sample (default 0..n-1); a
    sample is a function of its seed, not of its batch. labels: one class per sample, None for none (the null class).
    guidance: scale s of cond + s (cond - uncond), a number or one per sample; 0 is none.
    tied: the two lanes of a guided sample leave together, by the larger uncertainty.
    Raises ValueError for anything that does not fit, before any work.
    """

    def __init__(
        self,
        model: Model,
        n: int,
        *,
        steps: int | Sequence[int] = 50,
        solver: str | Solver = "ddim",
        rule: str | Rule = "full",
        thresholds: Sequence[float] | Tensor | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        labels: Sequence[int] | Tensor | None = None,
        guidance: float | Sequence[float] | Tensor = 0.0,
        tied: bool = False,
        batch: int = 64,
        progress: bool = False,
    ):
        _whole("n", n, 0)
        _whole("batch", batch, 1)
        self.model, self.n, self.tied, self.progress = model, n, tied, progress
        self.batch = min(batch, n)
        self.rule = rule_from(rule)
        asked = layers_asked(self.rule, model.layers)
        if model.exits is None and asked:
            raise ValueError("this model has no exits; sample it with rule='full'")
        self.thresholds = None
        if thresholds is None and self.rule.threshold is None and asked:
            raise ValueError(f"{self.rule} has no threshold of its own; give one per sample")
        if thresholds is not None:
            self.thresholds = _per_sample("thresholds", thresholds, n, torch.float32)
            self.rule.check(self.thresholds)
        self.seeds = torch.arange(n) if seeds is None else _per_sample("seeds", seeds, n, torch.int64)
        if n and int(self.seeds.min()) < 0:
            raise ValueError(f"seeds must be >= 0, got {int(self.seeds.min())}")
        self.labels = _labels(model, labels, n)
        self.guidance = _per_sample("guidance", guidance, n, torch.float32)
        if bool(self.guidance.ne(0).any()) and model.config.null_label is None:
            raise ValueError("guidance needs a model with a null class")
        counts = _per_sample("steps", steps, n, torch.int64).tolist()
        solver = solver_from(solver) if isinstance(solver, str) else solver
        if not hasattr(solver, "table"):
            raise ValueError(f"a solver is a Solver or a spelling such as 'ddim', got {solver!r}")
        distinct = sorted(set(counts)) or [1]
        self._tables = pack([solver.table(model.schedule, count) for count in distinct])
        self._steps = torch.tensor(counts, dtype=torch.int64)
        self._table = torch.tensor([distinct.index(count) for count in counts], dtype=torch.int64)
        self._exit_layer = torch.zeros(max(counts, default=0), n, 2, dtype=torch.uint8)
        self._clear()

    def _clear(self) -> None:
        self._exit_layer.zero_()
        self._macs = self._macs_full = self._moved = 0
        self._seconds = 0.0

    @property
    def report(self) -> Report:
        return Report(
            self._exit_layer.clone(), self.model.layers, self._macs, self._macs_full, self._moved, self._seconds
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._clear()
        shape = self.model.backbone.sample_shape
        slot = torch.arange(self.batch)  # place -> sample
        step = torch.zeros(self.batch, dtype=torch.int64)  # by place
        state = self._tables.start(initial_noise(self.seeds[slot], shape))
        waiting = self.batch
        places = torch.arange(self.batch)  # those in use
        bar = tqdm(total=self.n, disable=not self.progress, unit="image", dynamic_ncols=True)
        with bar:
            while len(places):
                started = time.perf_counter()
                self._tick(state, places, slot[places], step[places])
                step[places] += 1
                done = places[step[places] == self._steps[slot[places]]]
                finished = slot[done], state.x[done]
                # the next in line take the places of the finished
                taken = done[: self.n - waiting]
                slot[taken] = torch.arange(waiting, waiting + len(taken))
                step[taken] = 0
                state.restart(taken, initial_noise(self.seeds[slot[taken]], shape))
                waiting += len(taken)
                places = places[~torch.isin(places, done[len(taken) :])]
                self._seconds += time.perf_counter() - started
                if len(done):
                    bar.update(len(done))
                    bar.set_postfix(depth=f"{self.report.mean_exit_layer:.2f}/{self.model.layers}")
                    yield finished

    def _tick(self, state: SolverState, places: Tensor, slots: Tensor, step: Tensor) -> None:
        """One evaluation of the network, and one solver step, for the samples `slots`, which lie at `places`."""
        k = len(slots)
        t, rows = self._tables.rows(self._table[slots], step)
        scale = self.guidance[slots]
        guided = scale.nonzero().squeeze(1)
        lanes = torch.cat([torch.arange(k), guided])  # lane -> position in slots; the unconditional ones last
        labels, pairs = None, None
        if self.labels is not None:
            null = torch.full_like(guided, self.model.config.null_label or 0)
            labels = torch.cat([self.labels[slots], null])
        if self.tied and len(guided):
            pairs = torch.arange(len(lanes))
            pairs[guided], pairs[k:] = pairs[k:].clone(), guided
        result = evaluate(
            self.model.backbone,
            self.model.exits,
            self.rule,
            state.x[places][lanes],
            t[lanes],
            labels,
            threshold=None if self.thresholds is None else self.thresholds[slots][lanes],
            pairs=pairs,
        )
        eps = result.eps[:k].float()
        if len(guided):
            eps[guided] = guide(eps[guided], result.eps[k:], scale[guided])
        z = None
        if rows.noise:
            z = step_noise(self.seeds[slots], step, self.model.backbone.sample_shape)
        solver_step(state, eps, rows, places, z)
        self._exit_layer[step, slots, 0] = result.exit_layer[:k].to(torch.uint8)
        self._exit_layer[step[guided], slots[guided], 1] = result.exit_layer[k:].to(torch.uint8)
        self._macs += result.macs
        self._macs_full += result.macs_full
        self._moved += result.moved


def _whole(name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _per_sample(name: str, value: object, n: int, dtype: torch.dtype) -> Tensor:
    """A number for all, or one per sample, as a tensor [n]. Whole numbers must be given where they are meant."""
    try:
        given = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be a number or {n} numbers, got {value!r}: {error}") from None
    whole = not given.dtype.is_floating_point and given.dtype != torch.bool
    if dtype == torch.int64 and not whole and given.numel():
        raise ValueError(f"{name} must be whole numbers, got {value!r}")
    if given.ndim == 0 and name != "seeds":
        given = given.expand(n)
    if given.shape != (n,):
        raise ValueError(f"{name} must hold one number per sample, {n}, got shape {tuple(given.shape)}")
    given = given.to(dtype)
    if not bool(torch.isfinite(given).all()):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if name == "steps" and n and int(given.min()) < 1:
        raise ValueError(f"steps must be at least 1, got {int(given.min())}")
    return given


def _labels(model: Model, labels: Sequence[int] | Tensor | None, n: int) -> Tensor | None:
    config = model.config
    if config.network.context_tokens:
        raise ValueError("sampling from text needs the text's context, which this function does not take yet")
    if not config.network.num_classes:
        if labels is not None:
            raise ValueError("this model has no classes; leave labels out")
        return None
    if labels is None:
        if config.null_label is None:
            raise ValueError(f"this model needs labels in 0..{config.classes - 1}")
        return torch.full((n,), config.null_label)
    labels = _per_sample("labels", labels, n, torch.int64)
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < config.classes:
        raise ValueError(f"labels must be in 0..{config.classes - 1}, got {sorted(set(labels.tolist()))[:8]}")
    return labels
