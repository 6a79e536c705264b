"""What exits are trained by. With error e_i = g_i(L_i) - eps of layer i, u_i the UEM's output and r_i = g_i - g_L,
where eps, the noise, is whatever the network predicts (its prediction_type): the target of its training.

paper (Tang et al., ECCV 2024, Eqs. 10 and 12)
    L_simple = mean e_L^2
    L_u      = sum_i mean (u_i - tanh|e_i|)^2           target detached; P = 1: its mean over the patch
    L_UAL    = sum_i mean_b (1 - u_ib) * mean e_ib^2    weight detached, one per sample: the mean of its u
official (Tangshengku/AdaDiff sde.py, mos_lte and mos_layer_wise)
    L_u      = the same, divided by L
    L_UAL    = sum_i W_i mean e_i^2,  W_i = m_i / sum_j m_j,  m_i = 1 - mean u_i over the whole batch, not detached.
               A batch that comes in parts has its means taken beforehand, without gradients, see `BatchMeans`
relative (ours)
    L_u      = sum_(i<L) mean (u_i - log_error(r_i^2))^2    target detached; P = 1: r_i^2 averaged over the patch first
    L_UAL    = sum_(i<L) mean r_i^2                         the teacher g_L detached
supervised (ours)
    L_u      = as in relative
    L_UAL    = sum_(i<L) mean e_i^2

`relative` is for networks that can predict already: from scratch, layers that agree with a teacher who knows nothing
keep it from learning anything (13 blocks, D = 64: L_simple stayed at 1). `supervised` begins anywhere.

All: L_simple + uem_weight * L_u + ual_weight * L_UAL. The noise cannot be known at low noise levels, so |e_i| tells
little about a layer; r_i is what exiting there costs, and a function of what the layer sees.

Where the network learns a variance v (DiT), to each of them is added
    L_v      = L_vlb(v_L) + sum_(i<L) mean (v_i - v_L)^2        the teacher v_L detached in the sum
L_vlb is what DiT's own variance is trained by, with the mean held (Nichol and Dhariwal 2021, section 3.1), so that
training on keeps it. The exits' is taught by the network's: the bound would have them add noise for what exiting early
gets wrong, and hardly sees v but at the last timesteps; a head copied from the network and held would read rows it was
not made for.
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

ERROR_FLOOR = 1e-6  # squared errors below are as good as none
DECADES = 6  # from there to 1, the mean square of the noise itself; a velocity's is up to 2


@dataclass(frozen=True)
class LossTerms:
    """`total` carries the gradient, the others are detached; entry i of [L] is layer i + 1's share of its sum."""

    total: Tensor
    simple: Tensor
    uem: Tensor  # [L]
    ual: Tensor  # [L]
    errors: Tensor  # [L], mean squared error of every layer, to the target
    relative: Tensor  # [L], the same, to the last layer's prediction


Loss = Callable[..., LossTerms]


@dataclass(frozen=True)
class BatchMeans:
    """Of a whole batch, of which a loss is given a part: m and mean e^2 of every layer, [L] each, detached."""

    certainty: Tensor
    errors: Tensor


def batch_means(predictions: Sequence[Tensor], scores: Sequence[Tensor], noise: Tensor) -> BatchMeans:
    """Of the batch given. Those of equal parts have the mean of theirs as that of the whole."""
    certainty = torch.stack([1 - score.mean() for score in scores])
    return BatchMeans(certainty.detach(), _squared(predictions, noise).mean(1).detach())


