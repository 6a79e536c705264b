"""`calibrate`: cache thresholds for a share of the work, one per step, from a few runs of a pipeline."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..metrics.intervals import resampled
from ..model import Model
from ..policies.calibrated_cache import CalibratedCache, HeldOut
from ..policies.reuse import Cache, ReuseContext, ReusePolicy
from ..sampling.sample_batch import whole
from ..writing import check_outputs
from .calibrated_file import save_cache
from .drawing import Prompt, check_prompts, draw
from .enable import disable, enable, enabled, transformers_in
from .record import StepRecord
from .step_thresholds import Changes, between, interpolated, measured_growth, thresholds_for

LEAST = 4  # prompts: half of them choose thresholds, half of them measure these
PLACES = 8  # steps at which the error of reuse is measured
ROUNDS, MODELLED = 5, 2  # most runs to meet the budget; in the first two, thresholds come from the model of changes
CLOSE = 0.01  # shares closer than this count as equal
RESAMPLES = 1000


@dataclass(frozen=True)
class Steps(ReusePolicy):
    """Reuses at the given steps only; the changes that the gate reads are recorded."""

    steps: tuple[int, ...]
    first: int = 1
    last: int = 0
    gate: str = "residual"
    order: int = 0

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return torch.isin(context.step, torch.tensor(self.steps, dtype=torch.int64, device="cpu"))

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Run:
    """Measurements of one call of the pipeline. full: bool [S, n], whether a lane ran in full; change: float64 [S, n],
    n lanes of all halves and calls; t: float64 [S]; blocks, blocks_full: blocks run and of the full network, summed
    over lanes. head: blocks that a reusing lane ran, 0 if none reused."""

    full: Tensor
    change: Tensor
    t: Tensor
    blocks: int
    blocks_full: int
    head: int

    @staticmethod
    def of(steps: Sequence[StepRecord], num_blocks: int) -> "Run":
        """The run of all steps. Raises ValueError if some calls are not made at every step."""
        parts: dict[tuple[str, int], list[StepRecord]] = {}
        for step in steps:
            parts.setdefault((step.context, step.call), []).append(step)
        lengths = {len(part) for part in parts.values()}
        if len(lengths) != 1 or any([one.step for one in part] != list(range(len(part))) for part in parts.values()):
            raise ValueError(
                f"the calls of a step differ from step to step ({', '.join(map(str, sorted(lengths)))} steps), as with "
                "guidance at some steps only; thresholds by step do not support this"
            )
        full = torch.cat([torch.stack([one.full for one in part]) for part in parts.values()], 1)
        change = torch.cat([torch.stack([one.change for one in part]) for part in parts.values()], 1).double()
        blocks = torch.cat([torch.stack([one.blocks for one in part]) for part in parts.values()], 1)
        t = torch.stack([one.t.amax() for one in next(iter(parts.values()))])
        head = int(blocks[~full].max()) if bool((~full).any()) else 0
        return Run(full, change, t, int(blocks.sum()), num_blocks * blocks.numel(), head)


@dataclass(frozen=True)
class Calibrated:
    """The result of `calibrate`. cache: a policy for `enable`; share: of the blocks, on the choosing prompts; file:
    where it was written. Printable."""

    cache: CalibratedCache
    share: float
    file: Path | None

    def __str__(self) -> str:
        cache, held_out = self.cache, self.cache.held_out
        assert held_out is not None
        thresholds = ", ".join("never" if v < 0 else f"{v:.3g}" for v in cache.thresholds)
        lines = [
            f"{cache.transformer}, {cache.scheduler}, {len(cache.t)} steps: budget {cache.budget:.0%} of the blocks",
            f"thresholds by step: {thresholds}",
            f"choosing prompts: {self.share:.1%} of the blocks; {held_out.prompts} others: {held_out.share:.1%}",
            f"error of the others, relative to the full pipeline: {held_out.error:.3f} (95 % interval "
            f"{held_out.low:.3f} to {held_out.high:.3f})",
        ]
        return "\n".join([*lines, *([f"wrote {self.file}"] if self.file else [])])


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    budget: float = 0.6,
    *,
    path: str | Path | None = None,
    force: bool = False,
    first: int = 1,
    last: int = 0,
    gate: str = "residual",
    order: int = 0,
    blocks: Sequence[str] | None = None,
    tied: bool = False,
    seed: int = 0,
    batch: int = 4,
    progress: bool = True,
    **call: Any,
) -> Calibrated:
    """Finds thresholds of a first-block cache for `pipe`, one per step, with which a share `budget` of the blocks runs
    on average.

    pipe: a pipeline of diffusers with one transformer, not enabled. prompts: at least 4 texts, class labels, or
    mappings with the arguments of a call for one image each. Every other prompt is used to choose thresholds; the
    others measure their error. The i-th image has the seed `seed` + i. batch: texts or labels per call. call: further
    arguments of every call, such as num_inference_steps: thresholds are valid for these steps, this scheduler and this
    size. Results are compared as latents (output_type="latent") unless `call` says otherwise or the pipeline has none.
    first, last, gate, order, blocks, tied: as for `enable` and `adadiff.policies.reuse.Cache`. path: a .json file to
    write, for `enable(pipe, policy=path)`; force: replace an existing file. progress: show a progress bar.

    Draws each prompt in full once, the choosing half again up to six times (error of reuse by step, then up to five
    runs to meet the budget), and the other half once more. Deterministic. `pipe` is unchanged afterwards, also when
    interrupted. Raises ValueError for invalid arguments and, without `force`, for an existing file, before drawing
    where possible; FileExistsError for a file that appears in the meantime.
    """
    transformer = _transformer(pipe)
    check_prompts(prompts, LEAST)
    if isinstance(budget, bool) or not isinstance(budget, float | int) or not 0 < budget < 1:
        raise ValueError(f"budget must be a share of the blocks in (0, 1), got {budget!r}")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch must be a whole number of 1 or more, got {batch!r}")
    whole("seed", seed, 0)
    if many := [name for name in call if name.startswith("num_") and name.endswith("_per_prompt") and call[name] != 1]:
        raise ValueError(f"calibration takes one result of each prompt, got {many[0]}={call[many[0]]!r}")
    Cache(0.0, first, last, gate, order)  # checks them
    file = None if path is None else Path(path)
    if file is not None:
        if file.suffix != ".json":
            raise ValueError(f"path must end in .json, by which `enable` recognises it, got {file}")
        check_outputs(force, file, replaced_by="force=True")
    observe = Steps((), first, last, gate, order)
    record = enable(pipe, observe, blocks=blocks, tied=tied)
    try:
        reused = enabled(transformer)
        assert reused is not None
        count = record.num_blocks
        if budget < (least := (first + last) / count):
            raise ValueError(f"{first + last} of {count} blocks always run, {least:.3f} of them; got budget {budget}")
        chosen = list(enumerate(prompts))[::2]
        with tqdm(
            total=len(prompts) + (2 + ROUNDS) * len(chosen), disable=not progress, unit="image", desc="calibrating"
        ) as bar:
            runs = Runs(pipe, reused, seed, batch, call, bar)
            cache, share = _calibrated(runs, prompts, budget, observe, type(transformer).__name__, count, tied)
            bar.total = bar.n
    finally:
        disable(pipe)
    if file is not None:
        save_cache(cache, file, force)
    return Calibrated(cache, share, file)


class Runs:
    """Draws prompts under policies. A prompt's seed does not depend on its batch."""

    def __init__(self, pipe: Any, reused: Any, seed: int, batch: int, call: Mapping[str, Any], bar: tqdm):
        self.pipe, self._reused, self._seed, self._batch, self._call, self._bar = pipe, reused, seed, batch, call, bar

    def draw(
        self, numbered: Sequence[tuple[int, Prompt]], policy: ReusePolicy, batch: int | None = None
    ) -> Iterator[tuple[Tensor, Run]]:
        """numbered: prompts with their indices. Yields the results [n, F] and the measurements of each call."""
        size = 1 if isinstance(numbered[0][1], Mapping) else batch or self._batch
        for i in range(0, len(numbered), size):
            part = numbered[i : i + size]
            self._reused.policy = policy
            self._reused.reset()
            images = draw(self.pipe, [p for _, p in part], [self._seed + k for k, _ in part], self._call)
            steps = list(self._reused.record.steps)
            if not steps:
                raise ValueError(f"{type(self.pipe).__name__} did not call its transformer")
            if len(images) != len(part):
                raise ValueError(f"calibration takes one result of each prompt; {len(part)} made {len(images)}")
            self._bar.update(len(part))
            yield images, Run.of(steps, self._reused.record.num_blocks)


