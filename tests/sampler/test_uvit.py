"""U-ViT against its published forward, written again from the description alone, and against the published tables."""

import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adadiff.config import PRESETS
from adadiff.models.layers import patchify, timestep_embedding, unpatchify
from adadiff.models.uvit import UViT, UViTConfig
from sampler.tiny import scramble

BASE = UViTConfig(image_size=8, channels=3, patch=2, dim=48, depth=6, heads=3)
VARIANTS = {
    "unconditional": BASE,
    "classes": dataclasses.replace(BASE, num_classes=5),
    "text": dataclasses.replace(BASE, context_tokens=7, context_dim=11),
    "patch-4": dataclasses.replace(BASE, patch=4, channels=1),
    "patch-1": dataclasses.replace(BASE, image_size=5, patch=1, depth=2),  # 25 patches
    "patch-3": dataclasses.replace(BASE, image_size=15, patch=3, depth=2),
    "no-conv": dataclasses.replace(BASE, conv=False, num_classes=2),
    "time-mlp": dataclasses.replace(BASE, mlp_time_embed=True),
    "qkv-bias": dataclasses.replace(BASE, qkv_bias=True, mlp_ratio=3, heads=1),
    "time-over-7": dataclasses.replace(BASE, time_divisor=7, depth=2),
    "two-blocks": dataclasses.replace(BASE, depth=2, dim=10, heads=5),
}


