"""A tiny adaLN network, as DiT is one: gates, modulated norms, no skips, no extra tokens. Only tests use it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadiff_kernels import Norm, upload

EPS = 1e-6


@dataclass(frozen=True)
class Modulation:
    time: Tensor  # [B, Dt]
    values: Tensor  # [B, L, 2 branches, (shift, scale, gate), D]
    final: Tensor  # [B, (shift, scale), D], of the head's norm


@dataclass(frozen=True)
class GatedBranch:
    body: nn.Module
    block: int
    branch: int
    bias = None  # the body adds its own

    def _of(self, cond: Modulation, which: int) -> Tensor:
        return cond.values[:, self.block, self.branch, which]

    def norm(self, cond: Modulation) -> Norm:
        return Norm(eps=EPS, shift=self._of(cond, 0), scale=self._of(cond, 1))

    def gate(self, cond: Modulation) -> Tensor:
        return self._of(cond, 2)

    unit = "mlp"  # no test asks for single units of it

    def __call__(self, h: Tensor, cond: object, row_to_lane: Tensor | None, add_bias: bool = True) -> Tensor:
        assert add_bias, "it has no bias to leave out"
        return self.body(h)

    def macs(self, tokens: int) -> int:
        D = AdaLN.dim
        return 6 * D**2 * tokens if isinstance(self.body, Mlp) else 3 * D**2 * tokens + 2 * tokens**2 * D


class Mix(nn.Module):
    """Attention with one head."""

    def __init__(self, dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, h: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(h).chunk(3, dim=-1))


class Mlp(nn.Sequential):
    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))


class Block(nn.Module):
    skip_from = None

    def __init__(self, dim: int, index: int):
        super().__init__()
        self.mix = Mix(dim)
        self.mlp = Mlp(dim)
        self.branches = (GatedBranch(self.mix, index, 0), GatedBranch(self.mlp, index, 1))
        self.dim = dim

    def forward(
        self,
        x: Tensor,
        cond: Modulation,
        skip: None = None,
        index: None = None,
        row_to_lane: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        values = cond.values[:, self.branches[0].block]
        values = values if row_to_lane is None else values[row_to_lane.long()]
        for body, own in zip((self.mix, self.mlp), values.unbind(1), strict=True):
            shift, scale, gate = own[:, :, None].unbind(1)
            x = x + gate * body(F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift)
        return x if out is None else out.copy_(x)

    def macs(self, tokens: int) -> int:
        return 9 * self.dim**2 * tokens + 2 * tokens**2 * self.dim


class Head(nn.Module):
    def __init__(self, dim: int, outputs: int, unpatchify: Callable[[Tensor], Tensor]):
        super().__init__()
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, outputs)
        self._unpatchify = unpatchify

    def forward(self, patches: Tensor, cond: Modulation, lanes: Tensor) -> Tensor:
        shift, scale = cond.final[lanes.long(), :, None].unbind(1)
        return self._unpatchify(self.linear(self.norm(patches) * (1 + scale) + shift))


class AdaLN(nn.Module):
    """D is no multiple of a vector, Dt is not D, and T is odd, so that no two sizes can be confused."""

    num_prefix_tokens, learned_variance = 0, False
    dim, time_dim, depth, classes = 20, 12, 5, 4
    patch, side, channels = 2, 3, 3
    tokens = side**2
    patch_dim = patch**2 * channels
    sample_shape = (channels, side * patch, side * patch)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(self.patch_dim, self.dim)
        self.position = nn.Parameter(torch.zeros(self.tokens, self.dim))
        self.time = nn.Linear(2, self.time_dim)
        self.label = nn.Embedding(self.classes, self.time_dim)
        self.modulate = nn.Linear(self.time_dim, self.depth * 6 * self.dim)
        self.blocks = nn.ModuleList(Block(self.dim, i) for i in range(self.depth))
        self.head = self.new_head()
        self.finish = nn.Linear(self.time_dim, 2 * self.dim)

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Modulation]:
        dtype = self.position.dtype
        angle = t.float()[:, None] / 1000
        label = self.label(upload(context, x.device))
        time = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], 1).to(dtype)) + label)
        rows = self.stem(self.patchify(x.to(dtype))) + self.position
        values = self.modulate(time).view(len(x), self.depth, 2, 3, self.dim)
        return rows, Modulation(time, values, self.finish(time).view(len(x), 2, self.dim))

    def new_head(self) -> Head:
        return Head(self.dim, self.patch_dim, self.unpatchify)

    def patchify(self, images: Tensor) -> Tensor:
        return F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def unpatchify(self, values: Tensor) -> Tensor:
        return F.fold(values.transpose(1, 2), self.sample_shape[1:], self.patch, stride=self.patch)

    def stem_and_head_macs(self) -> tuple[int, int]:
        ends = self.tokens * self.dim * self.patch_dim
        return ends + 2 * self.time_dim + self.time_dim * (self.depth * 6 + 2) * self.dim, ends

    def layers(self, x: Tensor, t: Tensor, context: Tensor | None) -> list[Tensor]:
        """Rows after every block, by the formulas of DiT and not through branches."""
        rows, cond = self.embed(x, t, context)
        outputs = []
        for block, values in zip(self.blocks, cond.values.unbind(1), strict=True):
            for body, (shift, scale, gate) in zip(
                (block.mix, block.mlp), (branch.unbind(1) for branch in values.unbind(1)), strict=True
            ):
                mean = rows.mean(-1, keepdim=True)
                variance = (rows - mean).square().mean(-1, keepdim=True)
                h = (rows - mean) / torch.sqrt(variance + EPS)
                rows = rows + gate[:, None] * body(h * (1 + scale[:, None]) + shift[:, None])
            outputs.append(rows)
        return outputs

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        _, cond = self.embed(x, t, context)
        return self.head(self.layers(x, t, context)[-1], cond, torch.arange(len(x)))
