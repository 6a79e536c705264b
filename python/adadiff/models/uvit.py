"""U-ViT (Bao et al., CVPR 2023; baofff/U-ViT libs/uvit.py and libs/uvit_t2i.py), with its state-dict keys.

B lanes, T tokens (extras first: text is [time, context, patches], classes are [label, time, patches]), D channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadiff_kernels import Norm, join_skip, upload


@dataclass(frozen=True)
class UViTConfig:
    """`depth` counts the in- and out-blocks, so the network has depth + 1 blocks."""

    image_size: int
    channels: int
    patch: int
    dim: int
    depth: int
    heads: int
    num_classes: int = 0  # rows of the label table, null class included; 0 = no labels
    context_tokens: int = 0  # 77 for text; 0 = none
    context_dim: int = 768
    conv: bool = True  # 3x3 convolution after unpatchify
    mlp_ratio: int = 4
    qkv_bias: bool = False
    mlp_time_embed: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "patch", "dim", "depth", "heads", "context_dim", "mlp_ratio"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("num_classes", "context_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even and a multiple of heads {self.heads}")
        if self.depth % 2:
            raise ValueError(f"depth must be even (half in-blocks, half out-blocks), got {self.depth}")
        if self.num_classes and self.context_tokens:
            raise ValueError("a U-ViT takes labels or text, not both")

    @property
    def extras(self) -> int:
        return 1 + self.context_tokens + bool(self.num_classes)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class UViTConditioning:
    time: Tensor  # [B, D]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t: float [B], fractions allowed. Returns float32 [B, dim], cosines first (libs/uvit.py, timestep_embedding)."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PatchEmbed(nn.Module):
    def __init__(self, config: UViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, T, D]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        n, T, D = h.shape
        q, k, v = self.qkv(h).view(n, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # [n, H, T, D/H]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, T, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h)))


class AffineBranch:
    """A pre-norm branch without gate. Not a module: the norm and the body keep their published names in the block."""

    def __init__(self, norm: nn.LayerNorm, body: nn.Module):
        self._norm, self._body = norm, body

    def norm(self, cond: UViTConditioning) -> Norm:
        return Norm(eps=self._norm.eps, weight=self._norm.weight, bias=self._norm.bias)

    def gate(self, cond: UViTConditioning) -> None:
        return None

    def __call__(self, h: Tensor) -> Tensor:
        return self._body(h)


class Block(nn.Module):
    def __init__(self, config: UViTConfig, skip_from: int | None = None):
        super().__init__()
        D = config.dim
        self.skip_from = skip_from
        self.skip_linear = nn.Linear(2 * D, D) if skip_from is not None else None
        self.norm1 = nn.LayerNorm(D)
        self.attn = Attention(D, config.heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = Mlp(D, config.mlp_ratio * D)
        self.branches = (AffineBranch(self.norm1, self.attn), AffineBranch(self.norm2, self.mlp))
        self._config = config

    def join(self, x: Tensor, skip: Tensor, lanes: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        joined = torch.cat([x, skip], dim=-1) if index is None else join_skip(x, skip, lanes, index)
        return self.skip_linear(joined)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.join(x, skip)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int) -> int:
        D, ratio = self._config.dim, self._config.mlp_ratio
        products = (4 + 2 * ratio + (2 if self.skip_linear is not None else 0)) * D * D * tokens
        return products + 2 * tokens * tokens * D


class Head(nn.Module):
    """LayerNorm, linear map to a patch's pixels, unpatchify, optional 3x3 convolution: [n, N, D] -> [n, C, H, W]."""

    def __init__(self, config: UViTConfig):
        super().__init__()
        self._config = config
        self.norm = nn.LayerNorm(config.dim)
        self.decoder_pred = nn.Linear(config.dim, config.patch**2 * config.channels)
        self.final_layer = nn.Conv2d(config.channels, config.channels, 3, padding=1) if config.conv else nn.Identity()

    def forward(self, patches: Tensor, cond: object = None, lanes: Tensor | None = None) -> Tensor:
        return self.final_layer(unpatchify(self.decoder_pred(self.norm(patches)), self._config))


def unpatchify(values: Tensor, config: UViTConfig) -> Tensor:
    """values: [n, N, p * p * C], channels last inside a patch (libs/uvit.py, unpatchify). Returns [n, C, H, W]."""
    n, side, p = len(values), config.image_size // config.patch, config.patch
    return values.view(n, side, side, p, p, config.channels).permute(0, 5, 1, 3, 2, 4).reshape(n, *_shape(config))


