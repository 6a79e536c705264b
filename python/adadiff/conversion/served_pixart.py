"""Configuration files of a diffusers folder of a PixArt."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shortly
from typing import Any

from ..config import PRESETS, ModelConfig
from ..models.pixart import EPS, PixArtConfig
from .served import SIZES, WITHOUT_EFFECT, one_preset, served_scale, served_schedule

CLASS = "PixArtTransformer2DModel"
REQUIRED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_single",
    "norm_eps": EPS,
}
NEUTRAL = {"use_additional_conditions": (None, False), "attention_type": (None, "default")}
READ = ("out_channels", "caption_channels", "cross_attention_dim", "interpolation_scale", "num_embeds_ada_norm")


def served_pixart(theirs: Mapping[str, Any], file: Path) -> PixArtConfig:
    """The network of the config.json beside `file`, with the number of text tokens of PixArt-alpha. ValueError for one
    that our PixArt cannot represent, such as those of 1024 pixels, which are conditioned on the picture's size."""
    beside = f"in the config.json beside {file}"
    for name, value in REQUIRED.items():
        if theirs.get(name) != value:
            raise ValueError(f"{name} must be {value!r} {beside}, got {shortly(theirs.get(name))}")
    for name in (*SIZES, "caption_channels"):
        if type(theirs.get(name)) is not int or theirs[name] < 1:
            raise ValueError(f"{name} must be a positive integer {beside}, got {shortly(theirs.get(name))}")
    known = {*REQUIRED, *SIZES, *WITHOUT_EFFECT, *READ}
    for name in theirs.keys() - known:
        if not name.startswith("_") and theirs[name] not in NEUTRAL.get(name, ()):
            raise ValueError(f"{name} is {shortly(theirs[name])} {beside}, which is not read")
    size, channels, patch, width, heads, depth = (theirs[name] for name in SIZES)
    if size == 128 and theirs.get("use_additional_conditions") is None:
        raise ValueError(
            f"sample_size is 128 {beside}: such networks are conditioned on the picture's size, which is not supported"
        )
    if (cross := theirs.get("cross_attention_dim")) != width * heads:
        raise ValueError(f"cross_attention_dim must be {width * heads} {beside}, got {shortly(cross)}")
    outputs = theirs.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"out_channels must be {channels} or {2 * channels}, got {shortly(outputs)}")
    scale = theirs.get("interpolation_scale")
    return PixArtConfig(
        *(size, channels, patch, width * heads, depth, heads),
        context_dim=theirs["caption_channels"],
        learned_variance=outputs != channels,
        interpolation=max(size // 64, 1) if scale is None else scale,
    )


def pixart_config(
    network: PixArtConfig,
    file: Path,
    preset: str | None,
    scheduler: Mapping[str, Any] | None,
    autoencoder: Mapping[str, Any] | None,
) -> tuple[ModelConfig, str]:
    """The configuration of a folder and its preset, which gives the number of text tokens. ValueError if folder and
    preset disagree, or if not exactly one preset fits."""
    scale = None if autoencoder is None else served_scale(autoencoder)
    schedule = None if scheduler is None else served_schedule(scheduler)
    fitting = [
        name
        for name, config in PRESETS.items()
        if isinstance(config.network, PixArtConfig)
        and replace(config.network, context_tokens=network.context_tokens) == network
        and scale in (None, config.latent_scale)
        and schedule in (None, config.schedule)
    ]
    preset = one_preset(fitting, preset, file, "network, schedule and autoencoder")
    return PRESETS[preset], preset
