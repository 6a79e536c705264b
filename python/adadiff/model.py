"""The model: a network with its exits and configuration, which is built, trained, saved and sampled from."""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Size, nn

from .config import PRESETS, ModelConfig
from .diffusion.schedules import NoiseSchedule
from .models import FAMILIES
from .policies.calibrated import Calibration
from .policies.step_selector import StepSelector
from .uem import ExitConfig, Exits


class Model(nn.Module):
    """A network with exits. backbone: has the published state-dict keys; exits: None for a plain network; calibration,
    step_selector: None until created by `adadiff calibrate` and `adadiff train-steps`."""

    @torch.inference_mode(False)  # callers in any mode use the weights
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.backbone = FAMILIES[config.family].network(config.network)
        self.exits = Exits(self.backbone, config.exits) if config.exits is not None else None
        self.calibration: Calibration | None = None
        self.step_selector: StepSelector | None = None

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule(self.config.schedule)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def num_layers(self) -> int:
        return len(self.backbone.blocks)


def build(name: str, exits: ExitConfig | None = None) -> Model:
    """A newly initialised model of a preset, in eval mode. exits: adds UEMs and heads to a preset without, or replaces
    its own.

    Raises ValueError for a name that is not a preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}, known: {', '.join(PRESETS)}")
    config = PRESETS[name]
    if exits is not None:
        config = dataclasses.replace(config, exits=exits)
    return Model(config).eval()


@lru_cache(maxsize=256)
def shapes(config: ModelConfig) -> Mapping[str, Size]:
    """The shapes of the tensors in a `Model(config)`, by name."""
    with torch.device("meta"):
        return {key: value.shape for key, value in Model(config).state_dict().items()}