def published(state: dict[str, Tensor], heads: int, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    """U-ViT's forward from a state dict; depth, patch, classes, text and convolution are read off the keys."""

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def norm(h: Tensor, name: str) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        h = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return h * state[f"{name}.weight"] + state[f"{name}.bias"]

    def block(h: Tensor, name: str) -> Tensor:
        B, T, D = h.shape
        qkv = linear(norm(h, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = (part.view(B, T, heads, D // heads).transpose(1, 2) for part in qkv.split(D, dim=-1))
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(D // heads), dim=-1)
        h = h + linear((weights @ v).transpose(1, 2).reshape(B, T, D), f"{name}.attn.proj")
        m = linear(norm(h, f"{name}.norm2"), f"{name}.mlp.fc1")
        return h + linear(m * (1 + torch.erf(m / math.sqrt(2))) / 2, f"{name}.mlp.fc2")

    kernel = state["patch_embed.proj.weight"]
    D, C, p, _ = kernel.shape
    B, _, H, W = x.shape
    time = torch.stack([f(t * 10000 ** (-i / (D // 2))) for f in (torch.cos, torch.sin) for i in range(D // 2)], 1).to(
        kernel.dtype
    )
    if "time_embed.0.weight" in state:
        time = linear(F.silu(linear(time, "time_embed.0")), "time_embed.2")
    tokens = [time[:, None]]
    if "label_emb.weight" in state:
        tokens = [state["label_emb.weight"][context][:, None], *tokens]
    if "context_embed.weight" in state:
        tokens = [*tokens, linear(context, "context_embed")]
    num_prefix_tokens = sum(part.shape[1] for part in tokens)
    for i in range(0, H, p):
        for j in range(0, W, p):
            patch = x[:, :, i : i + p, j : j + p].reshape(B, -1) @ kernel.reshape(D, -1).T
            tokens.append((patch + state["patch_embed.proj.bias"])[:, None])
    h = torch.cat(tokens, 1) + state["pos_embed"]

    half = sum(re.fullmatch(r"in_blocks\.\d+\.norm1\.weight", key) is not None for key in state)
    skips = []
    for i in range(half):
        h = block(h, f"in_blocks.{i}")
        skips.append(h)
    h = block(h, "mid_block")
    for i in range(half):
        h = linear(torch.cat([h, skips[half - 1 - i]], dim=-1), f"out_blocks.{i}.skip_linear")
        h = block(h, f"out_blocks.{i}")
    values = linear(norm(h, "norm"), "decoder_pred")[:, num_prefix_tokens:]
    image = torch.zeros_like(x)
    for index in range(values.shape[1]):
        i, j = p * (index // (W // p)), p * (index % (W // p))
        image[:, :, i : i + p, j : j + p] = values[:, index].view(B, p, p, C).permute(0, 3, 1, 2)
    if "final_layer.weight" in state:
        image = F.conv2d(image, state["final_layer.weight"], state["final_layer.bias"], padding=1)
    return image


def context_for(config: UViTConfig, n: int) -> Tensor | None:
    if config.context_tokens:
        return torch.randn(n, config.context_tokens, config.context_dim, dtype=torch.float64)
    return torch.arange(n) % config.num_classes if config.num_classes else None


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_is_the_published_one(name: str) -> None:
    config = VARIANTS[name]
    network = UViT(config).double()
    scramble(network, 0.2)
    x = torch.randn(3, *network.sample_shape, dtype=torch.float64)
    # a sinusoid in float32, as published, of whose angle up to 999 one rounding is 6e-5
    for t, tolerance in (([0.3, 0.85, 1.0], 1e-6), ([999.0, 187.0, 20.98], 1e-3)):
        t = torch.tensor(t, dtype=torch.float64)
        context = context_for(config, 3)
        want = published(network.state_dict(), config.heads, x, t / config.time_divisor, context)
        torch.testing.assert_close(network(x, t, context), want, rtol=tolerance, atol=tolerance)
        assert want.std() > 0.1  # so that the tolerance means something


def test_fractional_timesteps_are_not_rounded() -> None:
    rows = timestep_embedding(torch.tensor([20.0, 20.5, 21.0]), 6)
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])


def test_patchify_undoes_unpatchify_and_packs_channels_last() -> None:
    images = torch.randn(2, 3, 15, 15)
    patches = patchify(images, 3)
    assert torch.equal(unpatchify(patches, 3), images)
    # patch 7 lies in row 1, column 2; element (1, 2, channel 0) inside it
    assert torch.equal(patches[:, 7, (1 * 3 + 2) * 3 + 0], images[:, 0, 3 + 1, 6 + 2])


# The released models: parameters, multiply-adds to 0.1e9, tokens, state-dict entries where they were counted.
PUBLISHED = {
    "cifar10_uvit_small": (44_255_328, 12.2e9, 257, 164),
    "celeba64_uvit_small": (44_292_228, 12.2e9, 257, 164),
    "imagenet64_uvit_mid": (130_940_292, 35.2e9, 258, 213),
    "imagenet64_uvit_large": (286_827_652, 76.5e9, 258, 261),
    "imagenet256_uvit_large": (286_763_172, 76.5e9, 258, 261),
    "imagenet256_uvit_huge": (500_832_016, 133.2e9, 258, 355),
    "imagenet512_uvit_large": (286_861_524, 76.5e9, 258, 261),
    "imagenet512_uvit_huge": (500_942_656, 133.2e9, 258, 355),
    "mscoco_uvit_small": (44_692_644, 16.2e9, 334, None),
    "mscoco_uvit_small_deep": (58_345_636, 21.2e9, 334, None),
}
CLASSES = {"imagenet64": 1000, "imagenet256": 1001, "imagenet512": 1001}


def published_shapes(config: UViTConfig) -> dict[str, tuple[int, ...]]:
    D, p, C, half = config.dim, config.patch, config.channels, config.depth // 2
    shapes = {
        "pos_embed": (1, config.num_prefix_tokens + config.patches, D),
        "patch_embed.proj.weight": (D, C, p, p),
        "patch_embed.proj.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
        "decoder_pred.weight": (p * p * C, D),
        "decoder_pred.bias": (p * p * C,),
    }
    if config.num_classes:
        shapes["label_emb.weight"] = (config.num_classes, D)
    if config.context_tokens:
        shapes |= {"context_embed.weight": (D, 768), "context_embed.bias": (D,)}
    if config.conv:
        shapes |= {"final_layer.weight": (C, C, 3, 3), "final_layer.bias": (C,)}
    out = [f"out_blocks.{i}" for i in range(half)]
    for block in [*(f"in_blocks.{i}" for i in range(half)), "mid_block", *out]:
        shapes[f"{block}.attn.qkv.weight"] = (3 * D, D)
        for name, size in {"attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}.items():
            shapes |= {f"{block}.{name}.weight": size, f"{block}.{name}.bias": size[:1]}
        shapes |= {f"{block}.{norm}.{name}": (D,) for norm in ("norm1", "norm2") for name in ("weight", "bias")}
    for block in out:
        shapes |= {f"{block}.skip_linear.weight": (D, 2 * D), f"{block}.skip_linear.bias": (D,)}
    return shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_keys_and_sizes(name: str) -> None:
    parameters, macs, tokens, entries = PUBLISHED[name]
    config = PRESETS[name].network
    with torch.device("meta"):
        network = UViT(config)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == published_shapes(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network.tokens == tokens
    assert config.num_classes == CLASSES.get(name.split("_")[0], 0)
    counted = sum(block.macs(tokens) for block in network.blocks) + sum(network.stem_and_head_macs())
    assert counted == pytest.approx(macs, abs=0.05e9)
    if entries is not None:
        assert len(network.state_dict()) == entries


def test_macs_are_those_of_the_products_that_run() -> None:
    """Every product of one forward pass counted as it is called, attention by its definition."""
    config = dataclasses.replace(BASE, num_classes=5, mlp_time_embed=True)
    network = UViT(config)
    counted = 0

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        counted += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(count)
    network(torch.randn(1, 3, 8, 8), torch.tensor([5.0]), torch.tensor([1]))
    counted += len(network.blocks) * 2 * network.tokens**2 * config.dim  # weights, then weighted values
    assert sum(block.macs(network.tokens) for block in network.blocks) + sum(network.stem_and_head_macs()) == counted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "multiple of patch"),
        ({"heads": 5}, "multiple of heads"),
        ({"dim": 27, "heads": 3}, "of heads 3 and of 2"),
        ({"depth": 5}, "depth must be even"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"channels": 2.0}, "channels must be a positive integer"),
        ({"num_classes": -1}, "num_classes"),
        ({"num_classes": 3, "context_tokens": 7}, "labels or text"),
    ],
)
def test_impossible_configurations_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


X, TIME = torch.zeros(2, 3, 8, 8), torch.zeros(2)


@pytest.mark.parametrize(
    ("variant", "given", "message"),
    [
        ("classes", (X[:, :1], TIME, torch.zeros(2).long()), r"x must be \[B, 3, 8, 8\]"),
        ("classes", (X, TIME[:1], torch.zeros(2).long()), "one timestep per lane"),
        ("classes", (X, TIME, None), "needs labels"),
        ("classes", (X, TIME, torch.zeros(2)), "int64"),
        ("classes", (X, TIME, torch.tensor([0, 5])), r"0\.\.4"),
        ("classes", (X, TIME, torch.tensor([-1, 0])), r"0\.\.4"),
        ("text", (X, TIME, torch.zeros(2, 7, 12)), "embeddings of text"),
        ("unconditional", (X, TIME, torch.zeros(2).long()), "no labels"),
    ],
)
def test_bad_input_is_named(variant: str, given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UViT(VARIANTS[variant])(*given)
