"""Sampling parameters checked against a model, by sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..diffusion.schedules import NoiseSchedule
from ..diffusion.tables import Solver
from ..forward.narrow import width_choice
from ..forward.networks import NetworkChoice
from ..model import Model
from ..policies.calibrated import CalibratedThresholds
from ..policies.estimated import EstimatedReuse
from ..policies.interface import ExitPolicy, exit_layers_of
from ..policies.parts import Parts
from ..policies.spelling import parts_from
from .auto_steps import steps_of
from .cascades import Draft, draft_of
from .params import Numbers, SamplingParams, as_tensor, is_plain, per_sample
from .reuse_checks import check_estimates, check_reuse_of
from .warn_once import warn_once

CALIBRATED_WHOLE = (
    "policy %s: its thresholds were calibrated on the whole network; narrow networks have other uncertainties, so the "
    "share of the work may differ; measure it with `adadiff evaluate`"
)
UNGUIDED = "guidance_interval (%g, %g) contains none of the times of %d steps: no guidance"


@dataclass(frozen=True)
class SampleBatch:
    """n samples with one policy and one solver; everything else by sample. Create it by `SampleBatch.of`, which checks
    the parameters."""

    n: int
    parts: Parts
    choice: NetworkChoice | None  # the network by time
    draft: Draft | None  # the stages of a cascade
    solver: Solver
    seeds: Tensor  # int64 [n]
    steps: Tensor  # int64 [n]
    first: Tensor  # int64 [n], the step at which each begins; above 0 if it starts from an image
    threshold: Tensor  # float32 [n], NaN if none
    guidance: Tensor  # float32 [n], guidance_scale - 1
    interval: Tensor  # float32 [n, 2], lowest and highest of the network's times with guidance
    channels: Tensor  # int64 [n], the number of leading channels that are guided
    tied: bool
    context: Tensor | None  # labels int64 [n], text [n, N, E]
    null: Tensor | None  # context of the unconditional lanes, [n] or [n, N, E]; None without guidance
    init_image: Tensor | None  # float32 [n, C, H, W]
    record_scores: bool

    @property
    def policy(self) -> ExitPolicy:
        """The exit policy."""
        return self.parts.exit

    @cached_property
    def lanes(self) -> int:
        """The most lanes that the samples need: two for a guided sample, one for others."""
        return self.n + int(self.guidance.count_nonzero())

    @property
    def rows(self) -> Tensor:
        """int64 [n]: the most steps that a report can have for each sample."""
        return self.steps if self.draft is None else self.draft.steps + self.draft.teacher_steps

    @property
    def most_steps(self) -> Tensor:
        """int64 [n]: the most steps to make; a teacher's steps are made only if the oracle sends the sample on."""
        return self.rows if self.draft is not None else self.steps - self.first

    @staticmethod
    def of(model: Model, n: int, params: SamplingParams | None = None, **settings: object) -> "SampleBatch":
        """n samples of `model`; settings: `SamplingParams` by name. Raises ValueError for parameters that do not fit
        the model."""
        whole("n", n, 0)
        params = SamplingParams.of(params, settings)
        parts = parts_from(params.policy, model.calibration)
        policy, choice = parts.exit, _choice(model, parts)
        asked = exit_layers_of(policy, model.num_layers)
        if model.exits is None and asked:
            raise ValueError("this model has no exits; sample it with policy='full'")
        guidance, guided = _guidance(params.guidance_scale, n)
        if model.config.network.context_tokens:
            if params.class_labels is not None:
                raise ValueError("this model takes text; leave class_labels out")
            context, null = _text(model, params, n, guided)
        else:
            if params.text_embeds is not None or params.null_text_embeds is not None:
                raise ValueError("this model takes no text; leave text_embeds and null_text_embeds out")
            context, null = _labels(model, params.class_labels, n, guided)
        steps = steps_of(model, params, context, guidance)
        for count in set(steps.tolist()):
            _check_steps(params.solver, model.schedule, count)
        init_image, first = _init_image(model, params, steps, n)
        draft = None
        if parts.cascade is not None:
            if init_image is not None:
                raise ValueError("a cascade's student draws from noise; leave init_image out")
            draft = draft_of(model, parts.cascade, params.solver, steps)
        if isinstance(parts.reuse, EstimatedReuse):
            check_estimates(model, parts, params.solver, steps, first, guidance)
        if parts.reuse is not None:
            made = steps if draft is None else draft.teacher_steps
            check_reuse_of(model, parts.reuse, params.solver, made, first)
        interval = _interval(params.guidance_interval, n, model.schedule)
        if params.guidance_interval is not None and draft is None:
            _warn_unguided(interval, params.solver, model.schedule, steps, first, guidance)
        return SampleBatch(
            n=n,
            parts=parts,
            choice=choice,
            draft=draft,
            solver=params.solver,
            seeds=_seeds(params.seed, n),
            steps=steps,
            first=first,
            threshold=_thresholds(policy, params.thresholds, n),
            guidance=guidance,
            interval=interval,
            channels=_channels(model, params.guided_channels, n),
            tied=params.tied or (parts.reuse is not None and parts.reuse.together),
            context=context,
            null=null,
            init_image=init_image,
            record_scores=params.record_scores,
        )


