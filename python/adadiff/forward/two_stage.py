"""Two networks on one way from noise to image: a shallow one of its own training for the noisy timesteps, the full one
for the rest (DuoDiff, arXiv 2410.09633; razvanmatisan/duodiff, README and sampler.py, `--t_switch`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from adadiff_kernels import upload

from ..model import Model
from ..policies.exits import Full
from ..policies.interface import ExitPolicy, LaneIds
from .forward import run_forward
from .options import ExecutionOptions
from .output import Costs, ForwardOutput
from .structure import structure_of

T_SWITCH = 700.0  # DuoDiff's README: the first 300 of 1000 steps are the shallow network's


@dataclass(frozen=True, eq=False)
class TwoStageForward:
    """Called like `run_forward`. Lanes at `t_switch` and above run through all of `shallow_model`, the others through
    the network of the call, by their policies; each lane goes by its own time, and those of one network run together.

    In the result, exit_layer counts the blocks of whichever network a lane ran; rows and scores are those of the
    network of the call, and costs compare with it.
    """

    shallow_model: Model
    t_switch: float

    def __call__(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        context: Tensor | None,
        *,
        policies: Sequence[ExitPolicy],
        policy_index: Tensor | None,
        threshold: Tensor | None,
        cfg_partner: Tensor | None,
        execution: ExecutionOptions,
        record_scores: bool = False,
        ids: LaneIds | None = None,
    ) -> ForwardOutput:
        """Raises ValueError as `run_forward` does, and for partners on both sides of the switch."""
        noisy = (t >= self.t_switch).cpu()
        first, rest = noisy.nonzero().squeeze(1), (~noisy).nonzero().squeeze(1)
        own = {"execution": execution, "record_scores": record_scores}
        if not len(first):
            given = {"policy_index": policy_index, "threshold": threshold, "cfg_partner": cfg_partner, "ids": ids}
            return run_forward(model, x, t, context, policies=policies, **given, **own)
        shallow = run_forward(
            self.shallow_model,
            *_take(first, x, t, context),
            policies=(Full(),),
            policy_index=None,
            threshold=None,
            cfg_partner=None,
            execution=execution,
        )
        if not len(rest):
            return _merge(model, None, shallow, first, record_scores)
        index, limits = _take(rest, policy_index, threshold)
        full = run_forward(
            model,
            *_take(rest, x, t, context),
            policies=policies,
            policy_index=index,
            threshold=limits,
            cfg_partner=_partners(cfg_partner, noisy, rest),
            ids=None if ids is None else ids.map(lambda value: value[rest]),
            **own,
        )
        return _merge(model, full, shallow, torch.cat([rest, first]), record_scores)


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
    if shallow_model.num_layers > model.num_layers:
        raise ValueError(
            f"the shallow model has {shallow_model.num_layers} blocks, the full one {model.num_layers}; "
            "are they swapped?"
        )
    return TwoStageForward(shallow_model, float(t_switch))


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


def _partners(partner: Tensor | None, noisy: Tensor, rest: Tensor) -> Tensor | None:
    """Partners among the lanes of `rest`, counted there."""
    if partner is None:
        return None
    partner = partner.cpu()
    if not torch.equal(noisy[partner], noisy):
        raise ValueError("partners exit together, so they need one network; these lie on both sides of t_switch")
    return (~noisy).long().cumsum(0)[partner[rest]] - 1


def _merge(
    model: Model, full: ForwardOutput | None, shallow: ForwardOutput, lanes: Tensor, record_scores: bool
) -> ForwardOutput:
    """lanes: int64 [B], those of `full`, then those of `shallow`."""
    parts = [shallow] if full is None else [full, shallow]
    B, L, device = len(lanes), model.num_layers, shallow.prediction.device
    there = upload(lanes, device)

    def by_lane(name: str) -> Tensor:
        joined = torch.cat([getattr(part, name) for part in parts])
        return torch.empty_like(joined).index_copy_(0, there, joined)

    scores = torch.full((L, B), math.nan, dtype=torch.float32, device=device) if record_scores else None
    if record_scores and full is not None:
        scores[:, there[: len(full.prediction)]] = full.scores
    plain = structure_of(model.backbone).costs(None, frozenset()) if full is None else full.costs
    network = torch.ones(B, dtype=torch.int64, device="cpu")
    network[lanes[: B - len(shallow.prediction)]] = 0
    costs = Costs(plain.plain, (*plain.by_exit_layer, *shallow.costs.by_exit_layer), tuple(network.tolist()))
    return ForwardOutput(
        prediction=by_lane("prediction"),
        exit_layer=by_lane("exit_layer"),
        costs=costs,
        rows=(0,) * L if full is None else full.rows,
        moved=shallow.moved if full is None else full.moved,
        scores=scores,
        variance=None if shallow.variance is None else by_lane("variance"),
    )
