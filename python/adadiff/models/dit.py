"""DiT (Peebles and Xie, ICCV 2023), written from the paper and the names and shapes in its released state dicts.

The sum c of time and label embedding conditions every branch by shift, scale and gate (adaLN-Zero), and the head by
shift and scale. One matrix product computes them for all blocks, once in a forward pass.
B lanes, T tokens (patches only), D channels, L blocks.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadiff_kernels import Norm, upload

from .interface import Family, Preset
from .layers import (
    Attention,
    Mlp,
    PatchEmbed,
    check_booleans,
    check_images,
    check_integers,
    check_labels,
    check_width,
    share_of,
    timestep_embedding,
    unpatchify,
)
from .patches import ModulatedNetwork, PatchConfig

SINUSOID = 256  # channels of the sinusoid before its MLP
EPS = 1e-6  # of the norms in the released code


@dataclass(frozen=True)
class DiTConfig(PatchConfig):
    """Configuration of a DiT. diffusers uses a frequency_shift of 1 and an mlp_norm_eps of 1e-5 (embeddings.py,
    attention.py). Raises ValueError for invalid values."""

    num_classes: int  # rows of the label table, null class included
    mlp_ratio: int = 4
    learned_variance: bool = True
    frequency_shift: int = 0  # frequencies of the sinusoid: 10000^(-i / (128 - shift))
    mlp_norm_eps: float = EPS  # of the norm before the MLP
    sit_time: bool = False  # the sinusoid reads 1 - t / 1000, the share of data in x, as SiT counts time
    width: float = 1.0  # the share of `heads` and MLP channels in use, see forward/narrow.py

    context_tokens: ClassVar[int] = 0
    context_dim: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "mlp_ratio", most=1024)
        check_integers(self, 1, "num_classes", most=2**24)
        check_booleans(self, "learned_variance", "sit_time")
        check_width(self)
        if type(self.frequency_shift) is not int or self.frequency_shift not in (0, 1):
            raise ValueError(f"frequency_shift must be 0 (as released) or 1 (diffusers), got {self.frequency_shift!r}")
        if not isinstance(self.mlp_norm_eps, float) or not 0 < self.mlp_norm_eps < 1:
            raise ValueError(f"mlp_norm_eps must be a number in (0, 1), got {self.mlp_norm_eps!r}")

    @property
    def outputs(self) -> int:
        return self.patch_dim * (2 if self.learned_variance else 1)


def position_embedding(dim: int, side: int, divisor: float = 1.0, first: int = 0) -> Tensor:
    """Fixed position embedding, float32 [side * side, dim]: half the channels encode a patch's column, half its row,
    counted from `first` and divided by `divisor`, as sines, then cosines, of frequencies 10000^(-4 i / dim). Computed
    in float64."""
    frequencies = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(first, first + side, dtype=torch.float64)[:, None] / divisor * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, dim / 2]
    column, row = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([column, row], dim=1).float()


@dataclass(frozen=True)
class DiTConditioning:
    time: Tensor  # [B, D]
    sum: Tensor  # [B, D], time plus label embedding
    modulation: Tensor  # [B, L, 2 branches, (shift, scale, gate), D]


@dataclass(frozen=True)
class GatedBranch:
    body: Attention | Mlp
    block: int
    branch: int
    eps: float

    @property
    def bias(self) -> Tensor:
        return self.body.bias

    @property
    def unit(self) -> str:
        return ("attention", "mlp")[self.branch]

    def norm(self, cond: DiTConditioning) -> Norm:
        shift, scale, _ = cond.modulation[:, self.block, self.branch].unbind(1)
        return Norm(eps=self.eps, shift=shift, scale=scale)

    def gate(self, cond: DiTConditioning) -> Tensor:
        return cond.modulation[:, self.block, self.branch, 2]

    def __call__(self, h: Tensor, cond: object, row_to_lane: Tensor | None, add_bias: bool = True) -> Tensor:
        return self.body(h, add_bias)

    def macs(self, tokens: int) -> int:
        return self.body.macs(tokens)


class Block(nn.Module):
    skip_from = None

    def __init__(self, config: DiTConfig, index: int):
        super().__init__()
        self.attn = Attention(config.dim, config.heads, True, config.width)
        self.mlp = Mlp(config.dim, share_of(config.mlp_ratio * config.dim, config.width), approximate="tanh")
        self.branches = (GatedBranch(self.attn, index, 0, EPS), GatedBranch(self.mlp, index, 1, config.mlp_norm_eps))
        self._index = index

    def forward(
        self,
        x: Tensor,
        cond: DiTConditioning,
        skip: None = None,
        index: None = None,
        row_to_lane: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        modulation = cond.modulation[:, self._index]  # [B, 2, 3, D]
        if row_to_lane is not None:
            modulation = modulation.index_select(0, row_to_lane)
        for branch, values in zip(self.branches, modulation.unbind(1), strict=True):
            shift, scale, gate = values[:, :, None].unbind(1)  # [n, 1, D] each
            target = out if branch is self.branches[-1] else None
            x = torch.addcmul(x, gate, branch.body(modulated(x, shift, scale, branch.eps)), out=target)
        return x

    def macs(self, tokens: int) -> int:
        return self.attn.macs(tokens) + self.mlp.macs(tokens)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    """DiT's norm: LayerNorm without weights, times 1 + scale, plus shift. All [n, T, D] or broadcastable to it."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class Modulation(nn.Module):
    """c [B, D] -> [B, L, 2, 3, D]: shifts, scales and gates of all blocks by one product. `DiT` maps its state-dict
    keys."""

    def __init__(self, blocks: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(blocks, 6 * dim, dim))
        self.bias = nn.Parameter(torch.zeros(blocks, 6 * dim))

    def forward(self, c: Tensor) -> Tensor:
        values = F.linear(F.silu(c), self.weight.flatten(0, 1), self.bias.flatten())
        return values.view(len(c), len(self.bias), 2, 3, c.shape[1])


