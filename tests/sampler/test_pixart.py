"""PixArt against diffusers' own, through the converter of its folders, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

import adadiff
from adadiff.config import PRESETS
from adadiff.conversion.convert import convert
from adadiff.conversion.layouts import NO_CAPTION, layout_of
from adadiff.models import pixart
from adadiff.models.pixart import PixArt, PixArtConfig
from sampler.tiny import PIXART, inputs, scramble

SMALL = {
    "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 3, "out_channels": 6, "num_layers": 4,
    "cross_attention_dim": 36, "sample_size": 6, "patch_size": 2, "caption_channels": 10,
}  # fmt: skip


def theirs(**settings: object) -> PixArtTransformer2DModel:
    made = PixArtTransformer2DModel(**settings).eval()
    scramble(made, 0.15, seed=3)
    return made


def folder(transformer: PixArtTransformer2DModel, path: Path, **beside: dict) -> Path:
    transformer.save_pretrained(path / "transformer")
    index = {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (path / "model_index.json").write_text(json.dumps({**index, **{name: ["diffusers", ""] for name in beside}}))
    for name, values in beside.items():
        (path / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (path / name / file).write_text(json.dumps(values))
    return path


def called(transformer: PixArtTransformer2DModel, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    mask = (text != 0).any(2).to(x.dtype)
    with torch.no_grad():
        return transformer(
            x, text, t, encoder_attention_mask=mask, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ).sample


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    network = PixArtConfig(6, 3, 2, 36, 4, 3, context_tokens=5, context_dim=10)
    monkeypatch.setitem(PRESETS, "small_pixart", adadiff.config.ModelConfig(network, "linear", latent_scale=0.5))
    return "small_pixart"


def test_what_diffusers_computes(preset: str, tmp_path: Path) -> None:
    """In float64, with texts of several lengths: to rounding."""
    transformer = theirs(**SMALL)
    found = convert(folder(transformer, tmp_path / "in"), tmp_path / "out.safetensors")
    assert (found.layout, found.preset) == ("pixart-diffusers", preset)
    ours = adadiff.load(tmp_path / "out.safetensors").backbone.double()
    given = inputs(ours, 5)
    x, t, text = given.x.double(), given.t.double(), given.context.double()
    wanted = called(transformer.double(), x, t, text)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, text), wanted, rtol=1e-9, atol=1e-9)


def test_stretched_positions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = PixArtConfig(6, 3, 2, 36, 4, 3, context_tokens=5, context_dim=10, interpolation=0.5)
    monkeypatch.setitem(PRESETS, "small_sigma", adadiff.config.ModelConfig(network, "linear"))
    transformer = theirs(**SMALL, interpolation_scale=0.5)
    convert(folder(transformer, tmp_path / "in"), tmp_path / "out.safetensors")
    ours = adadiff.load(tmp_path / "out.safetensors").backbone
    given = inputs(ours, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(*given.all), called(transformer, *given.all), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_at_full_size(tmp_path: Path) -> None:
    """PixArt-XL/2, 0.6 billion random weights, a text of 17 tokens: float32 to 1e-5 of the largest value."""
    config = {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "sample_size": 32,
        "patch_size": 2,
        "caption_channels": 4096,
    }
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(**config).eval()
    ours = PixArt(PRESETS["pixart_xl_2_256"].network).eval()
    from adadiff.config import ModelConfig
    from adadiff.conversion.convert import translate

    whole = ModelConfig(ours.config, "linear")
    tensors = translate("pixart-diffusers", transformer.state_dict(), whole, "diffusers")
    ours.load_state_dict({key.removeprefix("backbone."): value for key, value in tensors.items()}, assign=True)
    x, t = torch.randn(1, 4, 32, 32), torch.tensor([321.0])
    text = torch.randn(1, 120, 4096)
    text[:, 17:] = 0
    wanted = called(transformer, x, t, text)
    with torch.no_grad():
        found = ours(x, t, text)
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_the_authors_own_names(preset: str, tmp_path: Path) -> None:
    """Ours, but for the caption that stands for none."""
    network = PixArt(PRESETS[preset].network)
    scramble(network, 0.1)
    state = {**network.state_dict(), NO_CAPTION: torch.randn(5, 10)}
    assert layout_of(state) == "pixart"
    torch.save({"state_dict": state}, tmp_path / "PixArt.pth")
    found = convert(tmp_path / "PixArt.pth", tmp_path / "out.safetensors")
    assert (found.layout, found.preset) == ("pixart", preset)
    again = adadiff.load(tmp_path / "out.safetensors").backbone
    given = inputs(again, 2)
    with torch.no_grad():
        assert torch.equal(again(*given.all), network(*given.all))


def test_texts_that_are_filled_up_are_as_long_as_they_are() -> None:
    """Tokens of zeros change nothing, whatever the others are; and samples are drawn from text."""
    network = PixArt(PIXART)
    scramble(network, 0.2)
    given = inputs(network, 2)
    text = given.context[1:2]
    assert float(text[:, 3:].abs().max()) == 0
    with torch.no_grad():
        whole = network(given.x[1:2], given.t[1:2], text)
        _, cond = network.embed(given.x[1:2], given.t[1:2], text)
        shorter = pixart.CrossAttention.forward
        block = network.blocks[0].cross_attn
        x = torch.randn(1, 9, 36)
        alone = shorter(block, x, cond.text[:, :3], cond.mask[:, :3])
        torch.testing.assert_close(shorter(block, x, cond.text, cond.mask), alone, rtol=1e-5, atol=1e-6)
    assert whole.shape == (1, 6, 6, 6)


def test_guided_sampling_from_text() -> None:
    model = adadiff.Model(adadiff.config.ModelConfig(PIXART, "linear", exits=adadiff.uem.PAPER)).eval()
    scramble(model, 0.2)
    text, none = torch.randn(3, 5, 10), torch.zeros(5, 10)
    none[0] = 1
    given = {"steps": 3, "text_embeds": text, "null_text_embeds": none, "guidance_scale": 2.0}
    images, report = adadiff.sample(model, 3, policy="exit:depth=2", **given)
    assert images.shape == (3, 3, 6, 6)
    assert bool((report.exit_layer[..., 0] == 2).all())
    reused, _ = adadiff.sample(model, 3, policy="reuse:every=3,level=unit,unit=cross", **given)
    full, _ = adadiff.sample(model, 3, **given)
    assert bool(torch.isfinite(reused).all())
    assert not torch.allclose(reused, full)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_type": "ada_norm"}, "norm_type must be 'ada_norm_single'"),
        ({"sample_size": 128}, "conditioned on the picture's size"),
        ({"cross_attention_dim": 35}, "cross_attention_dim must be 36"),
        ({"caption_channels": None}, "caption_channels must be a positive integer"),
        ({"attention_type": "gated"}, "attention_type is 'gated'"),
    ],
)
def test_folders_that_are_refused(changes: dict, said: str, preset: str, tmp_path: Path) -> None:
    path = folder(theirs(**SMALL), tmp_path / "in")
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=said):
        convert(path, tmp_path / "out.safetensors")


def test_presets_that_do_not_agree(preset: str, tmp_path: Path) -> None:
    scale = {"_class_name": "AutoencoderKL", "scaling_factor": 0.7}
    path = folder(theirs(**SMALL), tmp_path / "in", vae=scale)
    with pytest.raises(ValueError, match="presets of its network, schedule and autoencoder: none"):
        convert(path, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="is not of preset small_pixart"):
        convert(path, tmp_path / "out.safetensors", preset=preset)
    with pytest.raises(ValueError, match="served_by is for a DiT"):
        convert(path, tmp_path / "out.safetensors", served_by="dit")


def test_what_is_no_text_is_refused() -> None:
    network = PixArt(PIXART)
    x, t = torch.zeros(2, 3, 6, 6), torch.ones(2)
    for context in (None, torch.zeros(2, 4, 10), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 5, 10).long()):
        with pytest.raises(ValueError, match=r"embeddings of text, float \[2, 5, 10\]"):
            network(x, t, context)
    with pytest.raises(ValueError, match="interpolation must be a number"):
        PixArtConfig(6, 3, 2, 36, 4, 3, interpolation=0.0)
