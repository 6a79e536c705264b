"""Deeper heads for exits: an MLP or a transformer block before a head of the network's kind."""

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from .models.interface import Backbone
from .models.layers import Attention, Mlp


class MlpHead(nn.Module):
    """A head after a residual MLP: out(x + fc2(gelu(fc1(norm(x))))), hidden width D; called like the network's head.

    fc2 starts at zero, so that initially it equals the head without the MLP.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        D = backbone.dim
        self.norm = nn.LayerNorm(D)
        self.fc1, self.fc2 = nn.Linear(D, D), nn.Linear(D, D)
        self.out = backbone.new_head()
        _start_at_zero(self.fc2)

    def forward(self, patches: Tensor, cond: object = None, lanes: Tensor | None = None) -> Tensor:
        return self.out(patches + self.fc2(F.gelu(self.fc1(self.norm(patches)))), cond, lanes)

    @staticmethod
    def macs(dim: int, patches: int) -> int:
        return 2 * dim**2 * patches


class BlockHead(nn.Module):
    """A head after its own transformer block: y = x + attn(norm1(x)), out(y + mlp(norm2(y))), over the patches; hidden
    width 4 D, attention heads of 64 channels, but at least four heads (where D allows). EE-Tuning's "layer" exit.

    Both branches start at zero, so that initially it equals the head without the block.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        D = backbone.dim
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = Attention(D, math.gcd(D, max(4, D // 64)), qkv_bias=False)
        self.mlp = Mlp(D, 4 * D)
        self.out = backbone.new_head()
        _start_at_zero(self.attn.proj)
        _start_at_zero(self.mlp.fc2)

    def forward(self, patches: Tensor, cond: object = None, lanes: Tensor | None = None) -> Tensor:
        y = patches + self.attn(self.norm1(patches))
        return self.out(y + self.mlp(self.norm2(y)), cond, lanes)

    @staticmethod
    def macs(dim: int, patches: int) -> int:
        return 12 * dim**2 * patches + 2 * patches**2 * dim


HEADS: Mapping[str, type[MlpHead | BlockHead]] = {"mlp": MlpHead, "block": BlockHead}


def _start_at_zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