class Head(nn.Module):
    """Modulated LayerNorm and a linear map to the values of a patch: [n, N, D] -> [n, C or 2 C, H, W]."""

    def __init__(self, config: PatchConfig):
        super().__init__()
        self.linear = nn.Linear(config.dim, config.outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))
        self._patch = config.patch
        for linear in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, patches: Tensor, cond: DiTConditioning, lanes: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond.sum.index_select(0, lanes))[:, None].chunk(2, dim=2)
        return unpatchify(self.linear(modulated(patches, shift, scale)), self._patch)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID, dim), nn.SiLU(), nn.Linear(dim, dim))


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes, dim)


class DiT(ModulatedNetwork):
    """DiT. State dicts have the released keys: a block's part of `modulation` is `blocks.{i}.adaLN_modulation.1.*`."""

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        D = config.dim
        self.learned_variance = config.learned_variance
        self.x_embedder = PatchEmbed(config.channels, D, config.patch)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D)
        position = position_embedding(D, config.side)[None].to(torch.get_default_dtype())  # like the other weights
        self.pos_embed = nn.Parameter(position, requires_grad=False)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.apply(initialise)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            nn.init.normal_(linear.weight, std=0.02)
        self.modulation = Modulation(config.depth, D)
        self.final_layer = Head(config)
        self.register_state_dict_post_hook(_split_modulation)
        self.register_load_state_dict_pre_hook(_join_modulation)

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> tuple[Tensor, DiTConditioning]:
        check_images(x, t, self.sample_shape)
        check_labels(context, len(x), self.config.num_classes)
        dtype = self.pos_embed.dtype
        t = 1 - t / 1000 if self.config.sit_time else t
        time = self.t_embedder.mlp(timestep_embedding(t, SINUSOID, self.config.frequency_shift).to(dtype))  # [B, D]
        c = time + self.y_embedder.embedding_table(upload(context, x.device))
        rows = (self.x_embedder(x.to(dtype)) + self.pos_embed).contiguous()  # a convolution's output is channels-first
        return rows, DiTConditioning(time, c, self.modulation(c))

    def stem_and_head_macs(self) -> tuple[int, int]:
        D, T = self.config.dim, self.tokens
        stem = T * self.patch_dim * D + (SINUSOID + D) * D + self.config.depth * 6 * D * D
        return stem, T * D * self.config.outputs + 2 * D * D


def initialise(module: nn.Module) -> None:
    """Section 3.2 of the paper and its appendix: Xavier for linear maps (patch embedding included), biases zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.detach().flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _keys(prefix: str, blocks: int, name: str) -> list[str]:
    return [f"{prefix}blocks.{i}.adaLN_modulation.1.{name}" for i in range(blocks)]


def _split_modulation(network: DiT, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in ("weight", "bias"):
        values = state.pop(f"{prefix}modulation.{name}")
        state.update(zip(_keys(prefix, len(values), name), values, strict=True))


def _join_modulation(network: DiT, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name in ("weight", "bias"):
        keys = _keys(prefix, network.config.depth, name)
        if all(key in state for key in keys):
            state[f"{prefix}modulation.{name}"] = torch.stack([state.pop(key) for key in keys])


def _presets() -> dict[str, Preset]:
    """The paper's table 1 and the two released networks, for 256 and 512 pixels; sizes here are those of the latents.
    Guidance applied to three of the four channels. SiT (Ma et al., ECCV 2024, arXiv 2401.08740) uses the same networks
    to predict a velocity."""
    sizes = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
    configs = {
        f"dit_{name}_{patch}_256": DiTConfig(32, 4, patch, *size, num_classes=1001)
        for name, size in sizes.items()
        for patch in (2, 4, 8)
    }
    configs["dit_xl_2_512"] = DiTConfig(64, 4, 2, *sizes["xl"], num_classes=1001)
    common = {"null_label": 1000, "guided_channels": 3, "latent_scale": 0.18215}
    presets = {name: Preset(config, "linear", **common) for name, config in configs.items()}
    for name in [f"dit_{size}_{patch}_256" for size in sizes for patch in (2, 4, 8)]:
        network = replace(configs[name], learned_variance=False, sit_time=True)
        presets[name.replace("dit", "sit")] = Preset(network, "flow", **common, prediction_type="flow")
    return presets


FAMILY = Family(DiTConfig, DiT, _presets())
