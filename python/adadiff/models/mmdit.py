"""MMDiT, the network of Stable Diffusion 3 (Esser et al., ICML 2024, arXiv 2403.03206), written from the paper and the
names and shapes in its released state dicts.

Text and patches are two streams with separate weights that attend to each other in every block. A lane's row holds
both, [N text tokens, then T patches], so that an exiting lane keeps its text. The sum of time and pooled text embedding
conditions both streams by shift, scale and gate. The last block does not change the text.
B lanes, n rows, D channels, L blocks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dit import SINUSOID, Head, TimestepEmbedder, initialise, modulated, position_embedding
from .interface import Family, Preset
from .layers import Mlp, PatchEmbed, attend, check_images, check_integers, check_text, timestep_embedding
from .patches import ModulatedNetwork, PatchConfig


@dataclass(frozen=True)
class MMDiTConfig(PatchConfig):
    """Configuration of an MMDiT. Its context is [B, 1 + N, E]: first the pooled text embedding, padded with zeros, then
    the text tokens. Raises ValueError for invalid values."""

    context_tokens: int = 334  # 1 + N
    context_dim: int = 4096  # E
    pooled_dim: int = 2048
    mlp_ratio: int = 4
    position_side: int = 192  # side of the position grid, of which the patches use the middle
    position_base: int = 64  # patches per row that the grid was made for

    num_classes: ClassVar[int] = 0
    learned_variance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "context_dim", "pooled_dim")
        check_integers(self, 2, "context_tokens")
        check_integers(self, 1, "mlp_ratio", "position_side", "position_base", most=1024)
        if self.side > self.position_side:
            raise ValueError(f"{self.side} patches in a row are more than the {self.position_side} positions")
        if self.pooled_dim > self.context_dim:
            raise ValueError(f"pooled_dim {self.pooled_dim} is more than the context's {self.context_dim} channels")

    @property
    def text(self) -> int:
        """N, the number of text tokens."""
        return self.context_tokens - 1

    @property
    def tokens(self) -> int:
        return self.text + self.patches

    @property
    def positions(self) -> int:
        """The patches only: text has no position embedding."""
        return self.patches


@dataclass(frozen=True)
class MMDiTConditioning:
    time: Tensor  # [B, D]
    sum: Tensor  # [B, D], time plus pooled text embedding
    modulation: Tensor  # [B, L, 2 streams (text, patches), 6 (shift, scale, gate of attention and of MLP), D]


class JointAttention(nn.Module):
    """The linear layers of one stream in the joint attention."""

    def __init__(self, dim: int, last: bool):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        if not last:
            self.proj = nn.Linear(dim, dim)


class Stream(nn.Module):
    """One stream of a block. last: the text of the last block, which only the other stream's attention reads."""

    def __init__(self, config: MMDiTConfig, last: bool = False):
        super().__init__()
        D = config.dim
        self.last = last
        self.attn = JointAttention(D, last)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, (2 if last else 6) * D))
        if not last:
            self.mlp = Mlp(D, config.mlp_ratio * D, approximate="tanh")

    def modulation(self, c: Tensor) -> Tensor:
        """c: [B, D]. Returns [B, 6, D]: shift, scale, gate of the attention, then of the MLP; zeros for parts that the
        stream does not have."""
        values = self.adaLN_modulation(c).view(len(c), -1, c.shape[1])
        return F.pad(values, (0, 0, 0, 6 - values.shape[1]))


