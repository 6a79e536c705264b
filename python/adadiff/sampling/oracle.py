"""The oracle of a cascade: a small discriminator of real images and a student's, which looks at one finished image.

Not the metric by which samples are judged: another network, trained for another purpose. A score is a logit, the
larger the more the image looks real (as DiffServe's, MLSys 2025; ImageReward in Starodubcev et al., CVPR 2024).
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class OracleConfig:
    """Images [channels, image_size, image_size] of `classes` classes (0: none are told). width: channels of the first
    convolution."""

    channels: int
    image_size: int
    classes: int
    width: int = 24

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "classes" else 1
            if type(value) is not int or not least <= value <= 2**16:
                raise ValueError(f"{name} of an oracle must be an integer from {least} to {2**16}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Oracle(nn.Module):
    """Three convolutions, the second and third halving the image, and two linear layers; a class adds its own vector to
    the hidden layer. No layer looks across the batch."""

    def __init__(self, config: OracleConfig):
        super().__init__()
        self.config, w = config, config.width
        side = -(-config.image_size // 2)
        side = -(-side // 2)
        self.convolutions = nn.Sequential(
            nn.Conv2d(config.channels, w, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * w, 2 * w, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.hidden = nn.Linear(2 * w * side * side, 2 * w)
        self.label = nn.Embedding(config.classes + 1, 2 * w) if config.classes else None
        self.score = nn.Linear(2 * w, 1)

    def forward(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """images: float32 [N, C, H, W]; labels: int64 [N], `classes` for none, or None where classes are not told.
        Returns logits, float32 [N]."""
        hidden = self.hidden(self.convolutions(images).flatten(1))
        if self.label is not None:
            hidden = hidden + self.label(labels)
        return self.score(F.silu(hidden)).squeeze(1)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        total, side = 0, self.config.image_size
        for layer in self.convolutions:
            if isinstance(layer, nn.Conv2d):
                side = -(-side // layer.stride[0])
                total += layer.weight.numel() * side * side
        return total + self.hidden.weight.numel() + self.score.weight.numel()


def oracle_labels(config: OracleConfig, labels: Tensor | None, n: int, device: torch.device) -> Tensor | None:
    """What an oracle is told of n samples with these labels: int64 [n], None for no class. A null class of the model,
    whose number is `classes`, is none, too."""
    if not config.classes:
        return None
    if labels is None:
        return torch.full((n,), config.classes, dtype=torch.int64, device=device)
    return labels.to(device)
