"""Runs that are watched: what every layer would have said along the full network's way, and what an error costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..engine import evaluate as engine
from ..engine.evaluate import Evaluation
from ..exits import Exits, all_layers
from ..model import Model
from ..models.interface import Backbone
from ..sampling.batch import Batch
from ..sampling.samples import Samples

# Of images [n, C, H, W] from the full network's: of each, [n], or of the whole set, a scalar.
Distance = Callable[[Tensor, Tensor], Tensor]
TINY = 1e-30  # instead of no error, which has no logarithm
MOST_POWER = 4.0


@dataclass(frozen=True)
class Recording:
    """n lanes at S evaluations of the full network, K = L - 1 layers before its last."""

    t: Tensor  # float64 [S], the network's times, in the order of the run
    u: Tensor  # float32 [S, K, n], uncertainties
    relative: Tensor  # float32 [S, K, n], mean squared difference to the last layer's prediction
    images: Tensor  # float32 [samples, C, H, W]


@torch.no_grad()
def watch(
    backbone: Backbone, exits: Exits, x: Tensor, t: Tensor, context: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every layer's prediction, L of [B, C, H, W]; uncertainties and errors relative to the last, float32 [K, B]."""
    predictions, scores, _ = all_layers(backbone, exits, x, t, context)
    u = torch.stack([score.flatten(1).mean(1) for score in scores[:-1]])
    full = predictions[-1].float()
    relative = torch.stack([(p.float() - full).square().flatten(1).mean(1) for p in predictions[:-1]])
    return predictions, u, relative


def run(model: Model, samples: Samples, batch: int, evaluator: Callable[[], Callable[..., Evaluation]]) -> Tensor:
    """Draws samples, `batch` at a time in lock step, each batch with an `evaluate` of its own. Returns the images."""
    images = torch.empty(samples.n, *model.backbone.sample_shape)
    for index in torch.arange(samples.n).split(batch):
        flight = Batch(model, len(index), evaluate=evaluator())
        slot = torch.empty_like(index)
        slot[flight.admit(samples, index)] = index
        while flight.count:
            tick = flight.tick()
            if tick.failed:
                raise next(iter(tick.failed.values()))
            images[slot[tick.done]] = flight.take(tick.done)
    return images


def record(model: Model, samples: Samples, batch: int) -> Recording:
    """samples: with the rule "full" and equally many steps each. Lanes are in order, the unconditional ones of each
    batch after its conditional ones."""
    watched: list[list[tuple[float, Tensor, Tensor]]] = []

    def evaluator() -> Callable[..., Evaluation]:
        rows: list[tuple[float, Tensor, Tensor]] = []
        watched.append(rows)

        def evaluate(
            backbone: Backbone,
            exits: Exits,
            rule: object,
            x: Tensor,
            t: Tensor,
            context: Tensor | None = None,
            **_: object,
        ) -> Evaluation:
            predictions, u, relative = watch(backbone, exits, x, t, context)
            rows.append((float(t[0]), u, relative))
            return _whole(predictions[-1])

        return evaluate

    images = run(model, samples, batch, evaluator)
    t = torch.tensor([row[0] for row in watched[0]], dtype=torch.float64)
    u, relative = (
        torch.stack([torch.cat([rows[i][part] for rows in watched], 1) for i in range(len(t))]) for part in (1, 2)
    )
    return Recording(t, u, relative, images)


@dataclass(frozen=True)
class Costs:
    """What an error relative to the full network does to the images: r at evaluation i adds scale[i] * r ** power[i].

    The power is far above 1 where the noise is high: there the sampler corrects what is small, and what is large leads
    to another image.
    """

    scale: Tensor  # float64 [S]
    power: Tensor  # float64 [S]

    def of(self, relative: Tensor) -> Tensor:
        """relative: [S, ...]. Returns float64 [S, ...]."""
        shape = (-1, *[1] * (relative.ndim - 1))
        return self.scale.view(shape) * relative.double() ** self.power.view(shape)


