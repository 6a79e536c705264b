"""Calibration: record, weigh, choose, and measure what was chosen on samples that it was not chosen on."""

import copy
import dataclasses
import math
from collections.abc import Sequence

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
from .recording import Extractor, Recording, measure_weights, record
from .refitting import Refitting
from .stopping import Work, adaptive_table, mixed, static_table

AIMS = ("faithful", "distribution")
CALIBRATION_SEED = 1 << 32  # far from the seeds 0, 1, ... that samples have by default
PLACES = 8
LAYERS_PERTURBED = 2
ROUNDS = 4  # of meeting the budget in runs with their own errors
CLOSE = 0.003
RESAMPLES = 1000


def work_of(model: Model) -> Work:
    """Multiply-adds of one lane."""
    network, exits = model.backbone, model.exits
    patches = network.tokens - network.num_prefix_tokens
    blocks = torch.tensor([block.macs(network.tokens) for block in network.blocks], dtype=torch.float64, device="cpu")
    exiting = blocks.cumsum(0) + sum(network.stem_and_head_macs())
    exiting[:-1] += exits.head_macs(patches)
    return Work(exiting, exits.macs(patches))


class Calibrating:
    """A calibration about to be made: thresholds for every timestep and layer, for each of `budgets`, shares in (0, 1]
    of the full network's multiply-adds.

    What exiting at a timestep and layer gets wrong on the mean is counted as `features` see the image that a prediction
    leads to (images [n, C, H, W] -> [n, F]; default: those of digits, canvases or letters): what they do not see,
    later steps mostly mend. Samples differ in it as in the predicted noise, which counts alone where no features are
    known. aim: "faithful" weighs it by what it does to each image, "distribution" by how far the images as a whole move
    in the space of the features, the Fréchet distance.
    n samples, seeds `seed` and on, are recorded; as many more, never looked at before, are measured on. Everything is
    deterministic. text_embeds: [P, N, E], null_text_embeds: [N, E], for models that take text; samples take them in
    turns. refit: UEMs are fitted anew to how samples differ, on another n of them (see refitting.py), and used
    from there on. After `run`, `model` has the calibration and the UEMs that it is for, and shares network and heads
    with the one given, which stays as it was; `recording` is there. Raises ValueError for what cannot be, before
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
            raise ValueError("this model has no exits to calibrate; `adadiff train` with recipe = 'frozen' adds some")
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
            raise ValueError(f"the least that this network can run is {least:.3f} of its work, got {min(budgets)}")
        self.model, self.budgets, self.aim = model, sorted(budgets), aim
        self.n, self.steps, self.solver, self.guidance_scale = n, steps, solver, guidance_scale
        self.seed, self.batch, self.refit = seed, batch, refit
        self._texts = text_embeds, null_text_embeds
        self._features = features or default_features(model)
        if aim == "distribution" and self._features is None:
            raise ValueError("no features are known for this model's images; give some, or take the aim 'faithful'")
        self._samples(n, seed)  # for its checks
        self.recording: Recording | None = None

    def run(self, progress: bool = False) -> Calibration:
        runs = 2 + self.refit + PLACES * LAYERS_PERTURBED + len(self.budgets) * (ROUNDS + 3)
        with tqdm(total=runs, disable=not progress, unit="run", dynamic_ncols=True) as bar:
            return self._run(bar)

    def _run(self, bar: tqdm) -> Calibration:
        if self.refit:
            refitting = Refitting(self.model)
            record(self.model, self._samples(self.n, self.seed + 2 * self.n), self.batch, visit=refitting)
            self.model = refitting.fitted()
            bar.update()
        else:
            self.model = copy.copy(self.model)  # its parameters are the same
        model = self.model
        self.recording = recording = record(model, self._samples(self.n, self.seed), self.batch, self._features)
        bar.update()
        first = self._samples(min(self.n, self.batch), self.seed)
        weights = measure_weights(
            model, first, recording, self._distance, batch=self.batch, places=PLACES, tick=bar.update
        )
        error = recording.error.double() * weights[:, None, None]
        full, _ = sample(model, self.n, **self._settings(self.n, self.seed + self.n), batch=self.batch, policy="full")
        bar.update()
        budgets = []
        for share in self.budgets:
            thresholds, spent = self._meet(share, error, bar)
            depths = static_table(error, self._work, max(share, spent))
            tables = self._tables(share, thresholds, depths)
            ours, our_errors = self._measure(CalibratedThresholds(share, tables), full)
            static, static_errors = self._measure(CalibratedDepths(share, tables), full)
            less = static_table(error, self._work, ours.share, above=False)
            less = self._measure(CalibratedDepths(share, self._tables(share, thresholds, less)), full)
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

    def _meet(self, share: float, error: Tensor, bar: tqdm) -> tuple[Tensor, float]:
        """Thresholds [S, K] whose runs, with their own errors, take `share` or about that, and what they take: the
        recorded errors lie on the full network's way, from which early exits stray."""
        least = float(self._work.exiting[0] + self._work.score) / self._work.full
        depths = torch.full((len(error),), self.model.num_layers, dtype=torch.int64, device="cpu")
        target, found = share, []
        for _ in range(ROUNDS):
            theta = adaptive_table(self.recording.u, error, self._work, target)
            policy = CalibratedThresholds(share, self._tables(share, theta, depths))
            _, report = sample(self.model, self.n, **self._settings(self.n, self.seed), batch=self.batch, policy=policy)
            spent = report.macs / report.macs_full
            found.append((abs(spent - share), spent, theta))
            bar.update()
            if abs(spent / share - 1) < CLOSE:
                break
            target = min(1.0, max(target * share / spent, least))
        _, spent, theta = min(found, key=lambda one: one[0])
        return theta, spent

    def _tables(self, share: float, thresholds: Tensor, depths: Tensor) -> Tables:
        return Tables(self.model.num_layers, self.recording.t.tolist(), [share], thresholds[None], depths[None])

    def _settings(self, n: int, seed: int) -> dict[str, object]:
        classes, (texts, null) = self.model.config.classes, self._texts
        return {
            "steps": self.steps,
            "solver": self.solver,
            "guidance_scale": self.guidance_scale,
            "seed": list(range(seed, seed + n)),
            "class_labels": [i % classes for i in range(n)] if classes else None,
            "text_embeds": None if texts is None else texts[torch.arange(n, device="cpu") % len(texts)],
            "null_text_embeds": None if self.guidance_scale == 1 else null,
        }

    def _samples(self, n: int, seed: int) -> SampleBatch:
        return SampleBatch.of(self.model, n, **self._settings(n, seed))

    def _distance(self, images: Tensor, full: Tensor) -> float:
        if self.aim == "faithful":
            return float((images - full).double().square().mean())
        return self._frechet(images, full)

    def _frechet(self, images: Tensor, full: Tensor) -> float:
        with torch.no_grad():
            return frechet_distance(*(FeatureStatistics.of(self._features(v.clamp(-1, 1))) for v in (images, full)))

    def _measure(self, policy: ExitPolicy, full: Tensor) -> tuple[Measured, Tensor]:
        given = self._settings(self.n, self.seed + self.n)
        images, report = sample(self.model, self.n, **given, batch=self.batch, policy=policy)
        error = (images - full).double().square().flatten(1).mean(1)
        low, high = _ends(_resampled(error)[0])
        shown = self.model.backbone.sample_shape[0] in CHANNELS
        psnr = lower_quantile(paired_psnr(images, full), 0.5) if shown else math.inf
        measured = Measured(
            share=report.macs / report.macs_full,
            depth=report.mean_exit_layer,
            error=float(error.mean()),
            low=low,
            high=high,
            psnr=psnr if math.isfinite(psnr) else None,
            frechet=None if self._features is None else self._frechet(images, full),
        )
        return measured, error


