"""Caches of the rest of the network, by hand: one sample, plain blocks, a dictionary as the cache, DDIM as printed."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from adadiff.config import ModelConfig
from adadiff.diffusion.noise import initial_noise
from adadiff.diffusion.solvers import DDIM
from adadiff.model import Model
from adadiff.models.dit import DiT, DiTConfig
from adadiff.policies.estimated import ErrorEstimates, EstimatedReuse
from adadiff.uem import ExitConfig
from sampler.tiny import SERVED, Inputs, _layers, plain_uncertainties, scramble, served

# T = 4 tokens, no prefix token, 4 blocks, a learned variance; heads of their own behind an MLP
SERVED_DIT = ModelConfig(
    DiTConfig(image_size=4, channels=1, patch=2, dim=12, depth=4, heads=2, num_classes=4),
    "linear",
    null_label=3,
    exits=ExitConfig(head="mlp"),
)


@cache
def models() -> dict[str, Model]:
    """Tiny ones, two families; one without any exits. Scores and changes of theirs lie wide apart."""
    dit = Model(SERVED_DIT).requires_grad_(False).eval()
    scramble(dit.backbone, 0.25, seed=1)
    scramble(dit.exits, 0.3, seed=5)
    plain = served(dataclasses.replace(SERVED, exits=None))
    return {"uvit": served(), "dit": dit, "plain": plain}


@dataclass(frozen=True)
class Plan:
    """cache: threshold, None where `every` or `estimated` decides. exits: threshold of an exit policy, None without."""

    cache: float | None = None
    gate: str = "residual"
    first: int = 1
    every: int = 0
    dense_early: int = 1
    dense_late: int = 0
    exits: float | None = None
    order: int = 0
    estimated: EstimatedReuse | None = None

    @property
    def policy(self) -> str | list:
        if self.estimated is None:
            return str(self)
        return [self.estimated] if self.exits is None else [self.estimated, f"exit:{self.exits!r}"]

    def __str__(self) -> str:
        if self.cache is not None:
            text = f"cache:threshold={self.cache!r},first={self.first},gate={self.gate}"
        else:
            text = f"reuse:every={self.every},dense_early={self.dense_early},dense_late={self.dense_late}"
        text += f",order={self.order}"
        return text if self.exits is None else f"{text}+exit:{self.exits!r}"


@dataclass
class Made:
    """x: [C, H, W]. blocks, reused: [steps][halves], blocks run and who reused. margin: the least distance of a number
    from the threshold it was compared with."""

    x: Tensor
    blocks: list[list[int]]
    reused: list[list[bool]]
    margin: float = torch.inf

    def compare(self, value: float, threshold: float) -> float:
        if value == value:
            self.margin = min(self.margin, abs(value - threshold))
        return value


def by_hand(
    model: Model,
    plan: Plan,
    steps: int,
    seed: int = 0,
    label: int = 1,
    scale: float = 1.0,
    tied: bool = False,
    interval: tuple[float, float] = (-1e9, 1e9),
    seen: list[Tensor] | None = None,
) -> Made:
    """What a sample with `plan` becomes. scale: of the guidance. seen: gets the growth [1, N, D] of each full step."""
    backbone, exits, L, null = model.backbone, model.exits, model.num_layers, model.config.null_label
    table = DDIM().table(model.schedule, steps)
    x = initial_noise(torch.tensor([seed]), backbone.sample_shape, torch.device("cpu"))
    made, caches = Made(x[0], [], []), ({}, {})
    for i, t in enumerate(table.t):
        guided = scale != 1 and interval[0] <= t <= interval[1]
        halves = []
        for half in range(1 + guided):
            time, context = t.float()[None], torch.tensor([null if half else label])
            begun, cond = backbone.embed(x, time, context)
            layers = _layers(backbone, x, time, context)
            u = None
            if plan.exits is not None:
                given = Inputs(x, time, context)
                u = plain_uncertainties(backbone, exits, given, torch.stack(layers))[:, 0].tolist()
            halves.append((begun, cond, layers, u, caches[half]))
        depth = [_depth(made, plan, u, L) for *_, u, _ in halves]
        if tied and guided:
            u = [max(pair) for pair in zip(*(u or [0] * L for *_, u, _ in halves), strict=True)]
            depth = [_depth(made, plan, u if plan.exits is not None else None, L)] * 2
        hits = [
            _change(made, plan, kept, begun, layers, cond, backbone, i, steps)
            for begun, cond, layers, _, kept in halves
        ]
        hits = [hit and d > plan.first for hit, d in zip(hits, depth, strict=True)]
        if tied and guided:
            hits = [all(hits)] * 2
        eps, blocks = [], []
        for (begun, cond, layers, _, kept), d, hit in zip(halves, depth, hits, strict=True):
            h, k = layers[d - 1], d
            if hit:
                h, k = layers[plan.first - 1].clone(), kept["ended"]
                h[:, backbone.num_prefix_tokens :] += kept["rest"] + (i - kept["made"]) * kept["growth"]
            elif d > plan.first:
                rest = (h - layers[plan.first - 1])[:, backbone.num_prefix_tokens :]
                growth = torch.zeros_like(rest)
                kept["known"] = kept.get("ended") == d == L
                kept["estimates"] = kept.get("estimates", []) if kept["known"] else []
                if plan.order and kept.get("ended") == d:
                    growth = (rest - kept["rest"]) / (i - kept["made"])
                if seen is not None:
                    seen.append(growth)
                kept |= {"rest": rest, "growth": growth, "ended": d, "made": i, "total": 0.0}
                if plan.estimated is not None and kept["known"]:
                    kept["estimates"].append(_deviation(plan.estimated.estimates, i, growth))
                if plan.gate == "residual":
                    kept["reference"] = layers[plan.first - 1] - begun
            head = backbone.head if k == L else exits.head(backbone, k)
            eps.append(head(h[:, backbone.num_prefix_tokens :], cond, torch.zeros(1, dtype=torch.int32)))
            blocks.append(plan.first if hit else d)
        eps = [one[:, : x.shape[1]] for one in eps]
        noise = eps[0] if not guided else eps[1] + scale * (eps[0] - eps[1])
        a = model.schedule.log_alpha_bar(t).exp()
        after = model.schedule.log_alpha_bar(table.t[i + 1]).exp() if i + 1 < steps else torch.ones(())
        clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
        x = (after.sqrt() * clean + (1 - after).sqrt() * noise).float()
        made.blocks.append(blocks + [0] * (2 - len(blocks)))
        made.reused.append([*hits, *[False] * (2 - len(hits))])
    made.x = x[0]
    return made


def _depth(made: Made, plan: Plan, u: list[float] | None, L: int) -> int:
    """Blocks until an exit policy lets a lane exit; L where none does."""
    if u is None:
        return L
    return next((k for k in range(1, L) if made.compare(u[k - 1], plan.exits) < plan.exits), L)


def _change(made, plan, cache, begun, layers, cond, backbone, step, steps) -> bool:
    """Whether the plan would have the lane reuse, and what its gate notes."""
    change, found = 0.0, "made" in cache
    if plan.cache is not None and plan.gate == "input":
        if isinstance(backbone, DiT):
            shift, scale, _ = cond.modulation[:, 0, 0].unbind(1)
            read = layer_norm(begun, begun.shape[-1:], eps=1e-6) * (1 + scale) + shift
        else:
            read = backbone.blocks[0].norm1(begun)
        if "reference" in cache:
            cache["total"] += float((read - cache["reference"]).abs().mean() / cache["reference"].abs().mean())
        else:
            cache["total"] = 0.0
        change, cache["reference"] = cache["total"], read
    elif plan.cache is not None and found:
        reference = cache["reference"]
        change = float((layers[plan.first - 1] - begun - reference).abs().mean() / reference.abs().mean())
    if not found:
        return False
    if plan.estimated is not None:
        return _estimated(made, plan.estimated, cache, step)
    if plan.cache is not None:
        return made.compare(change, plan.cache) <= plan.cache
    late = steps - 1 - step < plan.dense_late
    return step >= plan.dense_early and step - cache["made"] < plan.every and not late


def _estimated(made: Made, policy: EstimatedReuse, cache: dict, step: int) -> bool:
    """The formula of policies/estimated.py, number by number."""
    if step < 2 or not cache["known"]:
        return False
    estimates, found = policy.estimates, cache["estimates"]
    error = estimates.profile[step] + estimates.age_power * math.log(step - cache["made"])
    if policy.decides == "sample":
        error += sum(found) / len(found)
    return made.compare(error, policy.level) <= policy.level


def _deviation(estimates: ErrorEstimates, step: int, growth: Tensor) -> float:
    found = estimates.offsets[step]
    for weight, channel in zip(estimates.weights[step], growth[0].T, strict=True):
        found += weight * float(channel.abs().mean())
    return found
