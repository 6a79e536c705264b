"""U-ViT (Bao et al., CVPR 2023; baofff/U-ViT libs/uvit.py and libs/uvit_t2i.py), with the released state-dict keys.

B lanes, T tokens (prefix tokens first: [time, text, patches] or [label, time, patches]), D channels.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from adadiff_kernels import Norm, join_skip, upload

from .interface import Family, Preset
from .layers import (
    Attention,
    Mlp,
    PatchEmbed,
    check_booleans,
    check_images,
    check_integers,
    check_labels,
    check_text,
    check_width,
    share_of,
    timestep_embedding,
    unpatchify,
)
from .patches import PatchConfig, PatchNetwork


@dataclass(frozen=True)
class UViTConfig(PatchConfig):
    """Configuration of a U-ViT. `depth` counts the in- and out-blocks, so the network has depth + 1 blocks. Raises
    ValueError for invalid values."""

    num_classes: int = 0  # rows of the label table, null class included; 0 = no labels
    context_tokens: int = 0  # 77 for text; 0 = none
    context_dim: int = 768
    conv: bool = True  # 3x3 convolution after unpatchify
    mlp_ratio: int = 4
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    time_divisor: int = 1  # the time embedding is of t / time_divisor; DuoDiff's pixel models use 1000
    width: float = 1.0  # the share of `heads` and MLP channels in use, see forward/narrow.py

    DIM_STEP: ClassVar[int] = 2  # the time embedding is sines and cosines

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "context_dim", "time_divisor")
        check_integers(self, 1, "mlp_ratio", most=1024)
        check_integers(self, 0, "context_tokens")
        check_integers(self, 0, "num_classes", most=2**24)
        check_booleans(self, "conv", "qkv_bias", "mlp_time_embed")
        check_width(self)
        if self.depth % 2:
            raise ValueError(f"depth must be even (half in-blocks, half out-blocks), got {self.depth}")
        if self.num_classes and self.context_tokens:
            raise ValueError("a U-ViT takes labels or text, not both")

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.context_tokens + bool(self.num_classes)

    @property
    def tokens(self) -> int:
        return self.num_prefix_tokens + self.patches

    @property
    def blocks(self) -> int:
        return self.depth + 1


@dataclass(frozen=True)
class UViTConditioning:
    time: Tensor  # [B, D]


class AffineBranch:
    """A pre-norm branch without gate. Not a module, so that norm and body keep their published names in the block."""

    def __init__(self, norm: nn.LayerNorm, body: Attention | Mlp, unit: str):
        self._norm, self._body, self.unit = norm, body, unit

    @property
    def bias(self) -> Tensor:
        return self._body.bias

    def norm(self, cond: UViTConditioning) -> Norm:
        return Norm(eps=self._norm.eps, weight=self._norm.weight, bias=self._norm.bias)

    def gate(self, cond: UViTConditioning) -> None:
        return None

    def __call__(self, h: Tensor, cond: object, row_to_lane: Tensor | None, add_bias: bool = True) -> Tensor:
        return self._body(h, add_bias)

    def macs(self, tokens: int) -> int:
        return self._body.macs(tokens)


class Block(nn.Module):
    def __init__(self, config: UViTConfig, skip_from: int | None = None):
        super().__init__()
        D = config.dim
        self.skip_from = skip_from
        self.skip_linear = nn.Linear(2 * D, D) if skip_from is not None else None
        self.norm1 = nn.LayerNorm(D)
        self.attn = Attention(D, config.heads, config.qkv_bias, config.width)
        self.norm2 = nn.LayerNorm(D)
        self.mlp = Mlp(D, share_of(config.mlp_ratio * D, config.width))
        attention, mlp = AffineBranch(self.norm1, self.attn, "attention"), AffineBranch(self.norm2, self.mlp, "mlp")
        self.branches = (attention, mlp)
        self._config = config

    def join(self, x: Tensor, skip: Tensor, row_to_lane: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        joined = torch.cat([x, skip], dim=-1) if index is None else join_skip(x, skip, row_to_lane, index)
        return self.skip_linear(joined)

    def forward(
        self,
        x: Tensor,
        cond: object = None,
        skip: Tensor | None = None,
        index: Tensor | None = None,
        row_to_lane: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if self.skip_linear is not None:
            x = self.join(x, skip, None, index).to(x.dtype)  # autocast may change the dtype
        x = x + self.attn(self.norm1(x))
        return torch.add(x, self.mlp(self.norm2(x)), out=out)

    def macs(self, tokens: int) -> int:
        D = self._config.dim
        joined = 0 if self.skip_linear is None else 2 * D * D * tokens
        return joined + self.attn.macs(tokens) + self.mlp.macs(tokens)


class Head(nn.Module):
    """LayerNorm, linear map to a patch's values, unpatchify, optional 3x3 convolution: [n, N, D] -> [n, C, H, W]."""

    def __init__(self, config: UViTConfig):
        super().__init__()
        self._config = config
        self.norm = nn.LayerNorm(config.dim)
        self.decoder_pred = nn.Linear(config.dim, config.outputs)
        self.final_layer = nn.Conv2d(config.channels, config.channels, 3, padding=1) if config.conv else nn.Identity()

    def forward(self, patches: Tensor, cond: object = None, lanes: Tensor | None = None) -> Tensor:
        return self.final_layer(unpatchify(self.decoder_pred(self.norm(patches)), self._config.patch))


