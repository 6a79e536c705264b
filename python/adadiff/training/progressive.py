"""Progressive distillation (Salimans and Ho, ICLR 2022, arXiv 2202.00512, algorithm 2): a student learns to do in one
DDIM step what its teacher does in two.

Predictions are converted to eps here. An unweighted loss of eps would neglect the noisiest timesteps, where an error of
eps becomes one of sqrt((1 - a) / a) times its size in x0: 14 at the first timestep of the schedule "stable_diffusion".
So the loss is the paper's loss of x0 with truncated weights max(a / (1 - a), 1), which is a loss of eps with weights
max(1, (1 - a) / a). a is alpha_bar.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.datasets import Dataset
from ..diffusion.prediction import predicted_noise
from ..diffusion.schedules import NoiseSchedule
from ..model import Model

MOST_NORM = 1.0  # gradients are scaled down to this norm
SPACING = "trailing"  # of `DDIM`: the timesteps for N steps are every second one of those for 2 N


@dataclass(frozen=True)
class Pairs:
    """N pairs of the teacher's steps. t, middle: float64 [N], the network's times at the first and second evaluation.
    a, a_middle, a_after: float64 [N], alpha_bar before, between and after the two steps."""

    t: Tensor
    middle: Tensor
    a: Tensor
    a_middle: Tensor
    a_after: Tensor


def step_pairs(schedule: NoiseSchedule, steps: int) -> Pairs:
    """Pairs for a student of `steps` steps. Raises ValueError where the student's timesteps are not every second one of
    the teacher's, and for a schedule without that spacing."""
    if SPACING not in schedule.spacings:
        raise ValueError(f"distillation needs spacing {SPACING!r}, which schedule {schedule.name!r} does not have")
    t, alpha_bar = schedule.grid(2 * steps, SPACING)
    student_t, student_alpha_bar = schedule.grid(steps, SPACING)
    if not torch.equal(t[::2], student_t):
        raise ValueError(
            f"the timesteps of {steps} steps are not every second one of those of {2 * steps}; take a power of two"
        )
    return Pairs(student_t, t[1::2], student_alpha_bar[:-1], alpha_bar[1::2], student_alpha_bar[1:])


def ddim_step(x: Tensor, eps: Tensor, a: Tensor, after: Tensor) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021, equation 12), from alpha_bar `a` to `after`: as x, or [B, 1, ...]."""
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    return after.sqrt() * x0 + (1 - after).sqrt() * eps


def eps_between(x: Tensor, x_after: Tensor, a: Tensor, after: Tensor) -> Tensor:
    """The eps with which one DDIM step takes x at `a` to x_after: the paper's target x0 = (z'' - (s'' / s) z) /
    (a'' - (s'' / s) a), converted to eps."""
    ratio = ((1 - after) / (1 - a)).sqrt()
    x0 = (x_after - ratio * x) / (after.sqrt() - ratio * a.sqrt())
    return (x - a.sqrt() * x0) / (1 - a).sqrt()


@torch.no_grad()
def two_step_target(
    predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, pairs: Pairs, index: Tensor
) -> tuple[Tensor, Tensor]:
    """predict: the teacher, (x, t float [B]) -> eps; x: float [B, C, H, W], noisy images; index: int64 [B], the pair of
    each. Returns the student's target eps, shaped like x, and the weights of its squared errors, float [B]."""
    a, a_middle, a_after = (_by_sample(value[index], x) for value in (pairs.a, pairs.a_middle, pairs.a_after))
    between = ddim_step(x, predict(x, pairs.t[index].float()), a, a_middle)
    after = ddim_step(between, predict(between, pairs.middle[index].float()), a_middle, a_after)
    weight = ((1 - a) / a).clamp(min=1)
    return eps_between(x, after, a, a_after), weight.flatten()


def predict_eps(model: Model, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """eps of the full network, [B, C, H, W], converted from its prediction_type, without a learned variance."""
    prediction = model.backbone(x, t.to(x.device), labels)[:, : x.shape[1]]
    if (kind := model.config.prediction_type) == "epsilon":
        return prediction
    alpha, sigma = (_by_sample(value, x) for value in model.schedule.alpha_sigma(t.double().cpu()))
    return predicted_noise(kind, prediction, x, alpha, sigma)


def halve(
    teacher: Model,
    data: Dataset,
    steps: int,
    *,
    updates: int,
    batch: int,
    lr: float,
    label_drop: float,
    seed: int,
    on_update: Callable[[int, float], None] = lambda step, loss: None,
) -> Model:
    """A copy of `teacher`, trained to take `steps` DDIM steps instead of twice as many.

    Adam; the learning rate falls linearly from `lr` to 0. The random numbers of update k come from (seed, k).
    on_update: called with k + 1 and the loss. Raises FloatingPointError for gradients that are not finite.
    """
    student, pairs, config = copy.deepcopy(teacher).train(), step_pairs(teacher.schedule, steps), teacher.config
    student.requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr)
    for k in range(updates):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + k)
        drawn = {"generator": generator, "device": "cpu"}
        x0, labels = data.batch(torch.randint(len(data), (batch,), **drawn))
        device = teacher.device
        drop = torch.rand(batch, dtype=torch.float32, **drawn) < label_drop
        index = torch.randint(steps, (batch,), **drawn)
        noise = torch.randn(x0.shape, dtype=torch.float32, **drawn)
        if not config.network.num_classes:
            labels = None
        elif config.null_label is not None:
            labels = labels.masked_fill(drop, config.null_label)
        x0, noise, labels = x0.to(device), noise.to(device), None if labels is None else labels.to(device)
        a = _by_sample(pairs.a[index], x0)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        target, weight = two_step_target(lambda x, t, own=labels: predict_eps(teacher, x, t, own), x, pairs, index)
        eps = predict_eps(student, x, pairs.t[index].float(), labels)
        loss = (weight * F.mse_loss(eps, target, reduction="none").flatten(1).mean(1)).mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - k / updates)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(student.parameters(), MOST_NORM)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} at update {k} of {steps} steps; nothing was written"
            )
        optimizer.step()
        on_update(k + 1, float(loss.detach()))
    return student.eval().requires_grad_(False)


def _by_sample(value: Tensor, x: Tensor) -> Tensor:
    """value [B] on x's device, reshaped to broadcast with x [B, ...]."""
    return value.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))
