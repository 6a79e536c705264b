"""Building blocks of the networks: patches, time embedding, attention, MLP; and the checks of their inputs.

B lanes, n rows, T tokens, N patches, D channels. Parameter names are those of the published checkpoints.
"""

import math
from reprlib import repr as shortly
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(t: Tensor, dim: int, shift: int = 0) -> Tensor:
    """Sinusoidal embedding, float32 [B, dim]: cosines, then sines, of frequencies 10000^(-i / (dim / 2 - shift)). t:
    float [B], fractions allowed. Operations are in the published order (U-ViT libs/uvit.py, DiT models.py; diffusers
    embeddings.py for shift 1)."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / (half - shift)
    angles = t.float()[:, None] * torch.exp(exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, N, D]


def product(linear: nn.Module, h: Tensor, add_bias: bool) -> Tensor:
    """linear(h), without its bias unless add_bias."""
    return linear(h) if add_bias else F.linear(h, linear.weight)


def share_of(count: int, width: float) -> int:
    """The number of heads or channels, of `count`, at this width: count * width, rounded up."""
    return math.ceil(round(count * width, 9))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q, k, v: [n, heads, T, d]. Returns the same shape.

    Training in bfloat16 on a CPU takes the products one by one: the fused backward of PyTorch 2.13 needs ten times as
    long there (512 heads of 66 tokens: 40 against 3 ms)."""
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class FirstHeads(nn.Module):
    """Queries, keys and values of the first heads, [n, T, D] -> [3, n, T, inner].

    weight: [3, inner, D]; bias: [3, inner] or None. With this shape the weights can be views of a wider network's
    `qkv`, in which the first heads are three separate ranges of rows.
    """

    def __init__(self, dim: int, inner: int, bias: bool):
        super().__init__()
        self.in_features = dim
        self.weight = nn.Parameter(torch.empty(3, inner, dim))
        self.bias = nn.Parameter(torch.zeros(3, inner)) if bias else None
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, h: Tensor) -> Tensor:
        n, T, D = h.shape
        rows, weight = h.reshape(1, n * T, D).expand(3, -1, -1), self.weight.transpose(1, 2)
        values = torch.bmm(rows, weight) if self.bias is None else torch.baddbmm(self.bias[:, None], rows, weight)
        return values.view(3, n, T, -1)


class Attention(nn.Module):
    """Multi-head self-attention. width: the share of the heads in use; heads and dim are those of the whole network."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, width: float = 1.0):
        super().__init__()
        self.dim, self.heads, self._head_dim = dim, share_of(heads, width), dim // heads
        inner = self.heads * self._head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias) if inner == dim else FirstHeads(dim, inner, qkv_bias)
        self.proj = nn.Linear(inner, dim)

    @property
    def bias(self) -> Tensor:
        """[D], of the last linear layer."""
        return self.proj.bias

    def forward(self, h: Tensor, add_bias: bool = True) -> Tensor:
        """h: [n, T, D]. Returns [n, T, D], without `bias` unless add_bias."""
        n, T, _ = h.shape
        qkv = self.qkv(h)
        if qkv.ndim == 4:  # from FirstHeads
            q, k, v = qkv.view(3, n, T, self.heads, self._head_dim).transpose(2, 3)  # [n, H, T, D/H]
        else:
            q, k, v = qkv.view(n, T, 3, self.heads, self._head_dim).permute(2, 0, 3, 1, 4)
        values = attend(q, k, v).transpose(1, 2).reshape(n, T, -1)
        return product(self.proj, values, add_bias)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one lane."""
        inner = self.heads * self._head_dim
        return 4 * inner * self.dim * tokens + 2 * tokens * tokens * inner


def has_epilogue(linear: nn.Module, h: Tensor) -> bool:
    """Whether cuBLAS can fuse the tanh GELU into linear(h): a plain linear layer on contiguous rows, on a CUDA device,
    without gradients, autocast, hooks, or torch.compile (which fuses by itself)."""
    return (
        h.is_cuda
        and type(linear) is nn.Linear
        and linear.bias is not None
        and h.is_contiguous()
        and h.dtype == linear.weight.dtype
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cuda")
        and not (torch.is_grad_enabled() and (h.requires_grad or linear.weight.requires_grad))
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
    )


