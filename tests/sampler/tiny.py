"""Tiny networks with exits, inputs for them, and what plain modules make of those, one sample at a time."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from adadiff.exits import ExitConfig, Exits
from adadiff.models.uvit import UViT, UViTConfig
from sampler.adaln import AdaLN

# T = 2 + 16 tokens, 7 blocks, heads of 16 channels: few powers of two
UVIT = UViTConfig(image_size=8, channels=3, patch=2, dim=48, depth=6, heads=3, num_classes=5)
BATCH = 13


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # [B, C, H, W]
    t: Tensor  # float [B], all different
    context: Tensor  # labels, int64 [B]

    def __getitem__(self, lanes: Tensor | slice) -> "Inputs":
        return Inputs(self.x[lanes], self.t[lanes], self.context[lanes])

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.t, self.context


@dataclass(frozen=True)
class Case:
    """A network, its exits, inputs for BATCH lanes, and the plain results for them."""

    backbone: nn.Module
    exits: Exits
    given: Inputs
    predictions: Tensor  # [L, B, C, H, W]: every layer's head on every sample
    uncertainties: Tensor  # [L, B], float32 at least

    @property
    def layers(self) -> int:
        return len(self.predictions)

    def leaving(self, exit_layer: Tensor) -> Tensor:
        """exit_layer: [B]. The prediction of each sample at its own layer."""
        return self.predictions[exit_layer.long() - 1, torch.arange(len(exit_layer))]


@cache
def case(kind: str, config: ExitConfig, dtype: torch.dtype, exact: bool = False) -> Case:
    """kind: "uvit" or "adaln". exact: the weights of `dtype`, computed with in float64."""
    backbone, exits = network(kind, config, dtype)
    if exact:
        backbone, exits = backbone.double(), exits.double()
    given = inputs(backbone)
    rows = plain_layers(backbone, given)
    return Case(
        backbone,
        exits,
        given,
        plain_predictions(backbone, exits, given, rows),
        plain_uncertainties(backbone, exits, given, rows),
    )


def network(kind: str, config: ExitConfig, dtype: torch.dtype) -> tuple[nn.Module, Exits]:
    backbone = UViT(UVIT) if kind == "uvit" else AdaLN()
    exits = Exits(backbone, config)
    scramble(backbone, 0.15, seed=1)
    scramble(exits, 0.15, seed=2)
    return backbone.to(dtype).requires_grad_(False).eval(), exits.to(dtype).requires_grad_(False)


def scramble(module: nn.Module, scale: float, seed: int = 0) -> None:
    """Every parameter random: a fresh network has zero biases and unit norms, which hide mistakes."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=draw) * scale
            parameter.copy_(noise + 1 if parameter.ndim == 1 and bool((parameter == 1).all()) else noise)


def inputs(backbone: nn.Module, n: int = BATCH, seed: int = 0) -> Inputs:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *backbone.sample_shape, generator=draw)
    t = torch.linspace(3.25, 996.5, n)[torch.randperm(n, generator=draw)]
    return Inputs(x, t, torch.randint(4, (n,), generator=draw))


def plain_layers(backbone: nn.Module, given: Inputs) -> Tensor:
    """[L, B, T, D]: rows after every block, one sample at a time, by the network's own plain modules."""
    samples = [torch.stack(_layers(backbone, *given[slice(b, b + 1)].all)) for b in range(len(given.x))]
    return torch.cat(samples, 1)


def _layers(backbone: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
    if isinstance(backbone, AdaLN):
        return backbone.layers(x, t, context)
    rows, _ = backbone.begin(x, t, context)
    outputs = []
    for block in backbone.in_blocks:
        outputs.append(rows := block(rows))
    skips = outputs.copy()
    outputs.append(rows := backbone.mid_block(rows))
    for block in backbone.out_blocks:
        outputs.append(rows := block(rows, skips.pop()))
    return outputs


def plain_predictions(backbone: nn.Module, exits: Exits, given: Inputs, rows: Tensor) -> Tensor:
    _, cond = backbone.begin(*given.all)
    lanes = torch.arange(len(given.x))
    heads = [backbone.head] * len(rows) if exits.heads is None else [*exits.heads, backbone.head]
    return torch.stack(
        [
            torch.cat([head(layer[b : b + 1, backbone.extras :], cond, lanes[b : b + 1]) for b in lanes])
            for head, layer in zip(heads, rows, strict=True)
        ]
    )


def plain_uncertainties(backbone: nn.Module, exits: Exits, given: Inputs, rows: Tensor) -> Tensor:
    """AdaDiff's Eq. 8 as it is printed, each token and the time embedding concatenated."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    _, cond = backbone.begin(*given.all)
    time = cond.time.to(rows.dtype)[:, None].expand(-1, backbone.tokens, -1)
    uncertainties = []
    for layer, tokens in enumerate(rows):
        weight = exits.weight[layer]
        if exits.time_weight is not None:
            weight, tokens = torch.cat([weight, exits.time_weight[layer]], 1), torch.cat([tokens, time], 2)
        s = tokens[:, backbone.extras :] @ weight.to(rows.dtype).T + exits.bias[layer].to(rows.dtype)
        uncertainties.append((1 / (1 + torch.exp(-s))).flatten(1).mean(1))
    return torch.stack(uncertainties)
