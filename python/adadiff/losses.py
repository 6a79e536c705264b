"""AdaDiff's training loss: L_simple + uem * L_u + ual * L_UAL (Tang et al., ECCV 2024, Eqs. 10 and 12).

With error e_i = g_i(L_i) - eps of layer i and u_i the UEM's output:
    L_simple = mean e_L^2
    L_u      = sum_i mean (u_i - tanh|e_i|)^2           target detached; P = 1: its mean over the patch
    L_UAL    = sum_i mean_b (1 - u_ib) * mean e_ib^2    weight detached, one per sample: the mean of its u
The sums run over all L layers, as the paper prints them; the official code averages L_u and normalises L_UAL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    total: Tensor
    simple: Tensor
    uem: Tensor
    ual: Tensor
    errors: Tensor  # [L], mean squared error of every layer, detached


def adadiff_loss(
    predictions: Sequence[Tensor],
    scores: Sequence[Tensor],
    noise: Tensor,
    patchify: Callable[[Tensor], Tensor],
    uem_weight: float = 1.0,
    ual_weight: float = 1.0,
) -> LossTerms:
    """predictions: L of [B, C, H, W]; scores: L of [B, N, P]; noise: [B, C, H, W]; patchify: -> [B, N, p * p * C]."""
    uem = ual = noise.new_zeros(())
    errors = []
    for prediction, score in zip(predictions, scores, strict=True):
        error = prediction - noise
        squared = error.square().flatten(1).mean(1)  # [B]
        target = patchify(torch.tanh(error.detach().abs()))  # [B, N, p * p * C]
        if score.shape[-1] == 1:
            target = target.mean(-1, keepdim=True)
        uem = uem + (score - target).square().mean()
        ual = ual + ((1 - score.detach().flatten(1).mean(1)) * squared).mean()
        errors.append(squared.mean())
    simple = errors[-1]
    total = simple + uem_weight * uem + ual_weight * ual
    return LossTerms(total, simple.detach(), uem.detach(), ual.detach(), torch.stack(errors).detach())
