"""Recorded runs of the full network: uncertainty and error of every layer at every step, and the effect of an error on
the final image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..diffusion.prediction import predicted_sample, target_of
from ..forward.all_layers import all_layers
from ..forward.forward import run_forward
from ..forward.output import Costs, ForwardOutput
from ..model import Model
from ..models.interface import Backbone
from ..sampling.batch import Batch
from ..sampling.sample_batch import SampleBatch
from ..uem import Exits
from .kept_runs import KeptRuns, number

Distance = Callable[[Tensor, Tensor], float]  # images and the full network's images, [n, C, H, W] each -> mean distance
Extractor = Callable[[Tensor], Tensor]  # images [n, C, H, W] in [-1, 1] -> features [n, F]


@dataclass(frozen=True)
class Recording:
    """n lanes at S steps of the full network; K = L - 1 layers before the last. Errors are those of the network's own
    prediction_type, on which its uncertainties were trained. Their effect on the final images, through the solver, is
    measured by `measure_weights`."""

    t: Tensor  # float64 [S], the network's times, in the order of the run
    u: Tensor  # float32 [S, K, n], uncertainties
    relative: Tensor  # float32 [S, K, n], mean squared difference to the last layer's prediction
    error: Tensor  # float32 [S, K, n], error of exiting: `relative`, with features rescaled to their mean error
    images: Tensor  # float32 [samples, C, H, W]


class Watched(NamedTuple):
    """One forward pass of B lanes."""

    predictions: list[Tensor]  # every layer's, L of [B, C, H, W]
    u: Tensor  # float32 [K, B]
    relative: Tensor  # float32 [K, B], as in Recording
    rows: list[Tensor]  # after every block, L of [B, T, D]


@torch.no_grad()
def watch(backbone: Backbone, exits: Exits, x: Tensor, t: Tensor, context: Tensor | None) -> Watched:
    predictions, scores, _, rows = all_layers(backbone, exits, x, t, context)
    u = torch.stack([score.flatten(1).mean(1) for score in scores[:-1]])
    full = predictions[-1].float()
    relative = torch.stack([(p.float() - full).square().flatten(1).mean(1) for p in predictions[:-1]])
    return Watched(predictions, u, relative, rows)


def run(
    model: Model, samples: SampleBatch, batch: int, new_forward: Callable[[], Callable[..., ForwardOutput]]
) -> Tensor:
    """Draws samples, `batch` at a time in lockstep. new_forward: makes the forward function of each batch. Returns the
    images, float32 [samples, C, H, W] on the CPU."""
    images = torch.empty(samples.n, *model.backbone.sample_shape, dtype=torch.float32, device="cpu")
    for begin in range(0, samples.n, batch):
        index = np.arange(begin, min(samples.n, begin + batch))
        flight, sample = Batch(model, len(index), forward=new_forward()), np.empty_like(index)
        sample[flight.admit(samples, index)] = index
        while flight.count:
            tick = flight.tick()
            if tick.failed:
                raise next(iter(tick.failed.values()))
            images[torch.from_numpy(sample[tick.done])] = flight.take(tick.done).cpu()
    return images


def record(
    model: Model,
    samples: SampleBatch,
    batch: int,
    features: Extractor | None = None,
    visit: Callable[[int, float, Tensor, Tensor], object] | None = None,
) -> Recording:
    """samples: with the policy "full" and the same number of steps each. Lanes are in order; in each batch, the
    unconditional lanes follow the conditional ones.
    features: if given, the mean error of a step and layer is the mean squared difference between features of the x0
    that its prediction gives and those of the full network's x0. How lanes differ around this mean is taken from
    `relative`, because the hidden states of a lane hardly predict its error in features.
    visit: called at every step with its number in 0..S - 1, its time, the hidden states after each block but the last,
    averaged over the patch tokens [K, B, D], and relative [K, B]."""
    watched: list[list[tuple[float, Tensor, Tensor, Tensor]]] = []

    def new_forward() -> Callable[..., ForwardOutput]:
        rows: list[tuple[float, Tensor, Tensor, Tensor]] = []
        watched.append(rows)

        def forward(model: Model, x: Tensor, t: Tensor, context: Tensor | None, **_: object) -> ForwardOutput:
            seen = watch(model.backbone, model.exits, x, t, context)
            error = seen.relative
            if features is not None:
                error = _feature_errors(features, model, x, t, seen.predictions)
            if visit is not None:
                prefix = model.exits.num_prefix_tokens
                means = torch.stack([hidden[:, prefix:].mean(1) for hidden in seen.rows[:-1]])
                visit(len(rows), float(t[0]), means, seen.relative)
            rows.append((float(t[0]), seen.u.cpu(), seen.relative.cpu(), error.cpu()))
            return _output(seen.predictions[-1])

        return forward

    images = run(model, samples, batch, new_forward)
    t = torch.tensor([row[0] for row in watched[0]], dtype=torch.float64, device="cpu")
    u, relative, error = (
        torch.stack([torch.cat([rows[i][part] for rows in watched], 1) for i in range(len(t))]) for part in (1, 2, 3)
    )
    if features is not None:
        means = (value.double().mean(-1, keepdim=True) for value in (error, relative))
        error = (relative * torch.div(*means).nan_to_num(0, 0)).float()
    return Recording(t, u, relative, error, images)


def _feature_errors(features: Extractor, model: Model, x: Tensor, t: Tensor, predictions: Sequence[Tensor]) -> Tensor:
    """float32 [K, B]: mean squared difference of features between each layer's x0 and the last layer's."""
    level = map(float, model.schedule.alpha_sigma(t[:1].double().cpu()))
    kind, alpha, sigma = model.config.prediction_type, *level
    *early, full = (features(predicted_sample(kind, p, x, alpha, sigma).clamp(-1, 1)) for p in predictions)
    return torch.stack([(one - full).square().mean(1).float() for one in early])


def measure_weights(
    model: Model,
    samples: SampleBatch,
    recording: Recording,
    distance: Distance,
    *,
    batch: int,
    places: int = 8,
    tick: Callable[[], object] = lambda: None,
    kept: KeptRuns | None = None,
) -> Tensor:
    """Effect of a unit of error at each step on the final images, float64 [S].

    At `places` evenly spread steps, one run replaces the full prediction by that of layer L / 4, another by that of
    layer L / 2; all other steps are full. The weight is the final distance divided by the mean error that was put in:
    its geometric mean over the two runs, log-interpolated between the steps. It is measured, because a linear analysis
    of single steps is far off at high noise, where later steps correct much of the error.
    samples: the first ones of the recording. tick: called after each run. kept: keeps the results of the runs.
    """
    kept = kept or KeptRuns()
    S, L = len(recording.t), model.num_layers
    chosen = sorted(set(np.linspace(0, S - 1, min(S, places)).round().astype(int).tolist()))
    layers = sorted({max(1, L // 4), max(1, L // 2)})
    reference = recording.images[: samples.n]
    logs = []
    for at in chosen:
        of_layers = []
        for layer in layers:

            def reached(at: int = at, layer: int = layer) -> dict[str, Tensor]:
                images = run(model, samples, batch, partial(_replacing, at, layer))
                return {"distance": number(distance(images, reference))}

            put_in = float(recording.error[at, layer - 1, : samples.lanes].double().mean())
            found = float(kept.run(f"weight-{at}-{layer}", reached)["distance"])
            of_layers.append(np.log(max(found, 1e-30) / max(put_in, 1e-30)))
            tick()
        logs.append(float(np.mean(of_layers)))
    return torch.from_numpy(np.exp(np.interp(np.arange(S), chosen, logs)))


def _replacing(at: int, layer: int) -> Callable[..., ForwardOutput]:
    """A forward function whose call number `at`, counted from 0, returns the prediction of `layer`."""
    calls = 0

    def forward(model: Model, x: Tensor, t: Tensor, context: Tensor | None, **given: object) -> ForwardOutput:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            return _output(watch(model.backbone, model.exits, x, t, context).predictions[layer - 1])
        return run_forward(model, x, t, context, **given)

    return forward


def _output(prediction: Tensor) -> ForwardOutput:
    """Forward output with placeholder exits and costs, which recording does not use."""
    exit_layer = torch.ones(len(prediction), dtype=torch.int32, device=prediction.device)
    return ForwardOutput(prediction, exit_layer, Costs(0, ((0, 0),)), (), 0)


def noised_errors(
    model: Model, images: Tensor, labels: Tensor | None, times: Sequence[float], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Uncertainties, and mean squared errors to the training target (the true noise, for networks that predict noise),
    of every layer but the last: float32 [S, K, n] each.

    images: real images, float32 [n, C, H, W], which are noised to each of the S times. labels: int64 [n] or None.
    """
    schedule = model.schedule
    t = torch.tensor(times, dtype=torch.float64, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    u, errors = [], []
    for time, alpha, sigma in zip(t, *schedule.alpha_sigma(t), strict=True):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float32, device="cpu")
        x = (alpha * images + sigma * noise).float()
        target = target_of(model.config.prediction_type, images, noise, alpha, sigma).float()
        seen = watch(model.backbone, model.exits, x, time.float().expand(len(x)), labels)
        u.append(seen.u)
        errors.append(torch.stack([(p - target).square().flatten(1).mean(1) for p in seen.predictions[:-1]]))
    return torch.stack(u), torch.stack(errors)
