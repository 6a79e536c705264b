"""Latents to images and back, by the autoencoder of a latent model. Needs diffusers."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def load_autoencoder(folder: str | Path, device: torch.device | str = "cpu") -> "AutoencoderKL":
    """Loads the `AutoencoderKL` saved by diffusers in `folder`, or by its name on the hub; float32.

    Raises ValueError if there is none, ImportError without diffusers.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("decoding latents takes diffusers: pip install 'adadiff_kernels[latents]'") from error
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no autoencoder: expected config.json and diffusion_pytorch_model.safetensors, "
            "as in the folder vae/ of a diffusers pipeline"
        )
    try:
        loaded = AutoencoderKL.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot open an autoencoder at {folder}: {error}") from error
    return loaded.requires_grad_(False).eval().to(device)


@torch.no_grad()
def decode(
    latents: Tensor,
    autoencoder: "AutoencoderKL",
    scale: float,
    shift: float = 0.0,
    *,
    batch: int = 8,
    progress: bool = False,
) -> Tensor:
    """Decodes latents / scale + shift to images, `batch` at a time. scale, shift: `ModelConfig.latent_scale` and
    `latent_shift`.

    latents: float [n, C, h, w] on any device. autoencoder: with C latent channels and the same shift.
    Returns float32 [n, 3, H, W] on the CPU, nominally in [-1, 1]. Raises ValueError for arguments that do not fit, and
    for NaN or infinity.
    """
    config = autoencoder.config
    if latents.dim() != 4 or not latents.is_floating_point() or latents.shape[1] != config.latent_channels:
        raise ValueError(
            f"latents must be float [n, {config.latent_channels}, h, w] for this autoencoder, got {latents.dtype} "
            f"{list(latents.shape)}"
        )
    if not bool(latents.isfinite().all()):
        raise ValueError("the latents hold NaN or infinity and cannot be decoded")
    if (config.shift_factor or 0.0) != shift or config.latents_mean is not None:
        found = "a mean by channel" if config.latents_mean is not None else config.shift_factor or 0.0
        raise ValueError(f"this autoencoder shifts its latents by {found}, the model by {shift}")
    if not 0 < scale < torch.inf or batch < 1:
        raise ValueError(f"scale must be a positive number and batch at least 1, got {scale} and {batch}")
    like, size, images = next(autoencoder.parameters()), latents.shape[2:], []
    # with offloading in diffusers, weights are on the CPU until the module is called
    device = getattr(getattr(autoencoder, "_hf_hook", None), "execution_device", None) or like.device
    with tqdm(total=len(latents), disable=not progress, unit="image", desc="decoding", dynamic_ncols=True) as bar:
        for part in latents.split(batch) if len(latents) else ():
            part = part.to(device, like.dtype) / scale + shift
            images.append(autoencoder.decode(part).sample.float().cpu())
            bar.update(len(part))
    if not images:
        sides = (v * 2 ** (len(config.block_out_channels) - 1) for v in size)
        return torch.zeros(0, config.out_channels, *sides, dtype=torch.float32, device="cpu")
    return torch.cat(images)


def draw_latents(moments: Tensor, noise: Tensor, scale: float, shift: float = 0.0) -> Tensor:
    """Draws latents: scale (mean - shift + deviation noise), with the log variance clamped to [-30, 20].

    moments: float [n, 2C, h, w], mean and log variance from the encoder, as in U-ViT's extracted features; noise:
    [n, C, h, w]. Returns float [n, C, h, w] (U-ViT, libs/autoencoder.py). Raises ValueError for other shapes.
    """
    n, channels, *size = moments.shape
    if moments.dim() != 4 or channels % 2 or noise.shape != (n, channels // 2, *size):
        raise ValueError(
            f"moments must be [n, 2C, h, w] and noise [n, C, h, w], got {list(moments.shape)} and {list(noise.shape)}"
        )
    mean, log_variance = moments.chunk(2, dim=1)
    return scale * (mean - shift + torch.exp(log_variance.clamp(-30, 20) / 2) * noise)
