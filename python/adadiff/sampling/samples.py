"""What samples ask for: seed, label, steps, guidance, rule. Checked against the model before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..diffusion.schedules import NoiseSchedule
from ..diffusion.solvers import solver_from
from ..diffusion.tables import Solver
from ..model import Model
from ..policies.calibrated import calibrated_rule
from ..policies.exit_policies import Rule, layers_asked, rule_from


@dataclass(frozen=True)
class SampleBatch:
    """n samples with one rule and one solver; everything else by sample. Made by `SampleBatch.of`, which checks."""

    n: int
    rule: Rule
    solver: Solver
    seeds: Tensor  # int64 [n]
    steps: Tensor  # int64 [n]
    first: Tensor  # int64 [n], the step each begins at; more than 0 where it starts from an image
    threshold: Tensor  # float32 [n], NaN where the rule has none
    guidance: Tensor  # float32 [n]
    interval: Tensor  # float32 [n, 2], first and last of the network's times at which there is guidance
    channels: Tensor  # int64 [n], how many are guided, from the first on
    tied: bool
    context: Tensor | None  # labels int64 [n], text [n, N, E]
    null: Tensor | None  # context of the unconditional lanes, [n] or [n, N, E]; None without guidance
    start: Tensor | None  # float32 [n, C, H, W]

    @property
    def lanes(self) -> int:
        """Sequences that the network evaluates, at most: two for a guided sample."""
        return self.n + int(self.guidance.count_nonzero())

    @staticmethod
    def of(
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
        guidance_interval: Sequence[float] | Tensor | None = None,
        guided_channels: int | Sequence[int] | Tensor | None = None,
        tied: bool = False,
        context: Tensor | None = None,
        null_context: Tensor | None = None,
        start: Tensor | None = None,
        strength: float | Sequence[float] | Tensor | None = None,
    ) -> "SampleBatch":
        """steps: evaluations, an int or one per sample. solver: "ddim", "ddim:ETA", "ddpm", "dpm++2m", "dpm-fast",
        "dpm++fast", "euler-maruyama" (settings: see `solver_from`) or a Solver.
        rule: "full", "threshold:0.07", "patience:0.08", "depth:8", "batch-mean:0.07" or a Rule; of a calibrated model
        "budget:0.55" or "table:0.55", too, with budgets as thresholds.
        thresholds: one per sample, instead of the rule's. seeds: one int in [0, 2^63) per sample (default 0..n-1); a
        sample is a function of its seed, not of its batch. labels: one class per sample, None for none (the null
        class). guidance: scale s of cond + s (cond - uncond), a number or one per sample; 0 is none.
        guidance_interval: (low, high), for all or [n, 2], in the network's time: at other times there is no guidance
        and no unconditional lane is run. guided_channels: how many are guided, from the first on, for all or one per
        sample (default: what the model was published with); the others are those of cond.
        tied: the two lanes of a guided sample leave together, by the larger uncertainty.
        context: [n, N, E] for text models, null_context: [N, E], that of the empty prompt, which guidance needs.
        start: float [n, C, H, W], images to begin from; strength: in (0, 1], the share of the steps that are run
        from there, a number or one per sample (default 0.8; SDEdit, as diffusers' image-to-image). A singlestep
        solver begins with a whole step, so it may run an evaluation or two more.
        Raises ValueError for anything that does not fit.
        """
        whole("n", n, 0)
        calibrated = calibrated_rule(rule, model.calibration) if isinstance(rule, str) else None
        rule = calibrated or rule_from(rule)
        asked = layers_asked(rule, model.layers)
        if model.exits is None and asked:
            raise ValueError("this model has no exits; sample it with rule='full'")
        if thresholds is None and rule.threshold is None and asked:
            raise ValueError(f"{rule} has no threshold of its own; give one per sample")
        if thresholds is not None:
            threshold = _per_sample("thresholds", thresholds, n, torch.float32)
            rule.check(threshold)
        else:
            threshold = torch.full((n,), torch.nan if rule.threshold is None else float(rule.threshold))
        seeds = torch.arange(n) if seeds is None else _per_sample("seeds", seeds, n, torch.int64)
        if n and int(seeds.min()) < 0:
            raise ValueError(f"seeds must be >= 0, got {int(seeds.min())}")
        guidance = _per_sample("guidance", guidance, n, torch.float32)
        guided = bool(guidance.ne(0).any())
        interval = _interval(guidance_interval, n, model.schedule)
        channels = _channels(model, guided_channels, n)
        if model.config.network.context_tokens:
            if labels is not None:
                raise ValueError("this model takes text; leave labels out")
            given, null = _text(model, context, null_context, n, guided)
        else:
            if context is not None or null_context is not None:
                raise ValueError("this model takes no text; leave context and null_context out")
            given, null = _labels(model, labels, n, guided)
        counts = _per_sample("steps", steps, n, torch.int64)
        solver = solver_from(solver) if isinstance(solver, str) else solver
        if not hasattr(solver, "table"):
            raise ValueError(f"a solver is a Solver or a spelling such as 'ddim', got {solver!r}")
        for count in set(counts.tolist()):
            _check_steps(solver, model.schedule, count)
        start, first = _start(model, start, strength, counts, n)
        for i in first.nonzero().squeeze(1).tolist():
            starts = solver.table(model.schedule, int(counts[i])).starts
            first[i] = starts[: first[i] + 1].nonzero().max()
        return SampleBatch(
            n=n,
            rule=rule,
            solver=solver,
            seeds=seeds,
            steps=counts,
            first=first,
            threshold=threshold,
            guidance=guidance,
            interval=interval,
            channels=channels,
            tied=tied,
            context=given,
            null=null,
            start=start,
        )


@lru_cache(maxsize=1024)
def _check_steps(solver: Solver, schedule: NoiseSchedule, steps: int) -> None:
    solver.table(schedule, steps)


def whole(name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _is_float(value: object, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == shape and value.is_floating_point()


def _per_sample(name: str, value: object, n: int, dtype: torch.dtype) -> Tensor:
    """A number for all, or one per sample, as a tensor [n]. Whole numbers must be given where they are meant."""
    try:
        given = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be a number or {n} numbers, got {value!r}: {error}") from None
    integer = not given.dtype.is_floating_point and given.dtype != torch.bool
    if dtype == torch.int64 and not integer and given.numel():
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


def _interval(given: Sequence[float] | Tensor | None, n: int, schedule: NoiseSchedule) -> Tensor:
    if given is None:
        return torch.tensor([-torch.inf, torch.inf]).repeat(n, 1)
    try:
        interval = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"guidance_interval must be (low, high), got {given!r}: {error}") from None
    if interval.shape not in ((2,), (n, 2)):
        raise ValueError(f"guidance_interval must be (low, high) or [{n}, 2], got shape {list(interval.shape)}")
    interval = interval.expand(n, 2)
    if not bool((interval[:, 0] <= interval[:, 1]).all()):
        raise ValueError(f"guidance_interval must have low <= high, got {given!r}")
    high, low = schedule.times
    if bool(((interval[:, 0] > high) | (interval[:, 1] < low)).any()):
        raise ValueError(f"guidance_interval holds none of the network's times, {low:.3g}..{high:g}: {given!r}")
    return interval


def _channels(model: Model, given: int | Sequence[int] | Tensor | None, n: int) -> Tensor:
    most = model.backbone.sample_shape[0]
    published = most if model.config.guided_channels is None else model.config.guided_channels
    channels = _per_sample("guided_channels", published if given is None else given, n, torch.int64)
    if n and not 1 <= int(channels.min()) <= int(channels.max()) <= most:
        raise ValueError(f"guided_channels must lie in 1..{most}, got {sorted(set(channels.tolist()))[:8]}")
    return channels


def _labels(
    model: Model, labels: Sequence[int] | Tensor | None, n: int, guided: bool
) -> tuple[Tensor | None, Tensor | None]:
    config = model.config
    if guided and config.null_label is None:
        raise ValueError("guidance needs a model with a null class")
    if not config.network.num_classes:
        if labels is not None:
            raise ValueError("this model has no classes; leave labels out")
        return None, None
    null = torch.full((n,), config.null_label) if config.null_label is not None else None
    if labels is None:
        if null is None:
            raise ValueError(f"this model needs labels in 0..{config.classes - 1}")
        return null, null
    labels = _per_sample("labels", labels, n, torch.int64)
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < config.classes:
        raise ValueError(f"labels must be in 0..{config.classes - 1}, got {sorted(set(labels.tolist()))[:8]}")
    return labels, null


def _text(
    model: Model, context: Tensor | None, null: Tensor | None, n: int, guided: bool
) -> tuple[Tensor, Tensor | None]:
    network = model.config.network
    shape = (network.context_tokens, network.context_dim)
    if not _is_float(context, (n, *shape)):
        raise ValueError(f"this model takes text: context must be a float tensor {[n, *shape]}")
    if guided and null is None:
        raise ValueError("guidance needs null_context, that of the empty prompt")
    if null is not None and not _is_float(null, shape):
        raise ValueError(f"null_context must be a float tensor {list(shape)}")
    dtype = model.backbone.pos_embed.dtype  # what the network makes of it, so that mates may bring other dtypes
    null = None if null is None else null.detach().to(dtype, copy=True).expand(n, *shape)
    return context.detach().to(dtype), null


def _start(
    model: Model,
    start: Tensor | None,
    strength: float | Sequence[float] | Tensor | None,
    steps: Tensor,
    n: int,
) -> tuple[Tensor | None, Tensor]:
    """The images to begin from and the first step of each sample."""
    if start is None:
        if strength is not None:
            raise ValueError("strength says how far to go back from start images; give `start`, too")
        return None, torch.zeros_like(steps)
    shape = (n, *model.backbone.sample_shape)
    if not _is_float(start, shape):
        raise ValueError(f"start must be a float tensor {list(shape)}, one image per sample")
    if not bool(start.isfinite().all()):
        raise ValueError("start holds NaN or infinity")
    strength = _per_sample("strength", 0.8 if strength is None else strength, n, torch.float32)
    if n and not 0 < float(strength.min()) <= float(strength.max()) <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength.tolist()[:8]}")
    kept = (strength.double() * steps + 1e-6).long().clamp(min=1)  # steps that are run; float32 0.3 is above 0.3
    return start.detach().float(), steps - kept
