"""Decoding through a tiny autoencoder with random weights, and drawing latents from moments."""

import json
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import adadiff
from adadiff.config import PRESETS
from adadiff.pipelines.latents import decode, draw_latents, load_autoencoder
from sampler import shell


@cache
def tiny(**changes: object) -> AutoencoderKL:
    torch.manual_seed(3)
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 12,
    }
    return AutoencoderKL(**settings, **changes).eval().requires_grad_(False)


def latents(n: int) -> torch.Tensor:
    return torch.randn(n, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def test_published_scales() -> None:
    """U-ViT, libs/autoencoder.py; issue 17 of its repository for MS-COCO."""
    scales = {name: config.latent_scale for name, config in PRESETS.items()}
    assert {scales[f"imagenet{size}_uvit_{kind}"] for size in (256, 512) for kind in ("large", "huge")} == {0.18215}
    assert scales["mscoco_uvit_small"] == scales["mscoco_uvit_small_deep"] == 0.2301
    assert {scales[name] for name in ("cifar10_uvit_small", "imagenet64_uvit_mid", "digits")} == {None}


@pytest.mark.parametrize("batch", [1, 3, 5, 100])
def test_images_are_those_of_the_decoder_one_by_one(batch: int) -> None:
    model, z = tiny(), latents(5)
    images = decode(z, model, 0.2301, batch=batch)
    assert (images.shape, images.dtype) == ((5, 3, 12, 10), torch.float32)
    for image, one in zip(images, z, strict=True):
        wanted = model.decoder(model.post_quant_conv(one[None] / 0.2301))[0]
        torch.testing.assert_close(image, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(images, decode(z, model, 0.18215), atol=1e-3)


def test_nothing_to_decode() -> None:
    assert decode(latents(0), tiny(), 0.18215).shape == (0, 3, 12, 10)


def test_the_autoencoder_s_dtype_is_its_own() -> None:
    half, z = AutoencoderKL(**dict(tiny().config)).eval().double(), latents(2)
    half.load_state_dict(tiny().state_dict())
    torch.testing.assert_close(decode(z.double(), half, 0.5), decode(z, tiny(), 0.5), rtol=1e-4, atol=1e-4)
    assert decode(z.double(), half, 0.5).dtype == torch.float32


def test_progress_counts_images(capsys: pytest.CaptureFixture[str]) -> None:
    decode(latents(3), tiny(), 0.18215, batch=2)
    assert capsys.readouterr().err == ""
    decode(latents(3), tiny(), 0.18215, batch=2, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_an_autoencoder_from_a_folder(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(tmp_path / "vae")
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(decode(latents(2), loaded, 0.18215), decode(latents(2), tiny(), 0.18215))


def test_sample_decodes_with_the_scale_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().save_pretrained(tmp_path / "vae")
    config = replace(shell.config(channels=4), latent_scale=0.3)
    model = shell.saved(tmp_path / "model.safetensors", config)
    line = f"sample {model} --n 3 --steps 2 --policy full --batch 2 --decoder {tmp_path / 'vae'}"
    assert shell.run(f"{line} --out {tmp_path / 'out'}") == 0
    drawn, _ = adadiff.sample(adadiff.load(model), 3, steps=2)
    for slot, image in enumerate(decode(drawn, tiny(), 0.3)):
        picture = shell.read(tmp_path / "out" / f"{slot:06d}.png").astype(int)
        assert np.abs(picture - shell.pixels(image)).max() <= 1  # other batch-mates move the last bit of a float
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["configuration"]["decoder"] == str(tmp_path / "vae")
    capsys.readouterr()
    images = shell.saved(tmp_path / "images.safetensors", shell.config())
    unscaled = shell.saved(tmp_path / "unscaled.safetensors", shell.config(channels=4))
    tiny(latent_channels=3).save_pretrained(tmp_path / "three")
    for wrong, words in (
        (f"{line} --format npz", "--format npz keeps latents; leave --decoder out"),
        (f"sample {images} --decoder {tmp_path}", "this model makes images, not latents; leave --decoder out"),
        (f"sample {unscaled} --decoder {tmp_path / 'vae'}", "has no latent_scale; convert it again with a --preset"),
        (line.replace("/vae", "/none"), "cannot open an autoencoder"),
        (line.replace("/vae", "/three"), "latents must be float [n, 3, h, w] for this autoencoder"),
    ):
        assert shell.run(f"{wrong} --out {tmp_path / 'wrong'}") == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "wrong").exists()


def test_moments_are_a_mean_and_a_clamped_log_variance() -> None:
    moments, noise = torch.zeros(2, 8, 3, 5), torch.randn(2, 4, 3, 5)
    moments[:, :4], moments[0, 4:], moments[1, 4:] = 2.0, -1.0, 50.0
    drawn = draw_latents(moments, noise, 0.2)
    torch.testing.assert_close(drawn[0], 0.2 * (2 + math.exp(-0.5) * noise[0]))
    torch.testing.assert_close(drawn[1], 0.2 * (2 + math.exp(10) * noise[1]))
    moments[:, 4:] = -100.0
    torch.testing.assert_close(draw_latents(moments, noise, 1.0), 2 + math.exp(-15) * noise)


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z, model = latents(2), tiny()
    for wrong in (z[0], z[:, :3], z.long()):
        with pytest.raises(ValueError, match=r"latents must be float \[n, 4, h, w\]"):
            decode(wrong, model, 0.18215)
    z[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        decode(z, model, 0.18215)
    for scale, batch in ((0.0, 8), (math.inf, 8), (0.1, 0)):
        with pytest.raises(ValueError, match="scale must be a positive number and batch at least 1"):
            decode(latents(1), model, scale, batch=batch)
    with pytest.raises(ValueError, match="shifts its latents"):
        decode(latents(1), tiny(shift_factor=0.1), 0.18215)
    for moments, noise in ((torch.zeros(1, 7, 2, 2), z), (torch.zeros(2, 8, 6, 5), z[:1]), (torch.zeros(8, 2), z)):
        with pytest.raises(ValueError, match=r"moments must be \[n, 2C, h, w\]"):
            draw_latents(moments, noise, 1.0)
    with pytest.raises(ValueError, match=r"expected config\.json and .* vae/ of a diffusers pipeline"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot open an autoencoder"):
        load_autoencoder(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'adadiff_kernels\[latents\]'"):
        load_autoencoder(tmp_path)
