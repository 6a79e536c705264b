"""Predictions and uncertainties of every layer of a network with exits, with gradients."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.interface import Backbone
from ..uem import Exits


class Layers(NamedTuple):
    """Outputs of all layers, one list entry per layer."""

    predictions: list[Tensor]  # [B, C, H, W], of the network's prediction type
    scores: list[Tensor]  # uncertainties [B, T - num_prefix_tokens, P]
    variances: list[Tensor]  # [B, C, H, W]; empty without a learned variance
    rows: list[Tensor]  # hidden states [B, T, D]


def all_layers(backbone: Backbone, exits: Exits, x: Tensor, t: Tensor, context: Tensor | None) -> Layers:
    """Runs all blocks with every layer's head and UEM, with gradients: for training and calibration.

    x: [B, C, H, W]; t: float [B]; context: see `Backbone.embed`. UEMs read detached hidden states, as in the authors'
    code, so that their loss does not change the network; under autocast the UEMs and their sigmoid stay in float32.
    Raises ValueError for exits that score every token: prefix tokens have no training target.
    """
    if exits.config.every_token:
        raise ValueError("exits that score every token (DuoDiff's) are for inference only; they cannot be trained")
    rows, cond = backbone.embed(x, t, context)
    lanes = torch.arange(len(x), dtype=torch.int32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        offsets = exits.offsets(cond.time.detach(), t)
    outputs: list[Tensor] = []
    predictions: list[Tensor] = []
    scores: list[Tensor] = []
    variances: list[Tensor] = []
    for layer, block in enumerate(backbone.blocks, start=1):
        rows = block(rows, cond, None if block.skip_from is None else outputs[block.skip_from])
        outputs.append(rows)
        patches = rows[:, backbone.num_prefix_tokens :]
        prediction = exits.head(backbone, layer)(patches, cond, lanes)
        if backbone.learned_variance:
            prediction, variance = prediction.chunk(2, dim=1)
            variances.append(variance)
        predictions.append(prediction)
        with torch.autocast(rows.device.type, enabled=False):
            s = F.linear(patches.detach().float(), exits.weight[layer - 1].float()) + offsets[layer - 1][:, None]
            scores.append(torch.sigmoid(s))
    return Layers(predictions, scores, variances, outputs)