def _choice(model: Model, parts: Parts) -> NetworkChoice | None:
    """The network choice of a width policy, or None. Raises ValueError for widths that this model does not have."""
    if parts.width is None:
        return None
    choice = width_choice(model, parts.width)
    if isinstance(parts.exit, CalibratedThresholds) and min(parts.width.widths) < 1:
        warn_once(CALIBRATED_WHOLE, str(parts))
    return choice


@lru_cache(maxsize=1024)
def _check_steps(solver: Solver, schedule: NoiseSchedule, steps: int) -> None:
    solver.table(schedule, steps)


def whole(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raises ValueError unless `value` is an int of at least `least` and, if given, at most `most`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value:,}")


def _seeds(given: int | Sequence[int] | Tensor | None, n: int) -> Tensor:
    given = as_tensor(0 if given is None else given)
    if given.ndim:
        return per_sample("seed", given, n, torch.int64)
    if int(given) + n - 1 >= 2**63:
        raise ValueError(f"seed must be below 2^63 for every sample; got {int(given)} for the first of {n}")
    return given.long() + torch.arange(n, device="cpu")


def _guidance(scale: float | Numbers, n: int) -> tuple[Tensor, bool]:
    """scale - 1, float32 [n], and whether any sample is guided."""
    if is_plain(scale) and scale == 1:
        return torch.zeros(n, dtype=torch.float32, device="cpu"), False
    guidance = (per_sample("guidance_scale", scale, n, torch.float64) - 1).float()
    if not bool(guidance.isfinite().all()):
        raise ValueError(f"guidance_scale must fit into float32, got {scale}")
    return guidance, bool(guidance.ne(0).any())


def _thresholds(policy: ExitPolicy, given: object, n: int) -> Tensor:
    default = torch.nan if policy.threshold is None else float(policy.threshold)
    threshold = per_sample("thresholds", default if given is None else given, n, torch.float32)
    if n:
        policy.check_thresholds(threshold)
    return threshold


_ALWAYS = torch.tensor([-torch.inf, torch.inf], dtype=torch.float32, device="cpu")


def _interval(given: Sequence[float] | Tensor | None, n: int, schedule: NoiseSchedule) -> Tensor:
    if given is None:
        return _ALWAYS.repeat(n, 1)
    try:
        interval = torch.as_tensor(given, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"guidance_interval must be (low, high), got {given!r}: {error}") from None
    if interval.shape not in ((2,), (n, 2)):
        raise ValueError(f"guidance_interval must be (low, high) or [{n}, 2], got shape {list(interval.shape)}")
    interval = interval.expand(n, 2).clone()
    if not bool((interval[:, 0] <= interval[:, 1]).all()):
        raise ValueError(f"guidance_interval must have low <= high, got {given!r}")
    high, low = schedule.times
    if bool(((interval[:, 0] > high) | (interval[:, 1] < low)).any()):
        raise ValueError(f"guidance_interval contains none of the network's times, {low:.3g}..{high:g}: {given!r}")
    return interval


