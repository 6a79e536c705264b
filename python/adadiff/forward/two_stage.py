"""Two networks on one way from noise to image: a shallow one of its own training for the noisy timesteps, the full one
for the rest (DuoDiff, arXiv 2410.09633; razvanmatisan/duodiff, README and sampler.py, `--t_switch`)."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from adadiff_kernels import upload

from ..model import Model
from ..models.interface import Backbone
from ..policies.exit_policies import Full, Rule
from ..uem import Exits
from .blocks import ForwardOutput
from .counts import Counts
from .forward import evaluate

T_SWITCH = 700.0  # DuoDiff's README: the first 300 of 1000 steps are the shallow network's


@dataclass(frozen=True, eq=False)
class TwoStageForward:
    """Called like `evaluate`. Lanes at `t_switch` and above run through all of `early`, the others through the network
    of the call, by their rules; each lane goes by its own time, and those of one network are evaluated together.

    Of the evaluation, exit_layer counts the blocks of whichever network a lane ran, macs what was run, and macs_full
    the network of the call for all lanes; rows and scores are that network's.
    """

    early: Backbone
    t_switch: float

    def __call__(
        self,
        backbone: Backbone,
        exits: Exits | None,
        rule: Rule | list[Rule],
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        *,
        which: Tensor | None = None,
        threshold: Tensor | None = None,
        pairs: Tensor | None = None,
        counts: Counts | str | None = None,
        record: bool = False,
        **options: bool | int,
    ) -> ForwardOutput:
        """Raises ValueError as `evaluate` does, and for tied lanes on both sides of the switch."""
        first = (t >= self.t_switch).cpu()
        early, late = first.nonzero().squeeze(1), (~first).nonzero().squeeze(1)
        if len(early) == 0:
            given = {"which": which, "threshold": threshold, "pairs": pairs, "counts": counts, "record": record}
            return evaluate(backbone, exits, rule, x, t, context, **given, **options)
        parts = []
        if len(late):
            parts.append(
                evaluate(
                    backbone,
                    exits,
                    rule,
                    *_take(late, x, t, context),
                    **dict(zip(("which", "threshold"), _take(late, which, threshold), strict=True)),
                    pairs=_pairs(pairs, first, late),
                    counts=counts,
                    record=record,
                    **options,
                )
            )
        parts.append(evaluate(self.early, None, Full(), *_take(early, x, t, context), counts=counts, **options))
        return _merge(parts, torch.cat([late, early]), backbone, record)


def two_stage(model: Model, shallow_model: Model | None, t_switch: float | None) -> TwoStageForward | None:
    """What evaluates for `model` with `shallow_model` at times of t_switch (default 700) and above; None without one.

    Raises ValueError for two models that do not draw the same samples in the same way, for an early one that is deeper,
    and for a t_switch outside 0..1000 or without a shallow model.
    """
    if shallow_model is None:
        if t_switch is not None:
            raise ValueError("t_switch is where a shallow model hands over to the full one; give shallow_model, too")
        return None
    t_switch = T_SWITCH if t_switch is None else t_switch
    if isinstance(t_switch, bool) or not isinstance(t_switch, Real) or not 0 <= t_switch <= 1000:
        raise ValueError(f"t_switch must be a number in 0..1000, the network's time, got {t_switch!r}")
    ours, theirs = what_it_draws(model), what_it_draws(shallow_model)
    wrong = [f"{name} {theirs[name]} instead of {value}" for name, value in ours.items() if theirs[name] != value]
    if wrong:
        raise ValueError(f"the shallow model must draw the same samples as the full one; it has {', '.join(wrong)}")
    if shallow_model.layers > model.layers:
        raise ValueError(
            f"the shallow model has {shallow_model.layers} blocks, the full one {model.layers}; are they swapped?"
        )
    return TwoStageForward(shallow_model.backbone, float(t_switch))


def what_it_draws(model: Model) -> dict[str, object]:
    """What models that take each other's place must have in common."""
    config, network = model.config, model.config.network
    parameter = next(model.parameters())
    return {
        "samples of": tuple(model.backbone.sample_shape),
        "schedule": config.schedule,
        "classes": config.classes,
        "null class": config.null_label,
        "text of": (network.context_tokens, network.context_dim) if network.context_tokens else None,
        "learned variance": model.backbone.learned_variance,
        "latent scale": config.latent_scale,
        "dtype": parameter.dtype,
        "device": parameter.device,
    }


def _take(lanes: Tensor, *values: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value[upload(lanes, value.device)] for value in values]


def _pairs(pairs: Tensor | None, first: Tensor, late: Tensor) -> Tensor | None:
    """Partners among the late lanes, counted among them."""
    if pairs is None:
        return None
    partner = pairs.cpu()
    if not torch.equal(first[partner], first):
        raise ValueError("tied lanes leave together, so they need one network; these lie on both sides of t_switch")
    return (~first).long().cumsum(0)[partner[late]] - 1


class _Merged(ForwardOutput):
    """Of parts that may not yet be written: `macs` and `moved` wait for them when they are read."""

    def __init__(self, parts: list[ForwardOutput], **own: object):
        for name, value in {**own, "_parts": parts}.items():
            object.__setattr__(self, name, value)

    @property
    def macs(self) -> int:
        return sum(part.macs for part in self._parts)

    @property
    def moved(self) -> int:
        return sum(part.moved for part in self._parts)


def _merge(parts: list[ForwardOutput], lanes: Tensor, backbone: Backbone, record: bool) -> ForwardOutput:
    """parts: the late lanes' evaluation, if there is one, and the early ones'; lanes: int64 [B], those of the parts."""
    B, L, device = len(lanes), len(backbone.blocks), parts[0].eps.device
    there = upload(lanes, device)

    def ordered(name: str) -> Tensor:
        joined = torch.cat([getattr(part, name) for part in parts])
        return torch.empty_like(joined).index_copy_(0, there, joined)

    late = parts[0] if len(parts) == 2 else None
    scores = torch.full((L, B), math.nan, device=device) if record else None
    if record and late is not None:
        scores[:, there[: len(late.eps)]] = late.scores
    cost = sum(block.macs(backbone.tokens) for block in backbone.blocks) + sum(backbone.stem_and_head_macs())
    return _Merged(
        parts,
        eps=ordered("eps"),
        exit_layer=ordered("exit_layer"),
        macs_full=B * cost,
        scores=scores,
        rows=(0,) * L if late is None else late.rows,
        variance=None if parts[0].variance is None else ordered("variance"),
    )
