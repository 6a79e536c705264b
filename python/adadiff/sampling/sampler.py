"""Samples n images, `batch` at a time; the next sample starts when one has finished."""

import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..forward.forward import check_execution
from ..forward.options import ExecutionOptions
from ..forward.two_stage import two_stage
from ..model import Model
from .batch import Batch
from .params import SamplingParams
from .records import RunRecord
from .reports import Report, Totals
from .sample_batch import SampleBatch, whole


def sample(
    model: Model,
    n: int,
    params: SamplingParams | None = None,
    *,
    batch: int = 64,
    execution: ExecutionOptions | None = None,
    shallow_model: Model | None = None,
    t_switch: float | None = None,
    progress: bool = False,
    **settings: object,
) -> tuple[Tensor, Report]:
    """Draws n samples, `batch` of them at a time.

    params: sampling parameters; settings: the same by name (`sample(model, 16, steps=20, policy="exit:0.1")`).
    execution: how forward passes are run. shallow_model: a shallower model of the same samples that replaces `model` at
    noisy timesteps, t_switch (the network's time, 0..1000; default 700) and above, whatever the policy (DuoDiff).
    progress: show a progress bar.
    Returns float32 [n, C, H, W] on the CPU in sample order (images nominally in [-1, 1], not clipped, or latents), and
    the report. n = 0 returns an empty tensor and report.
    Raises ValueError for invalid arguments, before any work, and FloatingPointError for a sample with NaN or infinity
    (large guidance scales overflow), as `SamplerRun`, pipelines, the command line and, for that request alone, `Engine`
    do. `trace` returns such values for inspection.
    """
    options = {"batch": batch, "execution": execution, "shallow_model": shallow_model, "t_switch": t_switch}
    run = SamplerRun(model, n, params, **options, progress=progress, **settings)
    images = torch.empty(n, *model.backbone.sample_shape, dtype=torch.float32, device="cpu")
    for index, finished in run:
        images[index] = finished.cpu()
    return images, run.report


def check_finite(
    index: Tensor, images: Tensor, seeds: Tensor
) -> tuple[tuple[Tensor, Tensor], FloatingPointError | None]:
    """Splits off samples with NaN or infinity. index: int64 [k]; images: float [k, ...], of these samples; seeds: of
    all samples. Returns index and images of the finite ones, and an error that names the first other one, or None."""
    finite = images.flatten(1).isfinite().all(1).cpu()
    if bool(finite.all()):
        return (index, images), None
    first = int(index[~finite][0])
    error = FloatingPointError(
        f"sample {first} (seed {int(seeds[first])}) holds NaN or infinity; large guidance scales and float16 overflow"
    )
    return (index[finite], images[finite.to(images.device)]), error


class SamplerRun:
    """As `sample`, image by image: iterating yields (index int64 [k], images float32 [k, C, H, W]) as samples finish.
    `report`: the report so far. Raises FloatingPointError for a sample with NaN or infinity, after yielding the samples
    that finished with it."""

    def __init__(
        self,
        model: Model,
        n: int,
        params: SamplingParams | None = None,
        *,
        batch: int = 64,
        execution: ExecutionOptions | None = None,
        shallow_model: Model | None = None,
        t_switch: float | None = None,
        progress: bool = False,
        **settings: object,
    ):
        whole("batch", batch, 1)
        self._choice = two_stage(model, shallow_model, t_switch)
        self.samples = SampleBatch.of(model, n, params, **settings)
        self.execution = execution or ExecutionOptions()
        check_execution(self.execution, (self.samples.policy,), model.device)
        self.model, self.n, self.batch, self.progress = model, n, min(batch, n), progress
        self._clear()

    def _clear(self) -> None:
        samples, most = self.samples, int(self.samples.rows.max()) if self.n else 0
        kinds = {"reuses": samples.parts.reuse is not None, "cascade": samples.draft is not None}
        self._record = RunRecord(most, self.n, self.model.num_layers, samples.record_scores, **kinds)
        self._totals = Totals()
        self._seconds = 0.0

    @property
    def report(self) -> Report:
        return self._record.report(self._totals, self._seconds)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._clear()
        batch = Batch(self.model, self.batch, execution=self.execution, choice=self._choice)
        begun, of = 0, dict[tuple[int, int], int]()  # (slot, tenancy) -> sample
        # without progress not even a disabled bar: tqdm uses a lock that a signal could leave held
        with tqdm(total=self.n, unit="image", dynamic_ncols=True) if self.progress else nullcontext() as bar:
            while begun < self.n or batch.count:
                started = time.perf_counter()
                if new := min(self.n - begun, batch.free):
                    slots = batch.admit(self.samples, np.arange(begun, begun + new))
                    of |= {(slot, batch.tenancy(slot)): begun + i for i, slot in enumerate(slots.tolist())}
                    begun += new
                tick = batch.tick()
                if tick.failed:
                    raise next(iter(tick.failed.values()))
                for record in tick.records:
                    keys = zip(record.slots.tolist(), record.tenancy.tolist(), strict=True)
                    self._record.add(record, np.array([of[key] for key in keys]))
                self._totals = batch.totals
                if len(tick.done):
                    index = [of.pop((slot, batch.tenancy(slot))) for slot in tick.done.tolist()]
                    finished = torch.tensor(index, dtype=torch.int64, device="cpu"), batch.take(tick.done)
                self._seconds += time.perf_counter() - started
                if bar is not None and len(tick.done):
                    bar.update(len(tick.done))
                    bar.set_postfix(depth=f"{batch.totals.mean_exit_layer:.2f}/{self.model.num_layers}")
                if len(tick.done):
                    finite, error = check_finite(*finished, self.samples.seeds)
                    if len(finite[0]):
                        yield finite
                    if error is not None:
                        raise error
        self._totals.log_idle(str(self.samples.parts))
