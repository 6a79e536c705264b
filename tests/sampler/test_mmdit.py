"""MMDiT against diffusers' SD3 transformer, by its state dict."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from adadiff.config import ModelConfig
from adadiff.conversion.convert import translate
from adadiff.conversion.layouts import layout_of
from adadiff.models.mmdit import MMDiT, MMDiTConfig
from sampler.tiny import MMDIT, inputs, scramble


def ours(transformer: SD3Transformer2DModel, config: MMDiTConfig) -> MMDiT:
    state = transformer.state_dict()
    assert layout_of(state) == "mmdit-diffusers"
    tensors = translate("mmdit-diffusers", state, ModelConfig(config, "linear"), "diffusers")
    made = MMDiT(config).eval()
    made.load_state_dict({key.removeprefix("backbone."): value for key, value in tensors.items()}, assign=True)
    return made


def theirs(config: MMDiTConfig) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=config.position_base * config.patch, patch_size=config.patch, in_channels=config.channels,
        out_channels=config.channels, num_layers=config.depth, attention_head_dim=config.dim // config.heads,
        num_attention_heads=config.heads, joint_attention_dim=config.context_dim, caption_projection_dim=config.dim,
        pooled_projection_dim=config.pooled_dim, pos_embed_max_size=config.position_side,
    ).eval()  # fmt: skip


@torch.no_grad()
def called(transformer: SD3Transformer2DModel, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    pooled = context[:, 0, : transformer.config.pooled_projection_dim]
    return transformer(x, context[:, 1:], pooled, t).sample


def test_what_diffusers_computes() -> None:
    """In float64; the last block has no text of its own, and positions are cut from the middle of a larger grid."""
    transformer = theirs(MMDIT)
    positions = transformer.pos_embed.pos_embed.clone()
    scramble(transformer, 0.15, seed=5)
    assert torch.equal(transformer.pos_embed.pos_embed, positions), "a buffer"
    network = ours(transformer, MMDIT).double()
    torch.testing.assert_close(network.pos_embed.float(), MMDiT(MMDIT).pos_embed, rtol=0, atol=2e-6)
    given = inputs(network, 5)
    x, t, context = given.x.double(), given.t.double(), given.context.double()
    wanted = called(transformer.double(), x, t, context)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, context), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_at_full_width() -> None:
    """Four blocks as wide as SD3-medium's, 256 pixels, float32: to 1e-5 of the largest value. All 24 blocks take 16 GB,
    see benchmarks/studies/parity.py."""
    config = MMDiTConfig(32, 16, 2, dim=1536, depth=4, heads=24)
    torch.manual_seed(0)
    transformer = theirs(config)
    for name, parameter in transformer.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter.data, std=0.02)
    network = ours(transformer, config)
    x, t = torch.randn(1, 16, 32, 32), torch.tensor([321.0])
    context = torch.randn(1, 334, 4096)
    wanted = called(transformer, x, t, context)
    del transformer
    with torch.no_grad():
        found = network(x, t, context)
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_what_does_not_fit_is_named() -> None:
    transformer = theirs(MMDIT)
    state = transformer.state_dict()
    small = MMDiTConfig(6, 3, 2, dim=36, depth=4, heads=3, context_tokens=5, context_dim=10, pooled_dim=7)
    state["pos_embed.pos_embed"] = torch.zeros(1, 4, 36)
    with pytest.raises(ValueError, match="no grid of 3 positions in a row or more"):
        translate("mmdit-diffusers", state, ModelConfig(small, "linear"), "file")
    del state["pos_embed.pos_embed"]
    with pytest.raises(ValueError, match=r"missing pos_embed\.pos_embed"):
        translate("mmdit-diffusers", state, ModelConfig(small, "linear"), "file")
    for changes, said in (
        ({"image_size": 7}, "not a multiple of patch"), ({"position_side": 2}, "3 patches in a row are more"),
        ({"pooled_dim": 11}, "more than the context's 10"), ({"context_tokens": 1}, "context_tokens must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            MMDiTConfig(**{**vars(MMDIT), **changes})
    x, t = torch.zeros(2, 3, 6, 6), torch.ones(2)
    with pytest.raises(ValueError, match=r"embeddings of text, float \[2, 5, 10\]"):
        MMDiT(MMDIT)(x, t, torch.zeros(2, 4, 10))
