"""Training of a step selector: draw images with every candidate, learn from their errors, measure on other noises."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from adadiff_kernels import COLUMNS

from ..diffusion.solvers import solver_from
from ..model import Model
from ..policies.step_selector import MeasuredSteps, Ratio, SelectorConfig, StepSelector, check_candidates, new_scores
from ..sampling.params import SamplingParams
from ..sampling.sample_batch import SampleBatch, whole
from ..sampling.sampler import sample
from .step_policy import learn, rewards

SEED = 1 << 33  # far from the seeds of samples and of calibrations
PIECE = 2048  # samples drawn at once; all their images are in memory
PIECE_NUMBERS = 2**24  # numbers of their text embeddings
RESAMPLES = 1000
HELD_OUT = 5  # every fifth prompt is only for measuring

Distance = Callable[[Tensor, Tensor], Tensor]  # images and reference [n, C, H, W] -> errors [n]
Done = Callable[[Tensor], object]


def root_mean_square(images: Tensor, reference: Tensor) -> Tensor:
    """float64 [n]: root mean square of the difference of each pair, over all pixels and channels."""
    return (images - reference).double().square().flatten(1).mean(1).sqrt()


@dataclass(frozen=True)
class Rows:
    """n samples to draw, each with a condition and a seed."""

    context: Tensor  # labels int64 [P] or text [P, N, E]
    index: Tensor  # int64 [n], the condition of each sample
    seeds: Tensor  # int64 [n]

    @property
    def of_rows(self) -> Tensor:
        """The condition of each sample, [n, ...]."""
        return self.context[self.index]


class StepTraining:
    """Trains a step selector for `model`, which is left unchanged.

    candidates: ascending numbers of steps; images of the largest one are the reference for the others, so it always
    passes the bar. bar: largest acceptable `distance`, by default the root mean squared difference. penalty: see
    `rewards`. n: noises to learn from, spread evenly over the classes or prompts; with five or more prompts, every
    fifth is kept for measuring. n / 2 other noises measure the result. text_embeds: [P, N, E], null_text_embeds:
    [N, E], for models that take text. Deterministic. Raises ValueError for invalid arguments, before any work.
    """

    def __init__(
        self,
        model: Model,
        candidates: Sequence[int] = (2, 3, 5, 8, 10, 15, 20),
        *,
        bar: float = 0.05,
        penalty: float = 1.0,
        n: int = 400,
        solver: str = "ddim",
        guidance_scale: float = 1.0,
        seed: int = SEED,
        batch: int = 64,
        text_embeds: Tensor | None = None,
        null_text_embeds: Tensor | None = None,
        distance: Distance = root_mean_square,
    ):
        candidates = tuple(candidates)
        check_candidates(candidates)
        whole("n", n, 8)
        whole("batch", batch, 1)
        if not (0 < bar < math.inf and 0 <= penalty < math.inf):
            raise ValueError(f"bar must be above 0 and penalty at least 0, got {bar} and {penalty}")
        table = solver_from(solver, own=False).table(model.schedule, candidates[-1])
        if table.coefficients[:, COLUMNS.index("noise")].any():
            raise ValueError(
                f"solver {solver!r} adds noise, so images of different numbers of steps cannot be compared; take "
                "'ddim' or 'dpm++2m'"
            )
        context = _conditions(model, text_embeds)
        self.model, self.batch, self._null, self._distance = model, batch, null_text_embeds, distance
        kept = torch.arange(len(context), device="cpu") % HELD_OUT == HELD_OUT - 1
        if text_embeds is None or not bool(kept.any()):
            kept[:] = False
        learnt, measured = (~kept).nonzero().squeeze(1), (kept if bool(kept.any()) else ~kept).nonzero().squeeze(1)
        if n < len(learnt):
            raise ValueError(f"n must be at least {len(learnt)}, a noise for each class or prompt, got {n}")
        whole("seed", seed, 0, 2**63 - 2 * n)
        rows = torch.arange(n, device="cpu")
        self.rows = Rows(context, learnt[rows % len(learnt)], seed + rows)
        rows = rows[: max(n // 2, 2)]
        self.held_out = Rows(context, measured[rows % len(measured)], seed + n + rows)
        takes_text = text_embeds is not None
        self.config = SelectorConfig(
            candidates=candidates,
            solver=solver,
            guidance_scale=float(guidance_scale),
            num_classes=0 if takes_text else len(context),
            context_dim=context.shape[2] if takes_text else 0,
            bar=float(bar),
            penalty=float(penalty),
            n=n,
            seed=seed,
        )
        for count in candidates:  # raises for invalid settings
            SampleBatch.of(model, 2, self._params(Rows(context, learnt[:1].repeat(2), self.rows.seeds[:2]), count))

    def run(
        self, progress: bool = False, errors: Tensor | None = None, done: Done = lambda errors: None
    ) -> StepSelector:
        """errors: float64 [m <= n, K], recorded by an earlier run. done: called with all errors so far, after each
        piece. Returns the trained and measured selector."""
        errors = self.record(errors, progress, done)
        selector = self.learnt(errors, progress)
        return StepSelector(replace(selector.config, measured=self.measure(selector, progress)), selector.scores)

    def record(self, errors: Tensor | None = None, progress: bool = False, done: Done = lambda errors: None) -> Tensor:
        """Errors of every sample with every candidate, float64 [n, K]. Arguments as in `run`. The images of a sample
        start from the same noise."""
        K, n = len(self.config.candidates), len(self.rows.index)
        errors = torch.zeros(0, K, dtype=torch.float64, device="cpu") if errors is None else errors
        if errors.shape[1:] != (K,) or len(errors) > n:
            raise ValueError(f"recorded errors are [up to {n}, {K}], got {list(errors.shape)}")
        most = PIECE_NUMBERS // self.rows.context[0].numel() if self.config.context_dim else PIECE
        piece = max(1, min(PIECE, most) // K)
        with tqdm(total=n, initial=len(errors), disable=not progress, unit="noise", dynamic_ncols=True) as bar:
            while (begin := len(errors)) < n:
                errors = torch.cat([errors, self._errors(begin, min(n, begin + piece))])
                done(errors)
                bar.update(len(errors) - begin)
        return errors

    @torch.inference_mode(False)  # whatever mode the caller is in
    @torch.enable_grad()
    def learnt(self, errors: Tensor, progress: bool = False) -> StepSelector:
        """The selector trained on these errors, not measured yet."""
        config = self.config
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(config.seed)
            scores = new_scores(config).double()
        for_text = {"batch": 64, "lr": 0.005} if config.context_dim else {}
        reward = rewards(errors, config.candidates, config.bar, config.penalty)
        learn(scores, *(self.rows.context, self.rows.index, reward), **for_text, seed=config.seed, progress=progress)
        return StepSelector(config, scores)

    def measure(self, selector: StepSelector, progress: bool = False) -> MeasuredSteps:
        """Measures the selector on held-out noises and, if there are any, held-out prompts."""
        rows, candidates = self.held_out, self.config.candidates
        reference = self._draw(rows, candidates[-1], progress)
        chosen = selector.choose(rows.of_rows)
        counts = sorted(set(chosen.tolist()))
        by_count = torch.stack([self._distance(self._draw(rows, c, progress), reference).double() for c in counts])
        one_hot = (
            chosen == torch.tensor(counts, dtype=torch.int64, device="cpu")[:, None]
        ).double()  # [counts, n], a single 1 in each column
        fixed = self._draw(rows, math.ceil(float(chosen.double().mean())), progress)
        fixed = self._distance(fixed, reference).double()
        errors, dealt = (one_hot * by_count).sum(0), dealt_at_random(by_count, one_hot)
        return measured(errors, chosen, fixed, dealt, self.config.bar)

    def _errors(self, begin: int, end: int) -> Tensor:
        rows, candidates = self.rows, self.config.candidates
        K, piece = len(candidates), torch.arange(begin, end, device="cpu")
        # samples with most steps first, so that the batch stays full nearly to the end
        index, steps = (
            piece.repeat(K),
            torch.tensor(candidates[::-1], dtype=torch.int64, device="cpu").repeat_interleave(len(piece)),
        )
        images = self._draw(Rows(rows.context, rows.index[index], rows.seeds[index]), steps, False)
        by_count = images.view(K, len(piece), *images.shape[1:]).flip(0)
        return torch.stack([self._distance(drawn, by_count[-1]).double() for drawn in by_count], 1)

    def _draw(self, rows: Rows, steps: int | Tensor, progress: bool) -> Tensor:
        n = len(rows.index)
        return sample(self.model, n, self._params(rows, steps), batch=self.batch, progress=progress)[0]

    def _params(self, rows: Rows, steps: int | Tensor) -> SamplingParams:
        condition = {"text_embeds": rows.of_rows, "null_text_embeds": self._null}
        if not self.config.context_dim:
            condition = {"class_labels": rows.of_rows}
        return SamplingParams(
            seed=rows.seeds,
            steps=steps,
            solver=self.config.solver,
            guidance_scale=self.config.guidance_scale,
            **condition,
        )


def dealt_at_random(errors: Tensor, chosen: Tensor) -> Tensor:
    """errors: float64 [C, n], for each of C numbers of steps; chosen: float64 [C, n], one-hot choice of each sample.
    Returns float64 [n]: each sample's root mean square error over all permutations of the choices among samples."""
    return (chosen.mean(1, keepdim=True) * errors.square()).sum(0).sqrt()