class UViT(PatchNetwork):
    def __init__(self, config: UViTConfig):
        super().__init__(config)
        D, half = config.dim, config.depth // 2
        self.num_prefix_tokens = config.num_prefix_tokens
        self.patch_embed = PatchEmbed(config.channels, D, config.patch)
        self.time_embed = (
            nn.Sequential(nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D))
            if config.mlp_time_embed
            else nn.Identity()
        )
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes, D)
        if config.context_tokens:
            self.context_embed = nn.Linear(config.context_dim, D)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, D))
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(half))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, skip_from=half - 1 - i) for i in range(half))
        self.blocks = [*self.in_blocks, self.mid_block, *self.out_blocks]
        head = Head(config)
        self.norm, self.decoder_pred, self.final_layer = head.norm, head.decoder_pred, head.final_layer
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> tuple[Tensor, UViTConditioning]:
        self._check(x, t, context)
        context = None if context is None else upload(context, x.device)
        dtype = self.pos_embed.dtype
        time = timestep_embedding(t.float() / self.config.time_divisor, self.config.dim)
        time = self.time_embed(time.to(dtype))  # [B, D]
        parts = [time[:, None]]
        if self.config.num_classes:
            parts.insert(0, self.label_emb(context)[:, None])
        if self.config.context_tokens:
            parts.append(self.context_embed(context.to(dtype)))
        parts.append(self.patch_embed(x.to(dtype)))
        return torch.cat(parts, dim=1) + self.pos_embed, UViTConditioning(time)

    def head(self, patches: Tensor, cond: object = None, lanes: Tensor | None = None) -> Tensor:
        return self.final_layer(self.unpatchify(self.decoder_pred(self.norm(patches))))

    def new_head(self) -> Head:
        head = Head(self.config)
        head.apply(_initialise)
        return head

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """The plain network at full depth: x [B, C, H, W], t float [B], context as `embed` takes it -> prediction
        [B, C, H, W]."""
        x, _ = self.embed(x, t, context)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skip=skips.pop())
        return self.head(x[:, self.num_prefix_tokens :])

    def stem_and_head_macs(self) -> tuple[int, int]:
        c = self.config
        stem = c.patches * c.patch_dim * c.dim + c.context_tokens * c.context_dim * c.dim
        stem += 8 * c.dim * c.dim if c.mlp_time_embed else 0
        head = c.patches * c.dim * c.outputs
        head += 9 * c.channels**2 * c.image_size**2 if c.conv else 0
        return stem, head

    def _check(self, x: Tensor, t: Tensor, context: Tensor | None) -> None:
        c = self.config
        check_images(x, t, self.sample_shape)
        if c.num_classes:
            check_labels(context, len(x), c.num_classes)
        elif c.context_tokens:
            check_text(context, len(x), c.context_tokens, c.context_dim)
        elif context is not None:
            raise ValueError("this network takes no labels and no context")


