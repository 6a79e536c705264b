"""Calibration of exit thresholds: record full runs, weight the errors, choose thresholds, measure on fresh samples."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import canvases
from ..data.glyphs import CHARACTERS, SIZE
from ..metrics.canvases import canvas_features
from ..metrics.features import digits_network
from ..metrics.frechet import FeatureStatistics, frechet_distance
from ..metrics.letters import letters_features
from ..metrics.quality import lower_quantile, paired_psnr
from ..model import Model
from ..output.pictures import CHANNELS
from ..policies.calibrated import (
    NEAR,
    Budget,
    CalibratedDepths,
    CalibratedThresholds,
    Calibration,
    Measured,
    Tables,
)
from ..policies.interface import ExitPolicy
from ..sampling.sample_batch import SampleBatch, whole
from ..sampling.sampler import sample
from .kept_runs import KeptRuns, number
from .recording import Extractor, Recording, measure_weights, record
from .refitting import Refitting, refitted
from .stopping import Work, adaptive_table, mixed, static_table

AIMS = ("faithful", "distribution")
CALIBRATION_SEED = 1 << 32  # far from the seeds 0, 1, ... that samples have by default
PLACES = 8
LAYERS_PERTURBED = 2
ROUNDS = 4  # of adjusting thresholds until runs that exit early meet the budget
CLOSE = 0.003
RESAMPLES = 1000
_Errors = tuple[Measured, Tensor]  # with the errors of the samples, float64 [n]


def work_of(model: Model) -> Work:
    """Multiply-adds of one lane, for each exit layer."""
    network, exits = model.backbone, model.exits
    patches = network.tokens - network.num_prefix_tokens
    blocks = torch.tensor([block.macs(network.tokens) for block in network.blocks], dtype=torch.float64, device="cpu")
    exiting = blocks.cumsum(0) + sum(network.stem_and_head_macs())
    exiting[:-1] += exits.head_macs(patches)
    return Work(exiting, exits.macs(patches))


class Calibrating:
    """Chooses exit thresholds for every timestep and layer, for each of `budgets`, shares in (0, 1] of the full
    network's multiply-adds.

    features: images float [n, C, H, W] in [-1, 1] -> [n, F]; default: those of digits, canvases or letters, if the
    model draws these. The mean error of exiting at a timestep and layer is measured between features of the predicted
    images, because later steps mostly correct what features do not see. Between samples, this error is distributed in
    proportion to that of the network's prediction, which is used alone if there are no features.
    aim: how errors of different timesteps are weighted: "faithful" by their effect on each image (mean squared
    difference), "distribution" by their effect on the Fréchet distance between the features of all images.
    n samples, with seeds from `seed` on, are recorded; n others measure the result. Deterministic.
    text_embeds: [P, N, E], null_text_embeds: [N, E], for models that take text; samples use the prompts in turn.
    refit: first fit the UEMs anew on another n samples (see refitting.py).
    After `run`, `model` is a copy with the calibration and its UEMs, which shares network and heads with the model
    passed in (left unchanged), and `recording` holds the recorded runs. Raises ValueError for invalid arguments, before
    any work.
    """

    def __init__(
        self,
        model: Model,
        budgets: Sequence[float],
        *,
        aim: str = "faithful",
        n: int = 256,
        steps: int = 50,
        solver: str = "ddim",
        guidance_scale: float = 1.0,
        seed: int = CALIBRATION_SEED,
        batch: int = 64,
        features: Extractor | None = None,
        refit: bool = False,
        text_embeds: Tensor | None = None,
        null_text_embeds: Tensor | None = None,
    ):
        if model.exits is None:
            raise ValueError("this model has no exits to calibrate; `adadiff train --recipe frozen` adds them")
        if model.config.network.context_tokens and (text_embeds is None or not len(text_embeds)):
            raise ValueError("this model takes text; give text_embeds, [P, N, E], of the prompts to calibrate for")
        if not budgets or any(not 0 < share <= 1 for share in budgets):
            raise ValueError(f"budgets are shares of the full network's work in (0, 1], got {list(budgets)}")
        if any(b - a < 2 * NEAR for a, b in zip(sorted(budgets), sorted(budgets)[1:], strict=False)):
            raise ValueError(f"budgets must differ, got {list(budgets)}")
        if aim not in AIMS:
            raise ValueError(f"aim must be one of {', '.join(AIMS)}, got {aim!r}")
        whole("n", n, 8)
        whole("batch", batch, 1)
        self._work = work_of(model)
        least = float(self._work.exiting[0] + self._work.score) / self._work.full
        if min(budgets) < least:
            raise ValueError(
                f"the least that this network can run is {least:.3f} of its work, got a budget of {min(budgets)}"
            )
        self.model, self.budgets, self.aim = model, sorted(budgets), aim
        self.n, self.steps, self.solver, self.guidance_scale = n, steps, solver, guidance_scale
        self.seed, self.batch, self.refit = seed, batch, refit
        self._texts = text_embeds, null_text_embeds
        self._features = features or default_features(model)
        if aim == "distribution" and self._features is None:
            raise ValueError("no features are known for this model's images; give some, or take the aim 'faithful'")
        self._samples(n, seed)  # raises for invalid settings
        self._kept = KeptRuns()
        self.recording: Recording | None = None

    def run(self, progress: bool = False, kept: KeptRuns | None = None) -> Calibration:
        """kept: keeps the results of the runs, and has those of an earlier attempt."""
        self._kept = kept or KeptRuns()
        runs = 2 + self.refit + PLACES * LAYERS_PERTURBED + len(self.budgets) * (ROUNDS + 3)
        with tqdm(total=runs, disable=not progress, unit="run", dynamic_ncols=True) as bar:
            return self._run(bar)

    def _run(self, bar: tqdm) -> Calibration:
        if self.refit:
            self.model = refitted(self.model, **self._kept.run("refit", self._refit))
            bar.update()
        else:
            self.model = copy.copy(self.model)  # shares the parameters
        model = self.model
        self.recording = recording = Recording(**self._kept.run("recording", self._recorded))
        bar.update()
        first = self._samples(min(self.n, self.batch), self.seed)
        weights = measure_weights(
            model, first, recording, self._distance, batch=self.batch, places=PLACES, tick=bar.update, kept=self._kept
        )
        error = recording.error.double() * weights[:, None, None]
        full = self._kept.run("full", self._full)["images"]
        bar.update()
        budgets = []
        for share in self.budgets:
            thresholds, spent = self._meet(share, error, bar)
            depths = static_table(error, self._work, max(share, spent))
            tables = self._tables(share, thresholds, depths)
            ours, our_errors = self._measure("thresholds", CalibratedThresholds(share, tables), full)
            static, static_errors = self._measure("depths", CalibratedDepths(share, tables), full)
            less = static_table(error, self._work, ours.share, above=False)
            less = self._measure("fewer-depths", CalibratedDepths(share, self._tables(share, thresholds, less)), full)
            static, static_errors = _mixed(ours.share, less, (static, static_errors))
            bar.update(3)
            rows, ratio = tuple(map(tuple, thresholds.tolist())), _ratio(our_errors, static_errors)
            budgets.append(Budget(share, rows, tuple(depths.tolist()), ours, static, ratio))
        bar.total = bar.n
        model.calibration = Calibration(
            aim=self.aim,
            solver=self.solver,
            steps=self.steps,
            guidance_scale=float(self.guidance_scale),
            n=self.n,
            seed=self.seed,
            refit=self.refit,
            num_layers=model.num_layers,
            t=tuple(recording.t.tolist()),
            weights=tuple(weights.tolist()),
            budgets=tuple(budgets),
        )
        return model.calibration

    def _refit(self) -> dict[str, Tensor]:
        refitting = Refitting(self.model)
        record(self.model, self._samples(self.n, self.seed + 2 * self.n), self.batch, visit=refitting)
        return refitting.fitted()

    def _recorded(self) -> dict[str, Tensor]:
        return vars(record(self.model, self._samples(self.n, self.seed), self.batch, self._features))

    def _full(self) -> dict[str, Tensor]:
        """Images of the samples that measure the result."""
        settings = self._settings(self.n, self.seed + self.n)
        return {"images": sample(self.model, self.n, **settings, batch=self.batch, policy="full")[0]}

    def _meet(self, share: float, error: Tensor, bar: tqdm) -> tuple[Tensor, float]:
        """Thresholds [S, K] with which runs take about `share` of the work, and the share that they take. Thresholds
        are chosen on recorded runs of the full network; runs with early exits deviate from these, so the target is
        adjusted in a few rounds."""
        least = float(self._work.exiting[0] + self._work.score) / self._work.full
        depths = torch.full((len(error),), self.model.num_layers, dtype=torch.int64, device="cpu")
        target, found = share, []
        for attempt in range(ROUNDS):
            theta = adaptive_table(self.recording.u, error, self._work, target)
            policy = CalibratedThresholds(share, self._tables(share, theta, depths))
            spent = float(self._kept.run(f"budget-{share:g}-{attempt}", partial(self._spent, policy))["share"])
            found.append((abs(spent - share), spent, theta))
            bar.update()
            if abs(spent / share - 1) < CLOSE:
                break
            target = min(1.0, max(target * share / spent, least))
        _, spent, theta = min(found, key=lambda candidate: candidate[0])
        return theta, spent

    def _spent(self, policy: ExitPolicy) -> dict[str, Tensor]:
        _, report = sample(self.model, self.n, **self._settings(self.n, self.seed), batch=self.batch, policy=policy)
        return {"share": number(report.macs / report.macs_full)}

    def _tables(self, share: float, thresholds: Tensor, depths: Tensor) -> Tables:
        return Tables(self.model.num_layers, self.recording.t.tolist(), [share], thresholds[None], depths[None])

    def _settings(self, n: int, seed: int) -> dict[str, object]:
        given = {"steps": self.steps, "solver": self.solver, "guidance_scale": self.guidance_scale}
        return {**given, **seeds_and_conditions(self.model, n, seed, self.guidance_scale, *self._texts)}

    def _samples(self, n: int, seed: int) -> SampleBatch:
        return SampleBatch.of(self.model, n, **self._settings(n, seed))

    def _distance(self, images: Tensor, full: Tensor) -> float:
        if self.aim == "faithful":
            return float((images - full).double().square().mean())
        return self._frechet(images, full)

    def _frechet(self, images: Tensor, full: Tensor) -> float:
        with torch.no_grad():
            return frechet_distance(*(FeatureStatistics.of(self._features(v.clamp(-1, 1))) for v in (images, full)))

    def _measure(self, name: str, policy: CalibratedThresholds | CalibratedDepths, full: Tensor) -> _Errors:
        found = self._kept.run(f"budget-{policy.threshold:g}-{name}", partial(self._compared, policy, full))
        error = found.pop("error")
        low, high = ends(_resampled(error)[0])
        share, depth, psnr, frechet = (float(found[key]) for key in ("share", "depth", "psnr", "frechet"))
        measured = Measured(
            share=share,
            depth=depth,
            error=float(error.mean()),
            low=low,
            high=high,
            psnr=psnr if math.isfinite(psnr) else None,
            frechet=None if self._features is None else frechet,
        )
        return measured, error

    def _compared(self, policy: ExitPolicy, full: Tensor) -> dict[str, Tensor]:
        """The samples drawn with a policy, compared with their images in `full`."""
        settings = self._settings(self.n, self.seed + self.n)
        images, report = sample(self.model, self.n, **settings, batch=self.batch, policy=policy)
        images = images.cpu()
        shown = self.model.backbone.sample_shape[0] in CHANNELS
        return {
            "error": (images - full).double().square().flatten(1).mean(1),
            "share": number(report.macs / report.macs_full),
            "depth": number(report.mean_exit_layer),
            "psnr": number(lower_quantile(paired_psnr(images, full), 0.5) if shown else math.inf),
            "frechet": number(math.nan if self._features is None else self._frechet(images, full)),
        }


def seeds_and_conditions(
    model: Model, n: int, seed: int, guidance_scale: float, texts: Tensor | None, null: Tensor | None
) -> dict[str, object]:
    """`SamplingParams` of n samples with seeds from `seed` on; classes, or texts [P, N, E], take turns. null: [N, E],
    left out without guidance."""
    classes = model.config.classes
    return {
        "seed": list(range(seed, seed + n)),
        "class_labels": [i % classes for i in range(n)] if classes else None,
        "text_embeds": None if texts is None else texts[torch.arange(n, device="cpu") % len(texts)],
        "null_text_embeds": None if guidance_scale == 1 else null,
    }


def default_features(model: Model) -> Extractor | None:
    """Features for a model of digits, canvases or letters; None for other models."""
    shape, classes = model.backbone.sample_shape, model.config.classes
    if shape == (1, canvases.CELL, canvases.CELL):
        return digits_network().features
    if classes == canvases.CLASSES and shape in [canvases.Canvases(side).shape for side in (2, 3)]:
        return canvas_features
    if shape == (1, SIZE, SIZE) and classes == len(CHARACTERS):
        return letters_features
    return None


def _mixed(share: float, less: _Errors, more: _Errors) -> _Errors:
    """A mixture of two static tables over the samples that spends `share`: single tables reach only some shares.
    Errors are the expected ones of the mixture; PSNR and Fréchet distance are those of the table with more work.
    """
    part = mixed(share, less[0].share, more[0].share)
    errors = part * more[1] + (1 - part) * less[1]
    low, high = ends(_resampled(errors)[0])
    spent, depth = (part * getattr(more[0], key) + (1 - part) * getattr(less[0], key) for key in ("share", "depth"))
    values = {"share": spent, "depth": depth, "error": float(errors.mean()), "low": low, "high": high}
    return dataclasses.replace(more[0], **values), errors


def _resampled(*errors: Tensor) -> list[Tensor]:
    """Bootstrap means of each of errors [n], with the same resampled indices for all. Returns float64 [RESAMPLES]
    each."""
    n = len(errors[0])
    rows = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0), device="cpu")
    return [error[rows].mean(1) for error in errors]


def ends(draws: Tensor) -> tuple[float, float]:
    """The ends of the 95 % interval of bootstrap draws [n]."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype, device=draws.device)).tolist()
    return low, high


def _ratio(ours: Tensor, theirs: Tensor) -> tuple[float, float, float] | None:
    """Ratio of mean errors over the same samples, with the ends of its 95 % interval; None if `theirs` may be 0."""
    above, below = _resampled(ours, theirs)
    if not bool((below > 0).all()):
        return None
    return float(ours.mean() / theirs.mean()), *ends(above / below)