def patchify(images: Tensor, config: UViTConfig) -> Tensor:
    """images: [n, C, H, W]. Returns [n, N, p * p * C], the inverse of `unpatchify`."""
    n, side, p = len(images), config.image_size // config.patch, config.patch
    return images.view(n, config.channels, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(n, side * side, -1)


def _shape(config: UViTConfig) -> tuple[int, int, int]:
    return config.channels, config.image_size, config.image_size


class UViT(nn.Module):
    def __init__(self, config: UViTConfig):
        super().__init__()
        D, half = config.dim, config.depth // 2
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.time_embed = (
            nn.Sequential(nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D))
            if config.mlp_time_embed
            else nn.Identity()
        )
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes, D)
        if config.context_tokens:
            self.context_embed = nn.Linear(config.context_dim, D)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.extras + config.patches, D))
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(half))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, skip_from=half - 1 - i) for i in range(half))
        self.blocks = [*self.in_blocks, self.mid_block, *self.out_blocks]
        head = Head(config)
        self.norm, self.decoder_pred, self.final_layer = head.norm, head.decoder_pred, head.final_layer
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def time_dim(self) -> int:
        return self.config.dim

    @property
    def extras(self) -> int:
        return self.config.extras

    @property
    def tokens(self) -> int:
        return self.config.extras + self.config.patches

    @property
    def patch_outputs(self) -> int:
        return self.config.patch**2 * self.config.channels

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return _shape(self.config)

    def begin(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> tuple[Tensor, UViTConditioning]:
        self._check(x, t, context)
        context = None if context is None else upload(context, x.device)
        dtype = self.pos_embed.dtype
        time = self.time_embed(timestep_embedding(t, self.config.dim).to(dtype))  # [B, D]
        parts = [time[:, None]]
        if self.config.num_classes:
            parts.insert(0, self.label_emb(context)[:, None])
        if self.config.context_tokens:
            parts.append(self.context_embed(context.to(dtype)))
        parts.append(self.patch_embed(x.to(dtype)))
        return torch.cat(parts, dim=1) + self.pos_embed, UViTConditioning(time)

    def head(self, patches: Tensor, cond: object = None, lanes: Tensor | None = None) -> Tensor:
        return self.final_layer(unpatchify(self.decoder_pred(self.norm(patches)), self.config))

    def new_head(self) -> Head:
        head = Head(self.config)
        head.apply(_initialise)
        return head

    def unpatchify(self, values: Tensor) -> Tensor:
        return unpatchify(values, self.config)

    def patchify(self, images: Tensor) -> Tensor:
        return patchify(images, self.config)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """The plain network at full depth: x [B, C, H, W], t float [B], context -> predicted noise [B, C, H, W]."""
        x, _ = self.begin(x, t, context)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.head(x[:, self.extras :])

    def fixed_macs(self) -> tuple[int, int]:
        c = self.config
        stem = c.patches * c.patch**2 * c.channels * c.dim + c.context_tokens * c.context_dim * c.dim
        stem += 8 * c.dim * c.dim if c.mlp_time_embed else 0
        head = c.patches * c.dim * c.patch**2 * c.channels
        head += 9 * c.channels**2 * c.image_size**2 if c.conv else 0
        return stem, head

    def _check(self, x: Tensor, t: Tensor, context: Tensor | None) -> None:
        c = self.config
        if x.ndim != 4 or tuple(x.shape[1:]) != self.sample_shape:
            raise ValueError(f"x must be [B, {', '.join(map(str, self.sample_shape))}], got {tuple(x.shape)}")
        if t.shape != (len(x),):
            raise ValueError(f"t must hold one timestep per lane, [{len(x)}], got {tuple(t.shape)}")
        if c.num_classes:
            if context is None or context.shape != (len(x),) or context.dtype != torch.int64:
                raise ValueError(f"this network needs labels, int64 [{len(x)}]")
            if len(context) and context.is_cpu and not 0 <= int(context.min()) <= int(context.max()) < c.num_classes:
                raise ValueError(f"labels must be in 0..{c.num_classes - 1}, got {context.tolist()[:8]}")
        elif c.context_tokens:
            shape = (len(x), c.context_tokens, c.context_dim)
            if context is None or tuple(context.shape) != shape:
                raise ValueError(f"this network needs text context {shape}")
        elif context is not None:
            raise ValueError("this network takes no labels and no context")


def _initialise(module: nn.Module) -> None:
    """libs/uvit.py, _init_weights: linear maps truncated normal, everything else as PyTorch makes it."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