def _initialise(module: nn.Module) -> None:
    """libs/uvit.py, _init_weights: truncated normal for linear layers, PyTorch's defaults for all others."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def start_as_linear(network: UViT) -> None:
    """Initialises a network as a linear map from patches to predictions: branches add nothing, and a block that joins a
    long skip passes its input on.

    `_initialise` is meant for D of 512 and more. At D = 64 its skip layers shrink the hidden states at every block, and
    a deep network learns no faster than one of three blocks.
    """
    for block in network.blocks:
        inner = (block.attn.qkv, block.mlp.fc1)
        for linear in inner:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(linear.weight)
        if block.skip_linear is not None:
            block.skip_linear.weight[:, : network.dim].diagonal().add_(1)
    nn.init.normal_(network.pos_embed, std=0.2)


def _pixels(size: int, patch: int, dim: int, depth: int, heads: int, classes: int = 0) -> Preset:
    return Preset(UViTConfig(size, 3, patch, dim, depth, heads, num_classes=classes), "vp")


def _latents(size: int, patch: int, dim: int, depth: int, heads: int, schedule: str, conv: bool) -> Preset:
    network = UViTConfig(size, 4, patch, dim, depth, heads, num_classes=1001, conv=conv)
    return Preset(network, schedule, null_label=1000, latent_scale=0.18215)


def _text(depth: int) -> Preset:
    network = UViTConfig(32, 4, 2, 512, depth, 8, context_tokens=77)
    return Preset(network, "stable_diffusion", latent_scale=0.23010)  # U-ViT, issue 17


def _duodiff(like: Preset, depth: int | None = None, divisor: int = 1) -> Preset:
    """A network trained by DuoDiff: as `like`, possibly of another depth, with schedule "linear", whose time input
    0..999 is divided by `divisor`. None of them was trained with a null class."""
    changed = {} if depth is None else {"depth": depth}
    return Preset(replace(like.network, **changed, time_divisor=divisor), "linear", latent_scale=like.latent_scale)


# baofff/U-ViT configs/*.py; for latent models the sizes are those of the latents
PRESETS: dict[str, Preset] = {
    "cifar10_uvit_small":      _pixels(32, 2, 512, 12, 8),
    "celeba64_uvit_small":     _pixels(64, 4, 512, 12, 8),
    "imagenet64_uvit_mid":     _pixels(64, 4, 768, 16, 12, classes=1000),
    "imagenet64_uvit_large":   _pixels(64, 4, 1024, 20, 16, classes=1000),
    "imagenet256_uvit_large":  _latents(32, 2, 1024, 20, 16, "vp", conv=True),
    "imagenet256_uvit_huge":   _latents(32, 2, 1152, 28, 16, "stable_diffusion", conv=False),
    "imagenet512_uvit_large":  _latents(64, 4, 1024, 20, 16, "vp", conv=True),
    "imagenet512_uvit_huge":   _latents(64, 4, 1152, 28, 16, "stable_diffusion", conv=False),
    "mscoco_uvit_small":       _text(12),
    "mscoco_uvit_small_deep":  _text(16),
}  # fmt: skip

# razvanmatisan/duodiff configs/*.yaml, whose depth includes the middle block; _N: shallow networks of N blocks
PRESETS |= {
    "duodiff_cifar10":         _duodiff(PRESETS["cifar10_uvit_small"], divisor=1000),
    "duodiff_cifar10_3":       _duodiff(PRESETS["cifar10_uvit_small"], 2, divisor=1000),
    "duodiff_celeba64":        _duodiff(PRESETS["celeba64_uvit_small"], divisor=1000),
    "duodiff_celeba64_3":      _duodiff(PRESETS["celeba64_uvit_small"], 2, divisor=1000),
    "duodiff_celeba64_5":      _duodiff(PRESETS["celeba64_uvit_small"], 4, divisor=1000),
    "duodiff_celeba64_7":      _duodiff(PRESETS["celeba64_uvit_small"], 6, divisor=1000),
    "duodiff_imagenet64":      _duodiff(PRESETS["imagenet64_uvit_mid"]),
    "duodiff_imagenet64_3":    _duodiff(PRESETS["imagenet64_uvit_mid"], 2),
    "duodiff_imagenet256":     _duodiff(PRESETS["imagenet256_uvit_large"]),
    "duodiff_imagenet256_3":   _duodiff(PRESETS["imagenet256_uvit_large"], 2),
}  # fmt: skip

FAMILY = Family(UViTConfig, UViT, PRESETS)