def _calibrated(
    runs: Runs, prompts: Sequence[Prompt], budget: float, observe: Steps, transformer: str, count: int, tied: bool
) -> tuple[CalibratedCache, float]:
    numbered = list(enumerate(prompts))
    chosen, others = numbered[::2], numbered[1::2]
    full, seen = [], []
    for images, run in runs.draw(chosen, observe):
        full.append(images)
        seen.append(run)
        _check_budget(budget, observe, count, len(run.t))
    images, one = torch.cat(full), _joined(seen)
    S = len(one.t)
    weights, head = _weights(runs, chosen, images, observe, S)
    num_blocks = one.blocks_full // one.full.numel()
    changes = Changes(one.change, weights, (head or observe.first + observe.last) / num_blocks)

    def cache_of(thresholds: Tensor) -> CalibratedCache:
        never = torch.where(torch.arange(S, device="cpu") == 0, -1.0, thresholds)
        return CalibratedCache(
            thresholds=tuple(never.tolist()),
            t=tuple(one.t.tolist()),
            transformer=transformer,
            blocks=count,
            scheduler=type(runs.pipe.scheduler).__name__,
            budget=float(budget),
            first=observe.first,
            last=observe.last,
            gate=observe.gate,
            order=observe.order,
            tied=tied,
        )

    found, noted = dict[float, Tensor](), list[tuple[Tensor, Tensor]]()
    for _ in range(ROUNDS):
        thresholds = between(found, budget) if len(noted) >= MODELLED else None
        if thresholds is None:
            thresholds = thresholds_for(changes, budget)
        run = _joined([run for _, run in runs.draw(chosen, cache_of(thresholds))])
        share = run.blocks / run.blocks_full
        found[share] = thresholds
        if abs(share - budget) <= CLOSE:
            break
        noted.append((run.full, run.change))
        changes = replace(changes, growth=measured_growth(noted, one.change))
    share = min(found, key=lambda share: abs(share - budget))
    cache = cache_of(found[share])
    return replace(cache, held_out=_measured(runs, others, cache, observe)), share


