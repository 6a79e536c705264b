"""Configuration files of a diffusers folder of a DiT: network, noise schedule and scale of latents."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as shortly
from typing import Any

from ..models.dit import EPS, DiTConfig

REQUIRED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
SIZES = ("sample_size", "in_channels", "patch_size", "attention_head_dim", "num_attention_heads", "num_layers")
# Settings without effect in evaluation. Those in NEUTRAL, of the old `Transformer2DModel`, only at these values.
WITHOUT_EFFECT = ("dropout", "norm_num_groups", "upcast_attention")
NEUTRAL = {
    **dict.fromkeys(("cross_attention_dim", "num_vector_embeds", "caption_channels"), (None,)),
    **dict.fromkeys(("use_linear_projection", "only_cross_attention", "double_self_attention"), (None, False)),
    "use_additional_conditions": (None, False),
    "attention_type": (None, "default"),
    "interpolation_scale": (None, 1),
}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "linear": LINEAR,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
SCHEDULER: Mapping[str, tuple[Any, ...]] = {  # values that the noise schedule requires
    "num_train_timesteps": (1000,),
    "prediction_type": ("epsilon",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
    "use_flow_sigmas": (False, None),
    "snr_shift_scale": (1, None),
    "timestep_type": ("discrete", None),
}
AUTOENCODER: Mapping[str, tuple[Any, ...]] = {
    "shift_factor": (None, 0),
    "latents_mean": (None,),
    "latents_std": (None,),
}


def served_network(theirs: Mapping[str, Any], file: Path, as_diffusers: bool) -> DiTConfig:
    """The network of the config.json beside `file`. as_diffusers: with the time embedding and norm epsilon of
    diffusers; else of facebookresearch/DiT. ValueError for a network that our DiT cannot represent."""
    beside = f"in the config.json beside {file}"
    for name, value in REQUIRED.items():
        if theirs.get(name) != value:
            raise ValueError(f"{name} must be {value!r} {beside}, got {shortly(theirs.get(name))}")
    needed = [name for name in (*SIZES, "num_embeds_ada_norm", "norm_eps") if theirs.get(name) is None]
    if needed:
        raise ValueError(f"the config.json beside {file} lacks {', '.join(needed)}")
    for name in (*SIZES, "num_embeds_ada_norm", "out_channels"):
        value = theirs.get(name)
        if (type(value) is not int or value < 1) and not (name == "out_channels" and value is None):
            raise ValueError(f"{name} must be a positive integer {beside}, got {shortly(value)}")
    eps = theirs["norm_eps"]
    if type(eps) is not float or not math.isfinite(eps):
        raise ValueError(f"norm_eps must be a number {beside}, got {shortly(eps)}")
    known = {*REQUIRED, *SIZES, *WITHOUT_EFFECT, "num_embeds_ada_norm", "norm_eps", "out_channels"}
    for name in theirs.keys() - known:
        if not name.startswith("_") and theirs[name] not in NEUTRAL.get(name, ()):
            raise ValueError(f"{name} is {shortly(theirs[name])} {beside}, which may change what a DiT computes")
    size, channels, patch, width, heads, depth = (theirs[name] for name in SIZES)
    if theirs.get("_class_name") == "Transformer2DModel" and size >= 128 and theirs.get("interpolation_scale") is None:
        raise ValueError(f"sample_size is {size} {beside}, for which a Transformer2DModel stretches its positions")
    outputs = theirs.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"out_channels must be {channels} or {2 * channels}, got {outputs}")
    return DiTConfig(
        *(size, channels, patch, width * heads, depth, heads),
        num_classes=theirs["num_embeds_ada_norm"] + 1,
        learned_variance=outputs != channels,
        frequency_shift=1 if as_diffusers else 0,
        mlp_norm_eps=eps if as_diffusers else EPS,
    )


def served_schedule(scheduler: Mapping[str, Any]) -> str:
    """Name of the noise schedule of a scheduler_config.json. ValueError for one that is not supported."""
    _check_settings(scheduler, SCHEDULER, "the scheduler")
    for schedule, settings in SCHEDULES.items():
        if all(scheduler.get(name) == value for name, value in settings.items()):
            return schedule
    given = {name: scheduler.get(name) for name in ("beta_schedule", "beta_start", "beta_end")}
    raise ValueError(f"the scheduler's {shortly(given)} is no schedule of ours: {SCHEDULES}")


def served_scale(autoencoder: Mapping[str, Any]) -> float | None:
    """The factor by which latents are multiplied (`scaling_factor`), from the config.json of an autoencoder."""
    _check_settings(autoencoder, AUTOENCODER, "the autoencoder")
    scale = autoencoder.get("scaling_factor")
    if scale is not None and type(scale) not in (int, float):
        raise ValueError(f"scaling_factor of the autoencoder must be a number, got {shortly(scale)}")
    return scale


def one_preset(fitting: Sequence[str], preset: str | None, file: Path, compared: str) -> str:
    """`preset` if it is among `fitting`, or the only one in `fitting`. ValueError otherwise. compared: what was
    compared, for the message."""
    if preset is None and len(fitting) == 1:
        return fitting[0]
    if preset is None or preset not in fitting:
        named = "" if preset is None else f"{file} is not of preset {preset}: "
        raise ValueError(f"{named}presets of its {compared}: {', '.join(fitting) or 'none'}; name one of them")
    return preset


def _check_settings(given: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]], what: str) -> None:
    for name, values in wanted.items():
        if name in given and given[name] not in values:
            raise ValueError(f"{name} of {what} must be {values[0]!r}, got {shortly(given[name])}")