class Mlp(nn.Module):
    """Two linear layers with a GELU. approximate: form of the GELU, "none" (erf) or "tanh"."""

    def __init__(self, dim: int, hidden: int, approximate: str = "none"):
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.approximate = approximate

    @property
    def bias(self) -> Tensor:
        """[D], of the last linear layer."""
        return self.fc2.bias

    def forward(self, h: Tensor, add_bias: bool = True) -> Tensor:
        """h: [n, T, D]. Returns [n, T, D], without `bias` unless add_bias."""
        return product(self.fc2, self._gelu(h), add_bias)

    def _gelu(self, h: Tensor) -> Tensor:
        """[n, T, hidden]. On a GPU the tanh GELU runs in the epilogue of the matrix product, which saves a pass over
        memory; it then reads the product before it is rounded to 16 bits."""
        if self.approximate == "tanh" and has_epilogue(self.fc1, h):
            n, T, D = h.shape
            values = torch._addmm_activation(self.fc1.bias, h.view(n * T, D), self.fc1.weight.t(), use_gelu=True)
            return values.view(n, T, -1)
        return F.gelu(self.fc1(h), approximate=self.approximate)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one lane."""
        return 2 * self.dim * self.hidden * tokens


def unpatchify(values: Tensor, patch: int) -> Tensor:
    """values: [n, N, p * p * C], patches of a square image in row-major order, channels last inside a patch. Returns
    [n, C, H, W]."""
    n, N, outputs = values.shape
    side, channels = math.isqrt(N), outputs // patch**2
    images = values.view(n, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(n, channels, side * patch, side * patch)


def patchify(images: Tensor, patch: int) -> Tensor:
    """images: [n, C, H, W]. Returns [n, N, p * p * C], the inverse of `unpatchify`."""
    n, channels, H, W = images.shape
    patches = images.view(n, channels, H // patch, patch, W // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(n, -1, patch * patch * channels)


LARGEST = 2**16  # largest size in a configuration, so that no number of elements overflows


def check_integers(config: Any, least: int, *names: str, most: int = LARGEST) -> None:
    """Raises ValueError for fields of a configuration that are not integers in [least, most]."""
    kind = "a positive integer" if least == 1 else f"an integer >= {least}"
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be {kind}, got {shortly(value)}")
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {shortly(value)}")


def check_booleans(config: Any, *names: str) -> None:
    """Raises ValueError for fields of a configuration that are not true or false."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be true or false, got {shortly(getattr(config, name))}")


def check_width(config: Any) -> None:
    """Raises ValueError unless config.width is in (0, 1]."""
    width = config.width
    if type(width) not in (int, float) or not 0 < width <= 1:
        raise ValueError(f"width must be a share of heads and MLP channels in (0, 1], got {shortly(width)}")


def check_images(x: Tensor, t: Tensor, shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless x is [B, *shape] and t [B]."""
    if x.ndim != 4 or tuple(x.shape[1:]) != shape:
        raise ValueError(f"x must be [B, {', '.join(map(str, shape))}], got {tuple(x.shape)}")
    if t.shape != (len(x),):
        raise ValueError(f"t must hold one timestep per lane, [{len(x)}], got {tuple(t.shape)}")


def check_labels(labels: Tensor | None, n: int, classes: int) -> None:
    """Raises ValueError unless labels are int64 [n] in [0, classes). Values are not checked on a GPU, nor in compiled
    code, where reading them would break the graph."""
    if labels is None or labels.shape != (n,) or labels.dtype != torch.int64:
        raise ValueError(f"this network needs labels, int64 [{n}]")
    if torch.compiler.is_compiling() or not labels.is_cpu or not n:
        return
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be in 0..{classes - 1}, got {labels.tolist()[:8]}")


def check_text(context: Tensor | None, n: int, tokens: int, dim: int) -> None:
    """Raises ValueError unless the context is float [n, tokens, dim], embeddings of text."""
    wanted = [n, tokens, dim]
    if context is None or list(context.shape) != wanted or not context.is_floating_point():
        given = "none" if context is None else f"{context.dtype} {list(context.shape)}"
        raise ValueError(f"this network needs embeddings of text, float {wanted}, got {given}")