def log_error(squared: Tensor) -> Tensor:
    """Mean squared errors on a logarithmic scale, what u means in `relative`: 0 at 1e-6 or below, 1 at 1 or above."""
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
    """Arguments as `paper_loss`. whole: of the batch that this is a part of. L_UAL is then that of the whole batch, and
    the mean of the parts' gradients is its gradient: L_UAL is no mean over the parts, but m and mean e^2 are."""
    squared = _squared(predictions, noise)
    uem = _uem_to_noise(predictions, scores, noise, patchify) / len(predictions)
    certainty, errors = torch.stack([1 - score.mean() for score in scores]), squared.mean(1)
    if whole is not None:  # their values, with the gradients of the part
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
    """Arguments as `paper_loss`. The shares of the last layer, which is the teacher, are 0."""
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
    """Arguments as `paper_loss`. The shares of the last layer are 0: L_simple is its own."""
    squared = _squared(predictions, noise)
    uem = _uem_to_teacher(predictions, scores, patchify)
    return _terms(predictions, squared, uem, _without_last(squared.mean(1)), uem_weight, ual_weight)


LOSSES: Mapping[str, Loss] = {
    "paper": paper_loss,
    "official": official_loss,
    "relative": relative_loss,
    "supervised": supervised_loss,
}


OF_WHOLE_BATCHES = frozenset({"official"})  # those that take `whole`; all others are means over samples


def loss_named(name: str) -> Loss:
    """One of LOSSES. Raises ValueError for another name."""
    if name not in LOSSES:
        raise ValueError(f"no loss {name!r}; there are {', '.join(LOSSES)}")
    return LOSSES[name]


class VarianceLoss(nn.Module):
    """L_v of a discrete schedule, layer by layer. ValueError for a schedule without timesteps, "vp" or "flow"."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str = "epsilon"):
        super().__init__()
        if schedule.name in ("vp", "flow"):
            raise ValueError(
                f"a learned variance is one of discrete timesteps, which schedule {schedule.name!r} has not"
            )
        t, alpha_bar = schedule.grid(TIMESTEPS, "leading")
        a, before = alpha_bar[:-1].flip(0), alpha_bar[1:].flip(0)  # by timestep, the last of a run first
        beta = 1 - a / before
        posterior = beta * (1 - before) / (1 - a)
        posterior[0] = posterior[1]
        _, noise = conversion(prediction_type, "epsilon", a.sqrt(), (1 - a).sqrt())  # errors of eps over the network's
        rows = torch.stack([(beta / posterior).log(), beta**2 / ((1 - beta) * (1 - a)) / posterior * noise**2])
        rows[:, 0] = 0  # no noise is added there, so nothing is lost
        self.first = float(t.min())
        self.register_buffer("rows", rows.float(), persistent=False)  # [2, timesteps]

    def forward(self, variances: Sequence[Tensor], prediction: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """L variances, [B, C, H, W]; prediction (the last layer's), noise (its target): [B, C, H, W]; t: float [B].
        Returns [L]."""
        own, teacher = variances[-1], variances[-1].detach()
        spread, mean = self.rows[:, (t - self.first).long()][..., None, None, None].unbind()  # [B, 1, 1, 1] each
        # Kullback-Leibler divergence of two normal distributions, ln(p / q) of their variances and means over q's
        log_ratio = spread * (own + 1) / 2
        squared = mean * (prediction.detach() - noise).square()
        bound = (log_ratio - 1 + (1 + squared) * torch.exp(-log_ratio)) / 2 / math.log(2)  # bits, as in DiT
        exits = [(variance - teacher).square().mean() for variance in variances[:-1]]
        return torch.stack([*exits, bound.mean()])


def _squared(predictions: Sequence[Tensor], noise: Tensor) -> Tensor:
    """[L, B], mean squared errors."""
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
    """[L], the last of which becomes 0."""
    return torch.cat([terms[:-1], terms.new_zeros(1)])


def _terms(
    predictions: Sequence[Tensor], squared: Tensor, uem: Tensor, ual: Tensor, uem_weight: float, ual_weight: float
) -> LossTerms:
    errors = squared.mean(1)
    total = errors[-1] + uem_weight * uem.sum() + ual_weight * ual.sum()
    relative = _squared([p.detach() for p in predictions], predictions[-1].detach()).mean(1)
    return LossTerms(total, errors[-1].detach(), uem.detach(), ual.detach(), errors.detach(), relative)
