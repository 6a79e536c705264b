"""Training losses of exits. Notation: g_i is the prediction at layer i, e_i = g_i - eps its error, u_i the output of
its UEM, and r_i = g_i - g_L its difference to the full network. eps stands for the training target, which is the noise
or whatever else the network predicts (its prediction_type).

paper (Tang et al., ECCV 2024, Eqs. 10 and 12)
    L_simple = mean e_L^2
    L_u      = sum_i mean (u_i - tanh|e_i|)^2           target detached; P = 1: its mean over the patch
    L_UAL    = sum_i mean_b (1 - u_ib) * mean e_ib^2    weight detached, one per sample: the mean of its u
official (Tangshengku/AdaDiff sde.py, mos_lte and mos_layer_wise)
    L_u      = the same, divided by L
    L_UAL    = sum_i W_i mean e_i^2,  W_i = m_i / sum_j m_j,  m_i = 1 - mean u_i over the whole batch, not detached.
               If a batch is split into parts, its means come from a pass without gradients before, see `BatchMeans`
relative (ours)
    L_u      = sum_(i<L) mean (u_i - log_error(r_i^2))^2    target detached; P = 1: r_i^2 averaged over the patch first
    L_UAL    = sum_(i<L) mean r_i^2                         the teacher g_L detached
supervised (ours)
    L_u      = as in relative
    L_UAL    = sum_(i<L) mean e_i^2

`relative` needs a network that predicts already: from scratch, pulling the layers towards an untrained teacher keeps
the network from learning (13 blocks, D = 64: L_simple stayed at 1). `supervised` works from any start.

The total is L_simple + uem_weight * L_u + ual_weight * L_UAL. At low noise levels no network can predict the noise, so
|e_i| says little about a layer; r_i is the cost of exiting there, and depends only on what the layer sees.

If the network learns a variance v (DiT), every loss also has the term
    L_v      = L_vlb(v_L) + sum_(i<L) mean (v_i - v_L)^2        the teacher v_L detached in the sum
L_vlb is the loss of DiT's own variance, with the mean detached (Nichol and Dhariwal 2021, section 3.1), so that further
training preserves it. The variances of exits are trained towards the network's. L_vlb would not do for them: it makes
them add noise for the error of exiting early, and depends on v mainly at the last timesteps. Nor would a frozen copy of
the network's head: it would read hidden states that it was not trained on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.prediction import conversion
from ..diffusion.schedules import NoiseSchedule
from ..diffusion.schedules import T as TIMESTEPS

ERROR_FLOOR = 1e-6  # smaller squared errors count as this
DECADES = 6  # from the floor to 1, the mean square of the noise; that of a velocity reaches 2


@dataclass(frozen=True)
class LossTerms:
    """`total` carries the gradient, the others are detached. Entry i of [L] is the term of layer i + 1."""

    total: Tensor
    simple: Tensor
    uem: Tensor  # [L]
    ual: Tensor  # [L]
    errors: Tensor  # [L], mean squared error of every layer to the target
    relative: Tensor  # [L], mean squared difference of every layer to the last layer's prediction


Loss = Callable[..., LossTerms]


@dataclass(frozen=True)
class BatchMeans:
    """m and mean e^2 of every layer over the whole batch, [L] each, detached, for a loss of a part of that batch."""

    certainty: Tensor
    errors: Tensor


def batch_means(predictions: Sequence[Tensor], scores: Sequence[Tensor], noise: Tensor) -> BatchMeans:
    """`BatchMeans` of these samples, arguments as in `paper_loss`. The means of equal parts average to those of the
    whole batch."""
    certainty = torch.stack([1 - score.mean() for score in scores])
    return BatchMeans(certainty.detach(), _squared(predictions, noise).mean(1).detach())


def log_error(squared: Tensor) -> Tensor:
    """Squared errors on a logarithmic scale, the target of u in `relative`: 0 at 1e-6 or below, 1 at 1 or above."""
    return 1 + torch.log10(squared.clamp(ERROR_FLOOR, 1)) / DECADES


def paper_loss(
    predictions: Sequence[Tensor],
    scores: Sequence[Tensor],
    noise: Tensor,
    patchify: Callable[[Tensor], Tensor],
    uem_weight: float = 1.0,
    ual_weight: float = 1.0,
) -> LossTerms:
    """predictions: L of [B, C, H, W]; scores: L of [B, N, P]; noise: the target of the predictions, [B, C, H, W];
    patchify: -> [B, N, p * p * C]."""
    squared = _squared(predictions, noise)  # [L, B]
    uem = _uem_to_noise(predictions, scores, noise, patchify)
    certainty = torch.stack([1 - score.detach().flatten(1).mean(1) for score in scores])
    ual = (certainty * squared).mean(1)
    return _terms(predictions, squared, uem, ual, uem_weight, ual_weight)


def official_loss(
    predictions: Sequence[Tensor],
    scores: Sequence[Tensor],
    noise: Tensor,
    patchify: Callable[[Tensor], Tensor],
    uem_weight: float = 1.0,
    ual_weight: float = 1.0,
    whole: BatchMeans | None = None,
) -> LossTerms:
    """Arguments as in `paper_loss`. whole: means of the batch that these samples are a part of. L_UAL is then that of
    the whole batch, and the mean of the parts' gradients is its gradient. (L_UAL itself is not a mean over the parts,
    but m and mean e^2 are.)"""
    squared = _squared(predictions, noise)
    uem = _uem_to_noise(predictions, scores, noise, patchify) / len(predictions)
    certainty, errors = torch.stack([1 - score.mean() for score in scores]), squared.mean(1)
    if whole is not None:  # values of the whole batch, gradients of this part
        certainty = whole.certainty + certainty - certainty.detach()
        errors = whole.errors + errors - errors.detach()
    ual = certainty / certainty.sum() * errors
    return _terms(predictions, squared, uem, ual, uem_weight, ual_weight)


def relative_loss(
    predictions: Sequence[Tensor],
    scores: Sequence[Tensor],
    noise: Tensor,
    patchify: Callable[[Tensor], Tensor],
    uem_weight: float = 1.0,
    ual_weight: float = 1.0,
) -> LossTerms:
    """Arguments as in `paper_loss`. The terms of the last layer, which is the teacher, are 0."""
    uem = _uem_to_teacher(predictions, scores, patchify)
    teacher = predictions[-1].detach()
    ual = _without_last(_squared(predictions, teacher).mean(1))
    return _terms(predictions, _squared(predictions, noise), uem, ual, uem_weight, ual_weight)


def supervised_loss(
    predictions: Sequence[Tensor],
    scores: Sequence[Tensor],
    noise: Tensor,
    patchify: Callable[[Tensor], Tensor],
    uem_weight: float = 1.0,
    ual_weight: float = 1.0,
) -> LossTerms:
    """Arguments as in `paper_loss`. The terms of the last layer are 0: its loss is L_simple."""
    squared = _squared(predictions, noise)
    uem = _uem_to_teacher(predictions, scores, patchify)
    return _terms(predictions, squared, uem, _without_last(squared.mean(1)), uem_weight, ual_weight)


LOSSES: Mapping[str, Loss] = {
    "paper": paper_loss,
    "official": official_loss,
    "relative": relative_loss,
    "supervised": supervised_loss,
}


OF_WHOLE_BATCHES = frozenset({"official"})  # losses that take `whole`; the others are means over samples


def loss_named(name: str) -> Loss:
    """One of LOSSES. Raises ValueError for another name."""
    if name not in LOSSES:
        raise ValueError(f"no loss {name!r}; there are {', '.join(LOSSES)}")
    return LOSSES[name]


class VarianceLoss(nn.Module):
    """L_v of every layer. Raises ValueError for a schedule without discrete timesteps ("vp" or "flow")."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str = "epsilon"):
        super().__init__()
        if schedule.name in ("vp", "flow"):
            raise ValueError(
                f"a learned variance needs discrete timesteps, which schedule {schedule.name!r} does not have"
            )
        t, alpha_bar = schedule.grid(TIMESTEPS, "leading")
        a, before = alpha_bar[:-1].flip(0), alpha_bar[1:].flip(0)  # in ascending order of timesteps
        beta = 1 - a / before
        posterior = beta * (1 - before) / (1 - a)
        posterior[0] = posterior[1]
        _, noise = conversion(prediction_type, "epsilon", a.sqrt(), (1 - a).sqrt())  # error of eps per error predicted
        rows = torch.stack([(beta / posterior).log(), beta**2 / ((1 - beta) * (1 - a)) / posterior * noise**2])
        rows[:, 0] = 0  # the last step adds no noise, so its variance costs nothing
        self.first = float(t.min())
        self.register_buffer("rows", rows.float(), persistent=False)  # [2, timesteps]

    def forward(self, variances: Sequence[Tensor], prediction: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """variances: L of [B, C, H, W]; prediction (the last layer's) and noise (its target): [B, C, H, W]; t: float
        [B]. Returns [L]."""
        last, teacher = variances[-1], variances[-1].detach()
        spread, mean = self.rows[:, (t - self.first).long()][..., None, None, None].unbind()  # [B, 1, 1, 1] each
        # Kullback-Leibler divergence of two normal distributions, ln(p / q) of their variances and means over q's
        log_ratio = spread * (last + 1) / 2
        squared = mean * (prediction.detach() - noise).square()
        bound = (log_ratio - 1 + (1 + squared) * torch.exp(-log_ratio)) / 2 / math.log(2)  # bits, as in DiT
        exits = [(variance - teacher).square().mean() for variance in variances[:-1]]
        return torch.stack([*exits, bound.mean()])


def _squared(predictions: Sequence[Tensor], noise: Tensor) -> Tensor:
    """[L, B]: mean squared error of every layer and sample."""
    return torch.stack([(prediction - noise).square().flatten(1).mean(1) for prediction in predictions])


def _uem_to_noise(
    predictions: Sequence[Tensor], scores: Sequence[Tensor], noise: Tensor, patchify: Callable[[Tensor], Tensor]
) -> Tensor:
    """[L]: mean (u - tanh|e|)^2, the target detached."""
    terms = []
    for prediction, score in zip(predictions, scores, strict=True):
        target = patchify(torch.tanh((prediction.detach() - noise).abs()))  # [B, N, p * p * C]
        if score.shape[-1] == 1:
            target = target.mean(-1, keepdim=True)
        terms.append(F.mse_loss(score, target))
    return torch.stack(terms)


def _uem_to_teacher(
    predictions: Sequence[Tensor], scores: Sequence[Tensor], patchify: Callable[[Tensor], Tensor]
) -> Tensor:
    """[L]: mean (u - log_error(r^2))^2, the target detached; 0 for the last layer."""
    terms = []
    for prediction, score in zip(predictions[:-1], scores[:-1], strict=True):
        target = patchify((prediction - predictions[-1]).detach().square())  # [B, N, p * p * C]
        if score.shape[-1] == 1:
            target = target.mean(-1, keepdim=True)
        terms.append(F.mse_loss(score, log_error(target)))
    return torch.stack([*terms, predictions[-1].new_zeros(())])


def _without_last(terms: Tensor) -> Tensor:
    """terms [L] with the last one set to 0."""
    return torch.cat([terms[:-1], terms.new_zeros(1)])


def _terms(
    predictions: Sequence[Tensor], squared: Tensor, uem: Tensor, ual: Tensor, uem_weight: float, ual_weight: float
) -> LossTerms:
    errors = squared.mean(1)
    total = errors[-1] + uem_weight * uem.sum() + ual_weight * ual.sum()
    relative = _squared([p.detach() for p in predictions], predictions[-1].detach()).mean(1)
    return LossTerms(total, errors[-1].detach(), uem.detach(), ual.detach(), errors.detach(), relative)
