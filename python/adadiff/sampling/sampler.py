"""Sampling n images: `batch` of them at a time, each finished one making room for the next."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ..forward.counts import Counts, counts_from
from ..forward.forward import check_compiled
from ..forward.two_stage import two_stage
from ..model import Model
from .batch import Batch
from .reports import Report, Totals
from .samples import SampleBatch, whole


def sample(model: Model, n: int, **settings: object) -> tuple[Tensor, Report]:
    """Draws n samples; `settings` are those of `SamplerRun`.

    Returns float32 [n, C, H, W] in slot order (nominally in [-1, 1], not clipped; latents for latent models), and the
    report. n = 0 returns empty ones.
    """
    sampling = SamplerRun(model, n, **settings)
    images = torch.empty(n, *model.backbone.sample_shape)
    for slots, finished in sampling:
        images[slots] = finished.cpu()
    return images, sampling.report


class SamplerRun:
    """A run of n samples, `batch` of them at a time. Iterating draws them: yields (slots int64 [k], images
    [k, C, H, W]) as samples finish; when one finishes, the next takes its place. `report` tells what was done so far.

    settings: what the samples ask for, see `SampleBatch.of` (steps, solver, rule, thresholds, seeds, labels, guidance,
    tied, context, start, strength). batch_invariant: a sample is the same bits in any batch, at some cost.
    counts: how the host learns who still runs, see `evaluate`. compiled: see there.
    shallow_model: a shallower model of the same samples that takes the place of `model` at the noisy timesteps, those
    of t_switch (in the network's time; default 700) and above, whatever the rule (DuoDiff).
    Raises ValueError for anything that does not fit, before any work.
    """

    def __init__(
        self,
        model: Model,
        n: int,
        *,
        batch: int = 64,
        batch_invariant: bool = False,
        counts: Counts | str | None = None,
        compiled: bool = False,
        shallow_model: Model | None = None,
        t_switch: float | None = None,
        progress: bool = False,
        **settings: object,
    ):
        whole("batch", batch, 1)
        self._evaluate = two_stage(model, shallow_model, t_switch)
        self.samples = SampleBatch.of(model, n, **settings)
        self.model, self.n, self.progress = model, n, progress
        self.batch, self.batch_invariant = min(batch, n), batch_invariant
        self.counts, self.compiled = counts_from(counts, batch_invariant), compiled
        check_compiled(compiled, batch_invariant)
        self._clear()

    def _clear(self) -> None:
        most = int(self.samples.steps.max()) if self.n else 0
        self._exit_layer = torch.zeros(most, self.n, 2, dtype=torch.uint8)
        self._totals = Totals()
        self._seconds = 0.0

    @property
    def report(self) -> Report:
        done = self._totals
        return Report(
            self._exit_layer.clone(), self.model.layers, done.macs, done.macs_full, done.rows_moved, self._seconds
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._clear()
        own = {"batch_invariant": self.batch_invariant, "counts": self.counts, "compiled": self.compiled}
        batch = Batch(self.model, self.batch, **own, evaluate=self._evaluate)
        slot = torch.zeros(self.batch, dtype=torch.int64)  # place -> sample
        begun = 0
        bar = tqdm(total=self.n, disable=not self.progress, unit="image", dynamic_ncols=True)
        with bar:
            while begun < self.n or batch.count:
                started = time.perf_counter()
                new = torch.arange(begun, min(self.n, begun + batch.free))
                if len(new):
                    slot[batch.admit(self.samples, new)] = new
                    begun += len(new)
                tick = batch.tick()
                if tick.failed:
                    raise next(iter(tick.failed.values()))
                self._exit_layer[tick.step, slot[tick.places]] = tick.exit_layer
                self._totals = batch.totals
                finished = slot[tick.done], batch.take(tick.done)
                self._seconds += time.perf_counter() - started
                if len(tick.done):
                    bar.update(len(tick.done))
                    bar.set_postfix(depth=f"{batch.totals.mean_exit_layer:.2f}/{self.model.layers}")
                    yield finished
