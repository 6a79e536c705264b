"""Configuration files of a diffusers folder of an MMDiT, the network of Stable Diffusion 3."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shortly
from typing import Any

from ..config import PRESETS, ModelConfig
from ..models.mmdit import MMDiTConfig
from .served import one_preset

CLASS = "SD3Transformer2DModel"
SIZES = (
    *("sample_size", "in_channels", "patch_size", "attention_head_dim", "num_attention_heads", "num_layers"),
    *("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size"),
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {"qk_norm": (None,), "dual_attention_layers": (None, (), [])}
SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def served_mmdit(theirs: Mapping[str, Any], file: Path) -> MMDiTConfig:
    """The network of the config.json beside `file`, with the number of text tokens of SD3. ValueError for one that our
    MMDiT cannot represent, such as Stable Diffusion 3.5."""
    beside = f"in the config.json beside {file}"
    for name in SIZES:
        if type(theirs.get(name)) is not int or theirs[name] < 1:
            raise ValueError(f"{name} must be a positive integer {beside}, got {shortly(theirs.get(name))}")
    for name in theirs.keys() - {*SIZES, "out_channels"}:
        if not name.startswith("_") and theirs[name] not in NEUTRAL.get(name, ()):
            raise ValueError(f"{name} is {shortly(theirs[name])} {beside}, which is not read")
    size, channels, patch, width, heads, depth, text, projected, pooled, side = (theirs[name] for name in SIZES)
    if projected != width * heads:
        raise ValueError(f"caption_projection_dim must be {width * heads} {beside}, got {projected}")
    if theirs.get("out_channels", channels) != channels:
        raise ValueError(f"out_channels must be {channels} {beside}, got {shortly(theirs['out_channels'])}")
    return MMDiTConfig(
        *(size, channels, patch, width * heads, depth, heads),
        context_dim=text,
        pooled_dim=pooled,
        position_side=side,
        position_base=size // patch,
    )


def mmdit_config(
    network: MMDiTConfig,
    file: Path,
    preset: str | None,
    scheduler: Mapping[str, Any] | None,
    autoencoder: Mapping[str, Any] | None,
) -> tuple[ModelConfig, str]:
    """The configuration of a folder and its preset, which gives the number of text tokens. ValueError if folder and
    preset disagree, or if not exactly one preset fits."""
    if scheduler is not None and scheduler.get("_class_name") not in (None, SCHEDULER):
        raise ValueError(f"the scheduler must be a {SCHEDULER}, got {shortly(scheduler.get('_class_name'))}")
    latents = autoencoder or {}
    fitting = [
        name
        for name, config in PRESETS.items()
        if isinstance(config.network, MMDiTConfig)
        and replace(config.network, context_tokens=network.context_tokens) == network
        and latents.get("scaling_factor") in (None, config.latent_scale)
        and latents.get("shift_factor", config.latent_shift) == config.latent_shift
    ]
    preset = one_preset(fitting, preset, file, "network and autoencoder")
    return PRESETS[preset], preset
