"""What a model is, as frozen dataclasses, and the table of presets. Unknown keys are errors."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .diffusion.schedules import NoiseSchedule
from .models import FAMILIES
from .models.interface import NetworkConfig
from .models.uvit import UViTConfig
from .uem import ExitConfig

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """`exits` is None for a plain network; `null_label` is the class that stands for "no class" in guidance, which
    touches the first `guided_channels` only (None: all); `latent_scale`: latents are the autoencoder's times this
    (None: samples are images)."""

    network: NetworkConfig
    schedule: str
    null_label: int | None = None
    exits: ExitConfig | None = None
    guided_channels: int | None = None
    latent_scale: float | None = None

    def __post_init__(self) -> None:
        NoiseSchedule(self.schedule)
        if self.null_label is not None and self.null_label != self.network.num_classes - 1:
            raise ValueError(
                f"null_label must be the last of {self.network.num_classes} classes, got {self.null_label}"
            )
        if self.guided_channels is not None and not 1 <= self.guided_channels <= self.network.channels:
            raise ValueError(f"guided_channels must lie in 1..{self.network.channels}, got {self.guided_channels}")
        if self.latent_scale is not None and not 0 < self.latent_scale < math.inf:
            raise ValueError(f"latent_scale must be a positive number, got {self.latent_scale}")

    @property
    def family(self) -> str:
        for name, family in FAMILIES.items():
            if isinstance(self.network, family.config):
                return name
        raise ValueError(f"no network family is configured by a {type(self.network).__name__}: {', '.join(FAMILIES)}")

    @property
    def classes(self) -> int:
        """Classes that can be asked for; the null class, always the last, is not one of them."""
        return self.network.num_classes - (self.null_label is not None)

    def to_dict(self) -> dict[str, Any]:
        return {"family": self.family, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        values = dict(values)
        family = values.pop("family", None)
        if family not in FAMILIES:
            raise ValueError(f"unknown network family {family!r}, known: {', '.join(map(repr, FAMILIES))}")
        for key, kind in (("network", FAMILIES[family].config), ("exits", ExitConfig)):
            if values.get(key) is not None:
                values[key] = from_dict(kind, values[key], key)
        return from_dict(cls, values, "model")


def from_dict(kind: type[T], values: Any, what: str) -> T:
    """Builds a dataclass from a mapping; a key it does not have, or one it lacks, is a ValueError that names it."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be a table of values, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)} in {what}; known: {', '.join(fields)}")
    needed = (
        f for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    missing = [f.name for f in needed if f.name not in values]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    return kind(**values)


PRESETS: dict[str, ModelConfig] = {
    name: ModelConfig(**vars(preset)) for family in FAMILIES.values() for name, preset in family.presets.items()
}
PRESETS["digits"] = ModelConfig(
    UViTConfig(8, 1, 2, 64, 12, 4, num_classes=11), "stable_diffusion", null_label=10, exits=ExitConfig()
)
PRESETS["canvases"] = ModelConfig(
    UViTConfig(16, 1, 4, 64, 12, 4, num_classes=21), "stable_diffusion", null_label=20, exits=ExitConfig()
)