def measure_costs(
    model: Model,
    samples: Samples,
    recording: Recording,
    distance: Distance,
    *,
    batch: int,
    places: int = 8,
    tick: Callable[[], object] = lambda: None,
) -> Costs:
    """At `places` evaluations, evenly spread, the full prediction is replaced by that of a shallow layer, and in a
    second run of one less shallow; the rest of the run is full. The line through the logarithms of the errors put in
    and of the final ones of all samples of both runs has the power as its slope; where samples have no final error or
    several lanes each, it is 1. The scale meets the mean final error. In between, the power and the logarithm of the
    cost of the mean error are interpolated: a linear theory of single steps is far off.

    samples: the first of those of the recording, its lanes included. tick: called after each run.
    """
    S, L = len(recording.t), model.layers
    chosen = sorted(set(np.linspace(0, S - 1, min(S, places)).round().astype(int).tolist()))
    layers = sorted({max(1, L // 4), max(1, L // 2)})
    reference = recording.images[: samples.n]
    put_in = recording.relative[:, [layer - 1 for layer in layers], : samples.lanes].double().clamp(min=TINY)
    mean = put_in.mean((1, 2)).log().numpy()  # [S]
    powers, logs = [], []
    for at in chosen:
        final = []
        for layer in layers:
            final.append(distance(run(model, samples, batch, partial(_replacing, at, layer)), reference).double())
            tick()
        power, own = 1.0, torch.stack(final).clamp(min=TINY)  # [layers] or [layers, n]
        if own.shape == put_in[at].shape:
            power = _slope(put_in[at].log().flatten(), own.log().flatten())
        scale = own.flatten(1).mean(1) if own.ndim > 1 else own
        scale = (scale.log() - (put_in[at] ** power).mean(1).log()).mean()
        powers.append(power)
        logs.append(float(scale) + power * mean[at])
    power, log = (np.interp(np.arange(S), chosen, values) for values in (powers, logs))
    return Costs(torch.from_numpy(np.exp(log - power * mean)), torch.from_numpy(power))


def _slope(x: Tensor, y: Tensor) -> float:
    """Of the line of least squares, within what `Costs` can be trusted to mean."""
    x = x - x.mean()
    slope = float((x * y).sum() / x.square().sum().clamp(min=TINY))
    return min(max(slope, 1.0), MOST_POWER)


def _replacing(at: int, layer: int) -> Callable[..., Evaluation]:
    """An `evaluate` whose call number `at`, from 0, answers with the prediction of `layer`."""
    calls = 0

    def evaluate(
        backbone: Backbone,
        exits: Exits,
        rule: object,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        **given: object,
    ) -> Evaluation:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            return _whole(watch(backbone, exits, x, t, context)[0][layer - 1])
        return engine.evaluate(backbone, exits, rule, x, t, context, **given)

    return evaluate


def _whole(eps: Tensor) -> Evaluation:
    return Evaluation(eps, torch.ones(len(eps), dtype=torch.int32, device=eps.device), 0, 0, 0, None)


def noised_errors(
    model: Model, images: Tensor, labels: Tensor | None, times: Sequence[float], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Uncertainties, and mean squared errors to the true noise, of every layer but the last: float32 [S, K, n] each.

    images: float32 [n, C, H, W], real ones, noised to each of the S times.
    """
    schedule = model.schedule
    t = torch.tensor(times, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    u, errors = [], []
    for time, alpha_bar in zip(t, schedule.log_alpha_bar(t).exp(), strict=True):
        noise = torch.randn(images.shape, generator=generator)
        x = (alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise).float()
        predictions, own, _ = watch(model.backbone, model.exits, x, time.float().expand(len(x)), labels)
        u.append(own)
        errors.append(torch.stack([(p - noise).square().flatten(1).mean(1) for p in predictions[:-1]]))
    return torch.stack(u), torch.stack(errors)
