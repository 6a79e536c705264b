"""The oracle of a cascade: a small discriminator between real images and a student's, applied to one finished image.

It is not used as a metric of sample quality. Its score is a logit, larger for images that look more real (as in
DiffServe, MLSys 2025; Starodubcev et al., CVPR 2024, use ImageReward).
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class OracleConfig:
    """For images [channels, image_size, image_size] of `classes` classes (0: not class-conditional). width: channels of
    the first convolution. Raises ValueError for numbers out of range."""

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
    """Three convolutions, the second and third with stride 2, and two linear layers; a class adds its embedding to the
    hidden layer. No layer mixes images of the batch."""

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
        """Logits, float32 [N]. images: float32 [N, C, H, W]; labels: int64 [N], `classes` for no class; None if not
        class-conditional."""
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
    """The oracle's labels for n samples, int64 [n]; None if it is not class-conditional. labels: int64 [n], or None for
    no class. The model's null class has the number `classes`, the oracle's "no class"."""
    if not config.classes:
        return None
    if labels is None:
        return torch.full((n,), config.classes, dtype=torch.int64, device=device)
    return labels.to(device)
