"""Exits: the uncertainty estimation module (UEM) of every block, and the heads that turn a block's output into noise.

Two published readings of AdaDiff (Tang et al., ECCV 2024):
- paper, Eq. 8: u = sigmoid(w . [L, tau(t)] + b) per patch token, tau being the network's own time embedding. The time
  part is one number per lane, layer and output; `Exits.offsets` computes it for all layers at once.
- official code (libs/uvit.py, class LTE): a linear map to p*p*C *certainties*, blind to time, with one shared head.
  sigma(-s) = 1 - sigma(s), so negated weights give exactly the uncertainties (`Exits.load_official`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadiff_kernels import Score, layer_norm, residual_uem

from .models.interface import Backbone


@dataclass(frozen=True)
class ExitConfig:
    map: bool = False  # one uncertainty per patch (P = 1), or one per pixel and channel (P = p * p * C)
    time: bool = True  # the UEM also reads tau(t)
    shared_head: bool = False  # every layer uses the network's own head, or layers 1..L-1 have one each

    def __post_init__(self) -> None:
        for name in ("map", "time", "shared_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"exits.{name} must be true or false, got {getattr(self, name)!r}")


PAPER = ExitConfig()
OFFICIAL = ExitConfig(map=True, time=False, shared_head=True)


class Exits(nn.Module):
    """Parameters of the UEMs, stacked over L layers, and the heads of layers 1..L-1 (layer L uses the network's)."""

    def __init__(self, backbone: Backbone, config: ExitConfig):
        super().__init__()
        L, P = len(backbone.blocks), backbone.patch_outputs if config.map else 1
        self.config = config
        self.extras = backbone.extras
        self.weight = nn.Parameter(torch.zeros(L, P, backbone.dim))
        self.bias = nn.Parameter(torch.zeros(L, P))
        self.time_weight = nn.Parameter(torch.zeros(L, P, backbone.time_dim)) if config.time else None
        self.heads = None if config.shared_head else nn.ModuleList(backbone.new_head() for _ in range(L - 1))

    def offsets(self, time: Tensor) -> Tensor:
        """time: [B, Dt]. Returns what the score adds per lane, float32 [L, B, P]."""
        bias = self.bias.float()[:, None]  # [L, 1, P]
        if self.time_weight is None:
            return bias.expand(-1, len(time), -1)
        return torch.einsum("lpd,bd->lbp", self.time_weight.float(), time.float()) + bias

    def score(self, layer: int, offsets: Tensor) -> Score:
        """The UEM after block `layer` (1..L), for the fused pass."""
        return Score(self.weight[layer - 1], offsets[layer - 1], self.extras)

    def head(self, backbone: Backbone, layer: int) -> nn.Module:
        """What a sample leaving after block `layer` takes, called like the network's own `head`."""
        if self.heads is None or layer == len(self.weight):
            return backbone.head
        return self.heads[layer - 1]

    def heads_by_lane(self, patches: Tensor, cond: object, lanes: Tensor, layer: Tensor) -> Tensor:
        """Each lane through the head of its own layer, without the host knowing which: [B, C, H, W].

        patches: [B, T - extras, D] of the lanes i32 [B]; layer: i32 [B]; what lanes at layer L get is of no use.
        """
        index = (layer - 1).clamp(0, len(self.heads) - 1)
        heads = [dict(head.named_parameters()) for head in self.heads]
        own = {name: torch.stack([head[name] for head in heads]).index_select(0, index) for name in heads[0]}

        def head(parameters: dict[str, Tensor], rows: Tensor, lane: Tensor) -> Tensor:
            return torch.func.functional_call(self.heads[0], parameters, (rows[None], cond, lane[None]))[0]

        return torch.vmap(head)(own, patches, lanes)

    def macs(self, patches: int) -> int:
        """Multiply-adds of one layer's score for one lane."""
        return self.weight.shape[1] * self.weight.shape[2] * patches

    @torch.no_grad()
    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Takes the UEMs of an official checkpoint, keys `lte_classifer.{i}.lte.{weight,bias}` (their spelling).

        Raises ValueError where a key is missing or has another shape, with nothing changed.
        """
        if self.time_weight is not None or self.heads is not None or not self.config.map:
            raise ValueError("official UEMs need exits built with adadiff.exits.OFFICIAL")
        own = {
            f"lte_classifer.{i}.lte.{name}": value[i]
            for i in range(len(self.weight))
            for name, value in (("weight", self.weight), ("bias", self.bias))
        }
        for key, value in own.items():
            if key not in state:
                raise ValueError(f"official UEM {key} is missing")
            if state[key].shape != value.shape:
                raise ValueError(f"{key} is {tuple(state[key].shape)}, this network needs {tuple(value.shape)}")
        for key, value in own.items():
            value.copy_(-state[key])


def all_layers(
    backbone: Backbone, exits: Exits, x: Tensor, t: Tensor, context: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Every layer's prediction [B, C, H, W] and uncertainties [B, T - extras, P]; differentiable, for training.

    The UEMs read detached rows, as in the official code, so that their loss cannot bend the network.
    """
    rows, cond = backbone.begin(x, t, context)
    lanes = torch.arange(len(x), dtype=torch.int32, device=x.device)
    offsets = exits.offsets(cond.time.detach())
    outputs, predictions, scores = [], [], []
    for layer, block in enumerate(backbone.blocks, start=1):
        if block.skip_from is not None:
            rows = block.join(rows, outputs[block.skip_from])
        for branch in block.branches:
            h = layer_norm(rows, branch.norm(cond), lanes)
            rows, _, _ = residual_uem(rows, branch(h), lanes=lanes, gate=branch.gate(cond))
        outputs.append(rows)
        patches = rows[:, backbone.extras :]
        predictions.append(exits.head(backbone, layer)(patches, cond, lanes))
        s = F.linear(patches.detach().float(), exits.weight[layer - 1].float()) + offsets[layer - 1][:, None]
        scores.append(torch.sigmoid(s))
    return predictions, scores