def _warn_unguided(
    interval: Tensor, solver: Solver, schedule: NoiseSchedule, steps: Tensor, first: Tensor, guidance: Tensor
) -> None:
    """Logs a warning for a guided sample whose steps all lie outside its interval."""
    for count, begin in set(zip(steps.tolist(), first.tolist(), strict=True)):
        t = solver.table(schedule, count).t[begin:].float()
        own = interval[(steps == count) & (first == begin) & guidance.ne(0)]
        for low, high in own[~((own[:, :1] <= t) & (t <= own[:, 1:])).any(1)].tolist():
            warn_once(UNGUIDED, low, high, count)


def _channels(model: Model, given: int | Sequence[int] | Tensor | None, n: int) -> Tensor:
    most = model.backbone.sample_shape[0]
    published = most if model.config.guided_channels is None else model.config.guided_channels
    channels = per_sample("guided_channels", published if given is None else given, n, torch.int64)
    if n and not 1 <= int(channels.min()) <= int(channels.max()) <= most:
        raise ValueError(f"guided_channels must lie in 1..{most}, got {sorted(set(channels.tolist()))[:8]}")
    return channels


def _labels(
    model: Model, given: int | Sequence[int] | Tensor | None, n: int, guided: bool
) -> tuple[Tensor | None, Tensor | None]:
    config = model.config
    if guided and config.null_label is None:
        raise ValueError("guidance needs a model with a null class")
    if not config.network.num_classes:
        if given is not None:
            raise ValueError("this model has no classes; leave class_labels out")
        return None, None
    null = (
        torch.full((n,), config.null_label, dtype=torch.int64, device="cpu") if config.null_label is not None else None
    )
    if given is None:
        if null is None:
            raise ValueError(f"this model needs class_labels in 0..{config.classes - 1}")
        return null, null
    labels = per_sample("class_labels", given, n, torch.int64)
    if n and not 0 <= int(labels.min()) <= int(labels.max()) < config.classes:
        raise ValueError(f"class_labels must be in 0..{config.classes - 1}, got {sorted(set(labels.tolist()))[:8]}")
    return labels, null


def _text(model: Model, params: SamplingParams, n: int, guided: bool) -> tuple[Tensor, Tensor | None]:
    network = model.config.network
    shape = (network.context_tokens, network.context_dim)
    text, null = params.text_embeds, params.null_text_embeds
    if text is None or tuple(text.shape) not in (shape, (n, *shape)):
        raise ValueError(f"this model takes text: text_embeds must be float {list(shape)} or {[n, *shape]}")
    if guided and null is None:
        raise ValueError("guidance needs null_text_embeds, those of the empty prompt")
    if null is not None and tuple(null.shape) != shape:
        raise ValueError(f"null_text_embeds must be float {list(shape)}, got {list(null.shape)}")
    dtype = model.backbone.pos_embed.dtype  # the network's, so that samples of one batch may bring different dtypes
    null = None if null is None else null.detach().to(dtype, copy=True).expand(n, *shape)
    return text.detach().to(dtype, copy=True).expand(n, *shape), null


def _init_image(model: Model, params: SamplingParams, steps: Tensor, n: int) -> tuple[Tensor | None, Tensor]:
    """The images to start from, or None, and the first step of each sample, int64 [n]."""
    image, strength = params.init_image, params.strength
    if image is None:
        return None, torch.zeros_like(steps)
    shape = model.backbone.sample_shape
    if tuple(image.shape) not in (shape, (n, *shape)):
        raise ValueError(f"init_image must be float {list(shape)} or {[n, *shape]}, got {list(image.shape)}")
    if not bool(image.isfinite().all()):
        raise ValueError("init_image holds NaN or infinity")
    strength = per_sample("strength", 0.8 if strength is None else strength, n, torch.float32)
    kept = (strength.double() * steps + 1e-6).long().clamp(min=1)  # steps to run; float32 0.7 is below 0.7
    first = steps - kept
    for i in first.nonzero().squeeze(1).tolist():
        starts = params.solver.table(model.schedule, int(steps[i])).starts
        first[i] = starts[: first[i] + 1].nonzero().max()
    return image.detach().float().expand(n, *shape).clone(), first