def measured(own: Tensor, chosen: Tensor, fixed: Tensor, dealt: Tensor, bar: float) -> MeasuredSteps:
    """Errors, float64 [n] each: `own` with the selector's numbers of steps `chosen` (int64 [n]), `fixed` with their
    mean, rounded up, for all samples, and `dealt` with a random permutation of them (see `dealt_at_random`)."""
    rows = torch.randint(len(own), (RESAMPLES, len(own)), generator=torch.Generator().manual_seed(0), device="cpu")
    draws = _root(own[rows])

    def ratio(other: Tensor) -> Ratio:
        error, theirs = float(_root(other)), _root(other[rows])
        if not bool((theirs > 0).all()):
            return Ratio(error, None, None, None)
        return Ratio(error, float(_root(own)) / error, *_ends(draws / theirs))

    mean = float(chosen.double().mean())
    low, high = _ends(draws)
    return MeasuredSteps(
        n=len(own),
        mean_steps=mean,
        error=float(_root(own)),
        low=low,
        high=high,
        above_bar=float((own > bar).double().mean()),
        fixed_steps=math.ceil(mean),
        fixed=ratio(fixed),
        random=ratio(dealt),
    )


def _root(errors: Tensor) -> Tensor:
    return errors.square().mean(-1).sqrt()


def _ends(draws: Tensor) -> tuple[float, float]:
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype, device=draws.device)).tolist()
    return low, high


def _conditions(model: Model, text_embeds: Tensor | None) -> Tensor:
    """Labels int64 [P], or prompts [P, N, E]. ValueError for what the model does not take."""
    network = model.config.network
    if network.context_tokens:
        shape = (network.context_tokens, network.context_dim)
        if text_embeds is None or text_embeds.ndim != 3 or tuple(text_embeds.shape[1:]) != shape:
            raise ValueError(f"this model takes text: text_embeds must be float [P, {shape[0]}, {shape[1]}]")
        if not len(text_embeds):
            raise ValueError("there is no prompt to learn from; text_embeds is empty")
        return text_embeds.detach().cpu()
    if text_embeds is not None:
        raise ValueError("this model takes no text; leave text_embeds out")
    if not model.config.classes:
        raise ValueError("this model has neither classes nor text by which a step selector could choose")
    return torch.arange(model.config.classes, device="cpu")
