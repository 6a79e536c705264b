"""Checks the settings stored in a training checkpoint against the configuration it is converted with.

The settings are the arguments of the training: of DiT's train.py and its relatives, and of DuoDiff's main.py. They
cover what shapes do not show: what the network predicts, its time input, its attention heads.
"""

from collections.abc import Iterator, Mapping
from reprlib import repr as shortly
from typing import Any

from ..config import ModelConfig

PREDICTION = (  # names of a setting for what the network predicts
    *("prediction", "prediction_type", "parametrization", "parameterization", "objective", "pred", "pred_type"),
    "model_mean_type",
)
VELOCITY = ("velocity", "v", "flow")
NOISE = ("noise", "epsilon", "eps", "noise_pred", "pred_noise", "predict_noise", "pred_epsilon", "predict_epsilon")
FLAGS = {  # that must be off
    "predict_xstart": "the network predicts the image",
    "predict_v": "the network predicts the velocity",
    "rescale_betas_zero_snr": "the noise schedule is rescaled",
}
TIMESTEPS = ("num_timesteps", "num_train_timesteps", "diffusion_steps", "num_diffusion_timesteps")
SCHEDULE = ("noise_schedule", "beta_schedule")
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "squaredcos_cap_v2": "cosine",
    "scaled_linear": "stable_diffusion",
    "sqrt_linear": "stable_diffusion",
}
OTHERS = ("sit", "lightningdit")  # networks with the shapes of DiT and another time input
KINDS = {  # layouts with exits -> schedules that their code can train with
    "official": ("vp", "stable_diffusion"),
    "duodiff": ("linear",),
}


def contradictions(settings: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """Why a file with these settings does not hold a network of `config`: a sentence for each setting."""
    return [f"{name} is {shortly(settings[name])}, {why}" for name, why in _contradictions(settings, config)]


def _contradictions(settings: Mapping[str, Any], config: ModelConfig) -> Iterator[tuple[str, str]]:
    sit = getattr(config.network, "sit_time", False)
    for name in PREDICTION:
        if isinstance(value := settings.get(name), str) and value.lower() not in (VELOCITY if sit else NOISE):
            yield name, f"and networks of this configuration predict the {'velocity' if sit else 'noise'}"
    for name, why in FLAGS.items():
        if _is_true(settings.get(name)):
            yield name, f"so {why}, which is not supported"
    if (path := settings.get("path_type")) is not None and not (sit and path == "Linear"):
        reason = "but only the linear path of SiT is supported" if sit else "a setting of SiT; name a preset of SiT"
        yield "path_type", reason
    if isinstance(value := settings.get("model"), str) and value.lower().startswith(OTHERS[sit:]):
        yield "model", "which has another time input than the network of this configuration"
    for name in TIMESTEPS:
        if (value := settings.get(name)) is not None and str(value) != "1000":
            yield name, "and there are 1000 timesteps in every schedule of ours"
    for name in SCHEDULE:
        if isinstance(value := settings.get(name), str) and SCHEDULES.get(value) != config.schedule:
            yield name, f"the configuration has schedule {config.schedule}"
    if settings.get("normalize_timesteps") is not None:  # DuoDiff's
        divisor = getattr(config.network, "time_divisor", 1)
        if _is_true(settings["normalize_timesteps"]) != (divisor == 1000):
            yield "normalize_timesteps", f"the configuration has time_divisor {divisor}"
        if config.schedule != "linear":
            yield "normalize_timesteps", f"a setting of DuoDiff, which trains with linear, not {config.schedule}"
    for name, field, default in (("num_heads", "heads", None), ("learn_sigma", "learned_variance", False)):
        expected = getattr(config.network, field, default)
        if (value := settings.get(name)) is not None and str(value) != str(expected):
            yield name, f"the configuration has {field} {expected}"


def assumed(layout: str, settings: Mapping[str, Any], config: ModelConfig) -> str | None:
    """The assumption made for a file whose settings do not decide between DiT and SiT, which have the same tensors; or
    None."""
    decided = {*PREDICTION, "model"} & settings.keys()
    if layout != "plain" or config.family != "dit" or decided:
        return None
    return "a DiT, which predicts the noise; a SiT would have the same tensors"


def other_kind(layout: str, config: ModelConfig) -> str | None:
    """Why a file of this layout cannot be of `config`, or None."""
    if config.family != "uvit":
        return None  # shapes are enough
    known = KINDS.get(layout)
    if known is not None and config.schedule not in known:
        return f"networks of layout {layout} are trained with schedule {' or '.join(known)}, not {config.schedule}"
    if layout == "official" and getattr(config.network, "time_divisor", 1) != 1:
        return "networks of layout official read the timestep itself, those of this configuration a fraction of it"
    return None


def _is_true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.lower() == "true")
