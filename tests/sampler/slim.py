"""Tiny slimmable models, and another way to a width: the whole network, its other heads and channels masked."""

import copy
import dataclasses
import math
from functools import cache

import torch
from torch import nn

from adadiff.config import ModelConfig
from adadiff.model import Model
from adadiff.models.layers import Attention, Mlp
from adadiff.uem import PAPER
from sampler.tiny import DIT, SERVED, UVIT, scramble

# Of 3 heads .25 has 1, .5 has 2 and .8 all, while the MLP is narrow: shares that are no whole numbers are rounded up.
WIDTHS = (0.25, 0.5, 0.8, 1.0)
UVIT_BIASED = dataclasses.replace(UVIT, qkv_bias=True)
NETWORKS = {"uvit": UVIT, "uvit_biased": UVIT_BIASED, "dit": DIT}
SLIM_SERVED = dataclasses.replace(
    SERVED, network=dataclasses.replace(SERVED.network, dim=24, heads=3), widths=WIDTHS
)  # 5 blocks, T = 2 + 4 tokens


def fresh(kind: str = "uvit", widths: tuple[float, ...] | None = WIDTHS, exits: bool = True) -> Model:
    """Every weight random."""
    own = PAPER if exits else None
    model = Model(ModelConfig(NETWORKS[kind], "linear", null_label=4, exits=own, widths=widths)).eval()
    scramble(model, 0.15)
    return model


@cache
def slim_served() -> Model:
    made = Model(SLIM_SERVED).requires_grad_(False).eval()
    scramble(made.backbone, 0.3, seed=1)
    scramble(made.exits, 0.3, seed=5)
    return made


def masked(model: Model, width: float) -> Model:
    """A copy whose other heads and channels say nothing: zeros go into the last product of each branch."""
    made = copy.deepcopy(model)
    for block in made.backbone.blocks:
        attention, mlp = block.attn, block.mlp
        assert isinstance(attention, Attention)
        assert isinstance(mlp, Mlp)
        size = attention.proj.in_features // attention.heads
        silence(attention.proj, size * math.ceil(width * attention.heads))
        silence(mlp.fc2, math.ceil(width * mlp.fc2.in_features))
    return made


def silence(linear: nn.Linear, kept: int) -> None:
    mask = (torch.arange(linear.in_features) < kept).to(linear.weight.dtype)
    linear.register_forward_pre_hook(lambda module, given: (given[0] * mask,))