def default_features(model: Model) -> Extractor | None:
    """Those of digits, of canvases or of letters; None for a model that draws anything else."""
    shape, classes = model.backbone.sample_shape, model.config.classes
    if shape == (1, canvases.CELL, canvases.CELL):
        return digits_network().features
    if classes == canvases.CLASSES and shape in [canvases.Canvases(side).shape for side in (2, 3)]:
        return canvas_features
    if shape == (1, SIZE, SIZE) and classes == len(CHARACTERS):
        return letters_features
    return None


def _mixed(share: float, less: tuple[Measured, Tensor], more: tuple[Measured, Tensor]) -> tuple[Measured, Tensor]:
    """Two static tables, mixed among samples to spend `share`; their steps in work are wide where few depths are worth
    having. Errors are those expected of such a mixture; PSNR and Fréchet distance are those of the table of more work.
    """
    part = mixed(share, less[0].share, more[0].share)
    errors = part * more[1] + (1 - part) * less[1]
    low, high = _ends(_resampled(errors)[0])
    spent, depth = (part * getattr(more[0], key) + (1 - part) * getattr(less[0], key) for key in ("share", "depth"))
    own = {"share": spent, "depth": depth, "error": float(errors.mean()), "low": low, "high": high}
    return dataclasses.replace(more[0], **own), errors


def _resampled(*errors: Tensor) -> list[Tensor]:
    """Means of samples drawn with replacement, the same ones from each of errors [n]. Returns float64 [RESAMPLES]s."""
    n = len(errors[0])
    rows = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0), device="cpu")
    return [error[rows].mean(1) for error in errors]


def _ends(draws: Tensor) -> tuple[float, float]:
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype, device=draws.device)).tolist()
    return low, high


def _ratio(ours: Tensor, theirs: Tensor) -> tuple[float, float, float] | None:
    """Mean errors over mean errors of the same samples, with its interval; None where the others make none."""
    above, below = _resampled(ours, theirs)
    if not bool((below > 0).all()):
        return None
    return float(ours.mean() / theirs.mean()), *_ends(above / below)
