"""PixArt-alpha and PixArt-Sigma (Chen et al., ICLR 2024, arXiv 2310.00426; ECCV 2024, arXiv 2403.04692), written from
the papers and the names and shapes in their released state dicts.

A text-conditional DiT: between attention and MLP every block attends to the tokens of a text encoder, without norm or
gate. One matrix product of the time embedding gives shift, scale and gate for all blocks; each block adds its own table
(adaLN-single).
B lanes, T patches, N text tokens of E channels, D channels, L blocks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dit import EPS, SINUSOID, GatedBranch, TimestepEmbedder, initialise, modulated, position_embedding
from .interface import Family, Preset
from .layers import (
    Attention,
    Mlp,
    PatchEmbed,
    check_booleans,
    check_images,
    check_integers,
    check_text,
    product,
    timestep_embedding,
    unpatchify,
)
from .patches import ModulatedNetwork, PatchConfig

MASKED = -10000.0  # added to attention scores of padding tokens, as in the authors' code and diffusers


@dataclass(frozen=True)
class PixArtConfig(PatchConfig):
    context_tokens: int = 120  # text tokens; 300 in PixArt-Sigma
    context_dim: int = 4096  # channels of the T5 encoder
    mlp_ratio: int = 4
    learned_variance: bool = True
    interpolation: float = 1.0  # positions are divided by it

    num_classes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "context_tokens", "context_dim")
        check_integers(self, 1, "mlp_ratio", most=1024)
        check_booleans(self, "learned_variance")
        if type(self.interpolation) not in (int, float) or not 0 < self.interpolation <= 64:
            raise ValueError(f"interpolation must be a number in (0, 64], got {self.interpolation!r}")

    @property
    def outputs(self) -> int:
        return self.patch_dim * (2 if self.learned_variance else 1)


@dataclass(frozen=True)
class PixArtConditioning:
    time: Tensor  # [B, D]
    modulation: Tensor  # [B, L, 2 branches, (shift, scale, gate), D]
    text: Tensor  # [B, N, D]
    mask: Tensor  # [B, N], added to attention scores: 0 or MASKED


class CrossAttention(nn.Module):
    """Patches attend to the text of their lane."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    @property
    def bias(self) -> Tensor:
        return self.proj.bias

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, add_bias: bool = True) -> Tensor:
        """x: [n, T, D]; text: [n, N, D]; mask: [n, N]. Returns [n, T, D], without `bias` unless add_bias."""
        n, T, D = x.shape
        split = self.heads, D // self.heads
        q = self.q_linear(x).view(n, T, *split).transpose(1, 2)  # [n, H, T, D/H]
        k, v = self.kv_linear(text).view(n, -1, 2, *split).permute(2, 0, 3, 1, 4)
        values = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].to(q.dtype))
        return product(self.proj, values.transpose(1, 2).reshape(n, T, D), add_bias)

    def macs(self, tokens: int, context: int) -> int:
        D = self.dim
        return 2 * D * D * tokens + 2 * D * D * context + 2 * tokens * context * D


@dataclass(frozen=True)
class CrossBranch:
    """The cross-attention branch, without norm or gate."""

    body: CrossAttention
    context_tokens: int
    unit: ClassVar[str] = "cross"

    @property
    def bias(self) -> Tensor:
        return self.body.bias

    def norm(self, cond: PixArtConditioning) -> None:
        return None

    def gate(self, cond: PixArtConditioning) -> None:
        return None

    def __call__(
        self, h: Tensor, cond: PixArtConditioning, row_to_lane: Tensor | None, add_bias: bool = True
    ) -> Tensor:
        text, mask = cond.text, cond.mask
        if row_to_lane is not None:
            text, mask = text.index_select(0, row_to_lane), mask.index_select(0, row_to_lane)
        return self.body(h, text, mask, add_bias)

    def macs(self, tokens: int) -> int:
        return self.body.macs(tokens, self.context_tokens)