class Block(nn.Module):
    skip_from = None

    def __init__(self, config: MMDiTConfig, index: int):
        super().__init__()
        self.context_block = Stream(config, last=index == config.depth - 1)
        self.x_block = Stream(config)
        self._index, self._config = index, config

    def forward(
        self,
        x: Tensor,
        cond: MMDiTConditioning,
        skip: None = None,
        index: None = None,
        row_to_lane: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        modulation = cond.modulation[:, self._index]  # [B, 2, 6, D]
        if row_to_lane is not None:
            modulation = modulation.index_select(0, row_to_lane)
        streams, N = (self.context_block, self.x_block), self._config.text
        by_stream = [[part[:, None] for part in values.unbind(1)] for values in modulation.unbind(1)]  # [n, 1, D] each
        rows = [x[:, :N], x[:, N:]]
        heads = self._config.heads
        qkv = [
            stream.attn.qkv(modulated(part, *values[:2])).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            for stream, part, values in zip(streams, rows, by_stream, strict=True)
        ]
        q, k, v = torch.cat(qkv, 3)  # [n, H, N + T, D/H] each
        read = attend(q, k, v).transpose(1, 2).flatten(2)
        made = []
        for stream, part, values, seen in zip(streams, rows, by_stream, (read[:, :N], read[:, N:]), strict=True):
            if not stream.last:
                part = torch.addcmul(part, values[2], stream.attn.proj(seen))
                part = torch.addcmul(part, values[5], stream.mlp(modulated(part, *values[3:5])))
            made.append(part)
        return torch.cat(made, 1, out=out)

    def macs(self, tokens: int) -> int:
        D, N = self._config.dim, self._config.text
        patches, last = tokens - N, self.context_block.last
        each = 4 * D * D + 2 * self._config.mlp_ratio * D * D
        return patches * each + N * (3 * D * D if last else each) + 2 * tokens * tokens * D


class VectorEmbedder(nn.Module):
    """Embeds pooled text."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))


class MMDiT(ModulatedNetwork):
    """MMDiT. State dicts have the released keys; the position embedding holds only the positions of the patches."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        D = config.dim
        self.num_prefix_tokens = config.text
        self.x_embedder = PatchEmbed(config.channels, D, config.patch)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = VectorEmbedder(config.pooled_dim, D)
        self.context_embedder = nn.Linear(config.context_dim, D)
        first = (config.position_side - config.side) // 2
        grid = position_embedding(D, config.side, config.position_side / config.position_base, first)
        self.pos_embed = nn.Parameter(grid[None].to(torch.get_default_dtype()), requires_grad=False)
        self.joint_blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.apply(initialise)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        for block in self.joint_blocks:
            for stream in (block.context_block, block.x_block):
                nn.init.zeros_(stream.adaLN_modulation[1].weight)
        self.final_layer = Head(config)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.joint_blocks

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> tuple[Tensor, MMDiTConditioning]:
        """As `Backbone.embed`. context: float [B, 1 + N, E], see `MMDiTConfig`."""
        check_images(x, t, self.sample_shape)
        check_text(context, len(x), self.config.context_tokens, self.config.context_dim)
        dtype = self.pos_embed.dtype
        context = context.to(x.device, dtype)
        time = self.t_embedder.mlp(timestep_embedding(t, SINUSOID).to(dtype))  # [B, D]
        c = time + self.y_embedder.mlp(context[:, 0, : self.config.pooled_dim])
        streams = [(block.context_block, block.x_block) for block in self.joint_blocks]
        modulation = [torch.stack([Stream.modulation(stream, c) for stream in pair], 1) for pair in streams]
        patches = self.x_embedder(x.to(dtype)) + self.pos_embed
        rows = torch.cat([self.context_embedder(context[:, 1:]), patches], 1)
        return rows, MMDiTConditioning(time, c, torch.stack(modulation, 1))

    def stem_and_head_macs(self) -> tuple[int, int]:
        D, config = self.config.dim, self.config
        modulation = (12 * config.depth - 4) * D * D
        stem = config.patches * self.patch_dim * D + (SINUSOID + D) * D + (config.pooled_dim + D) * D
        return stem + config.text * config.context_dim * D + modulation, config.patches * D * config.outputs + 2 * D * D


def _presets() -> dict[str, Preset]:
    """Stable Diffusion 3 medium, for 1024 pixels; the size here is that of the latents."""
    common = {"latent_scale": 1.5305, "latent_shift": 0.0609, "prediction_type": "flow"}
    return {"sd3_medium": Preset(MMDiTConfig(128, 16, 2, dim=1536, depth=24, heads=24), "flow", **common)}


FAMILY = Family(MMDiTConfig, MMDiT, _presets())
