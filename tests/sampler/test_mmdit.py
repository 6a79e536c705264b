"""MMDiT against diffusers' SD3 transformer, by its state dict."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

import adadiff
from adadiff.config import PRESETS, ModelConfig
from adadiff.conversion.convert import convert, translate
from adadiff.conversion.layouts import layout_of
from adadiff.diffusion.flow import FlowEuler
from adadiff.diffusion.noise import initial_noise
from adadiff.models.dit import position_embedding
from adadiff.models.mmdit import MMDiT, MMDiTConfig
from adadiff_kernels import COLUMNS
from sampler.tiny import MMDIT, inputs, scramble

SERVED = dataclasses.replace(MMDIT, position_base=3)  # whose positions were made for as many patches
MMDIT_SHAPE = (MMDIT.channels, MMDIT.image_size, MMDIT.image_size)


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


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    config = ModelConfig(SERVED, "flow", latent_scale=1.5, latent_shift=0.06, prediction_type="flow")
    monkeypatch.setitem(PRESETS, "small_sd3", config)
    return "small_sd3"


def folder(path: Path, **changes: object) -> Path:
    transformer = theirs(SERVED)
    scramble(transformer, 0.15, seed=5)
    transformer.save_pretrained(path / "transformer")
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    (path / "vae").mkdir()
    autoencoder = {"_class_name": "AutoencoderKL", "scaling_factor": 1.5, "shift_factor": 0.06}
    (path / "vae" / "config.json").write_text(json.dumps(autoencoder))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return path


def test_a_pipelines_folder_becomes_a_model_that_draws(preset: str, tmp_path: Path) -> None:
    found = convert(folder(tmp_path / "in"), tmp_path / "out.safetensors")
    assert (found.layout, found.preset) == ("mmdit-diffusers", preset)
    model = adadiff.load(tmp_path / "out.safetensors")
    assert (model.config.latent_shift, model.config.prediction_type) == (0.06, "flow")
    text = torch.randn(2, 5, 10)
    given = {"steps": 4, "solver": "flow-euler:shift=3", "text_embeds": text}
    images, _ = adadiff.sample(model, 2, **given)
    x = initial_noise(torch.arange(2), MMDIT_SHAPE).double()
    network = model.backbone.double()
    table = FlowEuler(3.0).table(model.schedule, 4)
    with torch.no_grad():
        for t, step in zip(table.t, table.coefficients[:, COLUMNS.index("cur")], strict=True):
            x = x + step * network(x, t.expand(2), text.double())
    torch.testing.assert_close(images.double(), x, rtol=1e-3, atol=1e-4)


def test_the_authors_own_names(preset: str, tmp_path: Path) -> None:
    """Ours, with a larger grid of positions, from whose middle ours are cut."""
    network = MMDiT(SERVED)
    scramble(network, 0.1)
    grid = position_embedding(36, 5, 5 / 3)[None]
    torch.save({**network.state_dict(), "pos_embed": grid}, tmp_path / "sd3.pth")
    found = convert(tmp_path / "sd3.pth", tmp_path / "out.safetensors")
    assert (found.layout, found.preset) == ("mmdit", preset)
    again = adadiff.load(tmp_path / "out.safetensors").backbone
    assert torch.equal(again.pos_embed, grid.view(1, 5, 5, 36)[:, 1:4, 1:4].reshape(1, 9, 36))
    assert torch.equal(again.final_layer.linear.weight, network.final_layer.linear.weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qk_norm": "rms_norm"}, "qk_norm is 'rms_norm'"),
        ({"dual_attention_layers": [0, 1]}, "dual_attention_layers is"),
        ({"caption_projection_dim": 35}, "caption_projection_dim must be 36"),
        ({"num_layers": None}, "num_layers must be a positive integer"),
        ({"out_channels": 4}, "out_channels must be 3"),
        ({"num_layers": 5}, "presets of its network and autoencoder: none"),
    ],
)
def test_folders_that_are_refused(changes: dict, said: str, preset: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        convert(folder(tmp_path / "in", **changes), tmp_path / "out.safetensors")


def test_the_preset_is_stable_diffusion_3_medium() -> None:
    """2.0 billion weights, as published."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in MMDiT(PRESETS["sd3_medium"].network).parameters())
    assert weights / 1e9 == pytest.approx(2.03, abs=0.1)