class Block(nn.Module):
    skip_from = None

    def __init__(self, config: PixArtConfig, index: int):
        super().__init__()
        D = config.dim
        self.attn = Attention(D, config.heads, True)
        self.cross_attn = CrossAttention(D, config.heads)
        self.mlp = Mlp(D, config.mlp_ratio * D, approximate="tanh")
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.branches = (
            GatedBranch(self.attn, index, 0, EPS),
            CrossBranch(self.cross_attn, config.context_tokens),
            GatedBranch(self.mlp, index, 1, EPS),
        )
        self._index = index

    def forward(
        self,
        x: Tensor,
        cond: PixArtConditioning,
        skip: None = None,
        index: None = None,
        row_to_lane: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        modulation = cond.modulation[:, self._index]  # [B, 2, 3, D]
        if row_to_lane is not None:
            modulation = modulation.index_select(0, row_to_lane)
        first, last = ([part[:, None] for part in each.unbind(1)] for each in modulation.unbind(1))  # [n, 1, D] each
        x = torch.addcmul(x, first[2], self.attn(modulated(x, *first[:2])))
        x = x + self.branches[1](x, cond, row_to_lane)
        return torch.addcmul(x, last[2], self.mlp(modulated(x, *last[:2])), out=out)

    def macs(self, tokens: int) -> int:
        return sum(branch.macs(tokens) for branch in self.branches)


class Head(nn.Module):
    """Modulated LayerNorm and a linear map to the values of a patch: [n, T, D] -> [n, C or 2 C, H, W]."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.linear = nn.Linear(config.dim, config.outputs)
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.dim) / config.dim**0.5)
        self._patch = config.patch
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, patches: Tensor, cond: PixArtConditioning, lanes: Tensor) -> Tensor:
        time = cond.time.index_select(0, lanes)
        shift, scale = (self.scale_shift_table + time[:, None])[:, :, None].unbind(1)
        return unpatchify(self.linear(modulated(patches, shift, scale)), self._patch)


class Projection(nn.Module):
    def __init__(self, width: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(width, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, values: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(values), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Projects the text encoder's tokens, [B, N, E] -> [B, N, D]."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.y_proj = Projection(config.context_dim, config.dim)

    def forward(self, context: Tensor) -> Tensor:
        return self.y_proj(context)


class PixArt(ModulatedNetwork):
    """PixArt. State dicts have the released keys, without the unconditional caption (`y_embedder.y_embedding`)."""

    def __init__(self, config: PixArtConfig):
        super().__init__(config)
        D = config.dim
        self.learned_variance = config.learned_variance
        self.x_embedder = PatchEmbed(config.channels, D, config.patch)
        self.t_embedder = TimestepEmbedder(D)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.y_embedder = CaptionEmbedder(config)
        position = position_embedding(D, config.side, config.interpolation)[None].to(torch.get_default_dtype())
        self.pos_embed = nn.Parameter(position, requires_grad=False)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.final_layer = Head(config)
        self.apply(initialise)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1]):
            nn.init.normal_(linear.weight, std=0.02)
        for block in self.blocks:  # cross-attention and head start at zero
            nn.init.zeros_(block.cross_attn.proj.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> tuple[Tensor, PixArtConditioning]:
        """As `Backbone.embed`. context: float [B, N, E]; all-zero tokens are padding and masked out."""
        check_images(x, t, self.sample_shape)
        check_text(context, len(x), self.config.context_tokens, self.config.context_dim)
        dtype = self.pos_embed.dtype
        context = context.to(x.device)
        mask = MASKED * (context == 0).all(2).to(dtype)
        time = self.t_embedder.mlp(timestep_embedding(t, SINUSOID).to(dtype))  # [B, D]
        tables = torch.stack([block.scale_shift_table for block in self.blocks])  # [L, 6, D]
        modulation = tables + self.t_block(time).view(len(x), 1, 6, -1)
        rows = (self.x_embedder(x.to(dtype)) + self.pos_embed).contiguous()  # a convolution's output is channels-first
        shape = len(x), len(self.blocks), 2, 3, self.config.dim
        return rows, PixArtConditioning(time, modulation.view(shape), self.y_embedder(context.to(dtype)), mask)

    def stem_and_head_macs(self) -> tuple[int, int]:
        D, T, config = self.config.dim, self.tokens, self.config
        text = config.context_tokens * (config.context_dim + D) * D
        return T * self.patch_dim * D + (SINUSOID + 7 * D) * D + text, T * D * config.outputs


def _presets() -> dict[str, Preset]:
    """The released networks for 256 and 512 pixels without size conditioning; sizes here are those of the latents."""
    xl = {"dim": 1152, "depth": 28, "heads": 16}
    made = {
        "pixart_xl_2_256": (PixArtConfig(32, 4, 2, **xl), 0.18215),
        "pixart_xl_2_512": (PixArtConfig(64, 4, 2, **xl), 0.18215),
        "pixart_sigma_xl_2_256": (PixArtConfig(32, 4, 2, **xl, context_tokens=300, interpolation=0.5), 0.13025),
        "pixart_sigma_xl_2_512": (PixArtConfig(64, 4, 2, **xl, context_tokens=300), 0.13025),
    }
    return {name: Preset(config, "linear", latent_scale=scale) for name, (config, scale) in made.items()}


FAMILY = Family(PixArtConfig, PixArt, _presets())
