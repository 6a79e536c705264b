"""Sampling with two networks: a separately trained shallow one at noisy timesteps, the full one at the others (DuoDiff,
arXiv 2410.09633; razvanmatisan/duodiff, README and sampler.py, `--t_switch`)."""

from dataclasses import dataclass
from numbers import Real

import numpy as np

from ..model import Model
from .networks import Network

T_SWITCH = 700.0  # DuoDiff's README: the shallow network runs the first 300 of 1000 steps


@dataclass(frozen=True, eq=False)
class TwoStage:
    """A `NetworkChoice`: lanes at times of `t_switch` and above run all blocks of `shallow_model`, whatever their
    policies; the others run the model."""

    shallow_model: Model
    t_switch: float

    @property
    def networks(self) -> tuple[Network]:
        return (Network(self.shallow_model, asks=False),)

    def choose(self, t: np.ndarray) -> np.ndarray:
        return (t >= self.t_switch).astype(np.int64)


def two_stage(model: Model, shallow_model: Model | None, t_switch: float | None) -> TwoStage | None:
    """The choice that runs `shallow_model` in place of `model` at times of t_switch (default 700) and above; None
    without a shallow model.

    Raises ValueError if the models differ in sample shape, schedule, prediction type and the like, if the shallow model
    is the deeper one, and for a t_switch outside 0..1000 or without a shallow model.
    """
    if shallow_model is None:
        if t_switch is not None:
            raise ValueError("t_switch is where a shallow model hands over to the full one; give shallow_model, too")
        return None
    t_switch = T_SWITCH if t_switch is None else t_switch
    if isinstance(t_switch, bool) or not isinstance(t_switch, Real) or not 0 <= t_switch <= 1000:
        raise ValueError(f"t_switch must be a number in 0..1000, the network's time, got {t_switch!r}")
    check_draws_the_same("shallow model", shallow_model, model)
    if shallow_model.num_layers > model.num_layers:
        raise ValueError(
            f"the shallow model has {shallow_model.num_layers} blocks, the full one {model.num_layers}; "
            "are they swapped?"
        )
    return TwoStage(shallow_model, float(t_switch))


def check_draws_the_same(name: str, other: Model, model: Model) -> None:
    """Raises ValueError if `other`, called `name` in the message, cannot take the place of `model`."""
    ours, theirs = what_it_draws(model), what_it_draws(other)
    wrong = [f"{key} {theirs[key]} instead of {value}" for key, value in ours.items() if theirs[key] != value]
    if wrong:
        raise ValueError(f"the {name} must draw the same samples as the full one; it has {', '.join(wrong)}")


def what_it_draws(model: Model) -> dict[str, object]:
    """The properties that models need in common to take each other's place."""
    config, network = model.config, model.config.network
    parameter = next(model.parameters())
    return {
        "samples of": tuple(model.backbone.sample_shape),
        "schedule": config.schedule,
        "prediction type": config.prediction_type,
        "classes": config.classes,
        "null class": config.null_label,
        "text of": (network.context_tokens, network.context_dim) if network.context_tokens else None,
        "learned variance": model.backbone.learned_variance,
        "latent scale": config.latent_scale,
        "latent shift": config.latent_shift,
        "dtype": parameter.dtype,
        "device": parameter.device,
    }