def _weights(
    runs: Runs, chosen: Sequence[tuple[int, Prompt]], full: Tensor, observe: Steps, S: int
) -> tuple[Tensor, int]:
    """float64 [S]: the error of the final result per unit of change, when one step alone is reused; and the number of
    blocks that ran in that step. Each prompt is drawn alone, reusing one of the steps."""
    most = min(PLACES, len(chosen), S - 1)
    places = [1 + round(i * (S - 2) / max(1, most - 1)) for i in range(most)]
    errors: dict[int, list[float]] = {}
    head = 0
    for i, numbered in enumerate(chosen):
        place = places[i % most]
        for images, run in runs.draw([numbered], replace(observe, steps=(place,)), batch=1):
            reused = ~run.full[place]
            head = max(head, run.head)
            if not bool(reused.any()):
                continue
            change = float(run.change[place][reused].mean())
            if change > 0:
                errors.setdefault(place, []).append(float(relative_errors(images, full[i : i + 1])) / change)
    return interpolated({place: sum(found) / len(found) for place, found in errors.items()}, S), head


def _measured(runs: Runs, others: Sequence[tuple[int, Prompt]], cache: CalibratedCache, observe: Steps) -> HeldOut:
    full = torch.cat([images for images, _ in runs.draw(others, observe)])
    drawn = list(runs.draw(others, cache))
    run = _joined([run for _, run in drawn])
    errors = relative_errors(torch.cat([images for images, _ in drawn]), full)
    means = torch.stack([errors[rows].mean() for rows in resampled(len(errors), RESAMPLES, seed=0)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype, device="cpu")).tolist()
    return HeldOut(run.blocks / run.blocks_full, float(errors.mean()), low, high, len(others))


def relative_errors(images: Tensor, full: Tensor) -> Tensor:
    """|images - full| / |full|, float64 [n]. images, full: float64 [n, F]."""
    return (images - full).norm(dim=1) / full.norm(dim=1).clamp_min(1e-30)


def _joined(runs: Sequence[Run]) -> Run:
    """All runs as one, with the lanes of all. Raises ValueError for different numbers of steps."""
    if len({len(run.t) for run in runs}) != 1:
        raise ValueError("prompts take different numbers of steps; give num_inference_steps")
    return Run(
        torch.cat([run.full for run in runs], 1),
        torch.cat([run.change for run in runs], 1),
        runs[0].t,
        sum(run.blocks for run in runs),
        sum(run.blocks_full for run in runs),
        max(run.head for run in runs),
    )


def _check_budget(budget: float, observe: Steps, count: int, S: int) -> None:
    least = (1 + (S - 1) * (observe.first + observe.last) / count) / S
    if S < 2 or budget < least:
        raise ValueError(f"{S} steps, the first in full, run at least {least:.3f} of the blocks, got budget {budget}")


def _transformer(pipe: Any) -> nn.Module:
    if isinstance(pipe, Model):
        raise ValueError("a Model is calibrated by adadiff.calibration.calibrating.Calibrating or `adadiff calibrate`")
    found = [] if isinstance(pipe, nn.Module) else list(transformers_in(pipe).values())
    if len(found) != 1:
        raise ValueError(f"calibrate takes a pipeline with one transformer; {type(pipe).__name__} has {len(found)}")
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"calibrate takes a pipeline with its scheduler; {type(pipe).__name__} has none")
    return found[0]
