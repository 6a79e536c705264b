"""Configurations of models as frozen dataclasses, and the table of presets. Unknown keys are errors."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shortly
from types import NoneType
from typing import Any, TypeVar

from .diffusion.prediction import check_prediction_type
from .diffusion.schedules import NoiseSchedule
from .models import FAMILIES
from .models.interface import NetworkConfig
from .models.uvit import UViTConfig
from .uem import ExitConfig

T = TypeVar("T")
MOST_WIDTHS = 16


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a model. exits: None for a plain network; null_label: the "no class" label of guidance;
    guided_channels: guidance applies to the first so many channels (None: all); latent_scale: latents are
    (autoencoder's - latent_shift) * latent_scale (None: samples are images); widths: ascending, widths that the network
    was trained at, the last one 1 (None: a network of one width), see forward/narrow.py. prediction_type: epsilon,
    v_prediction, flow or sample, see diffusion/prediction.py. Raises ValueError for fields that do not fit."""

    network: NetworkConfig
    schedule: str
    null_label: int | None = None
    exits: ExitConfig | None = None
    guided_channels: int | None = None
    latent_scale: float | None = None
    widths: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    latent_shift: float = 0.0

    def __post_init__(self) -> None:
        _family(self.network)
        check_prediction_type(self.prediction_type)
        if not NoiseSchedule(self.schedule).has_alpha_bar and self.prediction_type == "epsilon":
            raise ValueError(
                f"schedule {self.schedule!r} begins at pure noise, where epsilon does not determine the image; "
                "prediction_type must be flow, v_prediction or sample"
            )
        if not isinstance(self.exits, ExitConfig | None):
            raise ValueError(f"exits must be an ExitConfig or None, got {shortly(self.exits)}")
        for name in ("null_label", "guided_channels"):
            if type(getattr(self, name)) not in (int, NoneType):
                raise ValueError(f"{name} must be an integer or none, got {shortly(getattr(self, name))}")
        if type(self.latent_scale) not in (int, float, NoneType):
            raise ValueError(f"latent_scale must be a number or none, got {shortly(self.latent_scale)}")
        if self.null_label is not None and self.null_label != self.network.num_classes - 1:
            raise ValueError(
                f"null_label must be the last of {self.network.num_classes} classes, got {self.null_label}"
            )
        if self.guided_channels is not None and not 1 <= self.guided_channels <= self.network.channels:
            raise ValueError(f"guided_channels must lie in 1..{self.network.channels}, got {self.guided_channels}")
        if self.latent_scale is not None and not 0 < self.latent_scale <= sys.float_info.max:
            raise ValueError(f"latent_scale must be a positive number, got {shortly(self.latent_scale)}")
        shift = self.latent_shift
        if type(shift) not in (int, float) or not abs(shift) <= sys.float_info.max:
            raise ValueError(f"latent_shift must be a number, got {shortly(shift)}")
        if shift and self.latent_scale is None:
            raise ValueError("latent_shift is for latents, but without latent_scale the model draws images")
        if self.widths is not None:
            object.__setattr__(self, "widths", _widths(self.widths, self.network))

    @property
    def family(self) -> str:
        return _family(self.network)

    @property
    def classes(self) -> int:
        """The number of classes, without the null class, which is always the last."""
        return self.network.num_classes - (self.null_label is not None)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values. Newer fields at their defaults are left out, so that older releases can
        read the file."""
        values = {"family": self.family, **dataclasses.asdict(self)}
        for name, default in (("width", 1), ("sit_time", False)):
            if values["network"].get(name) == default:
                del values["network"][name]
        if self.widths is None:
            del values["widths"]
        if self.prediction_type == "epsilon":
            del values["prediction_type"]
        if not self.latent_shift:
            del values["latent_shift"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        values = dict(_table(values, "a model's configuration"))
        family = values.pop("family", None)
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(f"unknown network family {shortly(family)}, known: {', '.join(map(repr, FAMILIES))}")
        for key, kind in (("network", FAMILIES[family].config), ("exits", ExitConfig)):
            if key in values and (key == "network" or values[key] is not None):
                values[key] = from_dict(kind, values[key], key)
        return from_dict(cls, values, "model")


def _widths(widths: Any, network: NetworkConfig) -> tuple[float, ...]:
    known = isinstance(widths, list | tuple) and all(type(width) in (int, float) and width == width for width in widths)
    if not known or not 2 <= len(widths) <= MOST_WIDTHS or list(widths) != sorted(set(widths)):
        raise ValueError(f"widths must be 2 to {MOST_WIDTHS} ascending numbers, got {shortly(widths)}")
    if not (widths[0] > 0 and widths[-1] == 1):
        raise ValueError(f"widths must lie in (0, 1] and end with 1, got {shortly(widths)}")
    if getattr(network, "width", None) != 1:
        raise ValueError("widths need a network that has a width, which must be 1")
    return tuple(map(float, widths))


def _family(network: NetworkConfig) -> str:
    for name, family in FAMILIES.items():
        if isinstance(network, family.config):
            return name
    raise ValueError(f"no network family is configured by a {type(network).__name__}: {', '.join(FAMILIES)}")


def from_dict(kind: type[T], values: Any, what: str) -> T:
    """Builds a dataclass from a mapping. Raises ValueError, naming the keys, for unknown or missing ones."""
    _table(values, what)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(map(str, set(values) - set(fields)))
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)} in {what}; known: {', '.join(fields)}")
    needed = (
        f for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    missing = [f.name for f in needed if f.name not in values]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    return kind(**values)


def _table(values: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a table of values, got {shortly(values)}")
    return values


PRESETS: dict[str, ModelConfig] = {
    name: ModelConfig(**vars(preset)) for family in FAMILIES.values() for name, preset in family.presets.items()
}
PRESETS["digits"] = ModelConfig(
    UViTConfig(8, 1, 2, 64, 12, 4, num_classes=11), "stable_diffusion", null_label=10, exits=ExitConfig()
)
PRESETS["canvases"] = ModelConfig(
    UViTConfig(16, 1, 4, 64, 12, 4, num_classes=21), "stable_diffusion", null_label=20, exits=ExitConfig()
)
PRESETS["digits_prototypes"] = ModelConfig(
    UViTConfig(8, 1, 2, 64, 4, 4, num_classes=21), "stable_diffusion", null_label=20
)
PRESETS["letters"] = ModelConfig(
    UViTConfig(32, 1, 4, 128, 12, 4, num_classes=63), "stable_diffusion", null_label=62, exits=ExitConfig()
)
