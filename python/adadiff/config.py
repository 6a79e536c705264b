"""What a model is, as frozen dataclasses, and the table of presets. Unknown keys are errors."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .exits import ExitConfig
from .models.uvit import UViTConfig
from .schedules import NoiseSchedule

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """`exits` is None for a plain network; `null_label` is the class that stands for "no class" in guidance."""

    network: UViTConfig
    schedule: str
    null_label: int | None = None
    exits: ExitConfig | None = None

    def __post_init__(self) -> None:
        NoiseSchedule(self.schedule)
        if self.null_label is not None and self.null_label != self.network.num_classes - 1:
            raise ValueError(
                f"null_label must be the last of {self.network.num_classes} classes, got {self.null_label}"
            )

    @property
    def classes(self) -> int:
        """Classes that can be asked for; the null class, always the last, is not one of them."""
        return self.network.num_classes - (self.null_label is not None)

    def to_dict(self) -> dict[str, Any]:
        return {"family": "uvit", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        values = dict(values)
        family = values.pop("family", None)
        if family != "uvit":
            raise ValueError(f"unknown network family {family!r}, known: 'uvit'")
        for key, kind in (("network", UViTConfig), ("exits", ExitConfig)):
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


def _pixels(size: int, patch: int, dim: int, depth: int, heads: int, classes: int = 0) -> ModelConfig:
    return ModelConfig(UViTConfig(size, 3, patch, dim, depth, heads, num_classes=classes), "vp")


def _latents(size: int, patch: int, dim: int, depth: int, heads: int, schedule: str, conv: bool) -> ModelConfig:
    network = UViTConfig(size, 4, patch, dim, depth, heads, num_classes=1001, conv=conv)
    return ModelConfig(network, schedule, null_label=1000)


def _text(depth: int) -> ModelConfig:
    return ModelConfig(UViTConfig(32, 4, 2, 512, depth, 8, context_tokens=77), "stable_diffusion")


# baofff/U-ViT configs/*.py; sizes of the latents, not of the images, for the latent models
PRESETS: dict[str, ModelConfig] = {
    "cifar10_uvit_small":      _pixels(32, 2, 512, 12, 8),
    "celeba64_uvit_small":     _pixels(64, 4, 512, 12, 8),
    "imagenet64_uvit_mid":     _pixels(64, 4, 768, 16, 12, classes=1000),
    "imagenet64_uvit_large":   _pixels(64, 4, 1024, 20, 16, classes=1000),
    "imagenet256_uvit_large":  _latents(32, 2, 1024, 20, 16, "vp", conv=True),
    "imagenet256_uvit_huge":   _latents(32, 2, 1152, 28, 16, "stable_diffusion", conv=False),
    "imagenet512_uvit_large":  _latents(64, 4, 1024, 20, 16, "vp", conv=True),
    "imagenet512_uvit_huge":   _latents(64, 4, 1152, 28, 16, "stable_diffusion", conv=False),
    "mscoco_uvit_small":       _text(12),
    "mscoco_uvit_small_deep":  _text(16),
    "digits":                  ModelConfig(
        UViTConfig(8, 1, 2, 64, 12, 4, num_classes=11), "stable_diffusion", null_label=10, exits=ExitConfig()
    ),
    "canvases":                ModelConfig(
        UViTConfig(16, 1, 4, 64, 12, 4, num_classes=15), "stable_diffusion", null_label=14, exits=ExitConfig()
    ),
}  # fmt: skip
