"""What all networks here share: square images are cut into square patches, which become tokens of a transformer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .layers import check_integers, patchify, unpatchify


@dataclass(frozen=True)
class PatchConfig:
    """Sizes that every network has. `depth` is the number of blocks, without U-ViT's middle block. Raises ValueError
    for invalid sizes."""

    image_size: int  # height and width of the images or, for a latent model, of the latents
    channels: int
    patch: int
    dim: int  # D, channels of a row
    depth: int
    heads: int

    DIM_STEP: ClassVar[int] = 4  # dim is a multiple of it: sines and cosines of columns and rows

    def __post_init__(self) -> None:
        check_integers(self, 1, "image_size", "dim", "heads")
        check_integers(self, 1, "channels", "patch", "depth", most=1024)
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.dim % self.heads or self.dim % self.DIM_STEP:
            raise ValueError(f"dim {self.dim} must be a multiple of heads {self.heads} and of {self.DIM_STEP}")

    @property
    def side(self) -> int:
        """Patches per row."""
        return self.image_size // self.patch

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def tokens(self) -> int:
        """T: prefix tokens and patches."""
        return self.patches

    @property
    def positions(self) -> int:
        """The number of tokens with a position embedding."""
        return self.tokens

    @property
    def blocks(self) -> int:
        return self.depth

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.patch**2 * self.channels

    @property
    def outputs(self) -> int:
        """Values that the head predicts per patch."""
        return self.patch_dim


class PatchNetwork(nn.Module):
    """The members of `Backbone` that follow from the sizes."""

    num_prefix_tokens = 0
    learned_variance = False

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def time_dim(self) -> int:
        return self.config.dim

    @property
    def tokens(self) -> int:
        return self.config.tokens

    @property
    def patch_dim(self) -> int:
        return self.config.patch_dim

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.config.channels, self.config.image_size, self.config.image_size

    def unpatchify(self, values: Tensor) -> Tensor:
        return unpatchify(values, self.config.patch)

    def patchify(self, images: Tensor) -> Tensor:
        return patchify(images, self.config.patch)


class ModulatedNetwork(PatchNetwork):
    """A network whose blocks and head are modulated by lane: DiT and its successors. Its head is `final_layer`."""

    final_layer: nn.Module
    blocks: nn.ModuleList

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> tuple[Tensor, Any]:
        raise NotImplementedError

    @property
    def head(self) -> nn.Module:
        return self.final_layer

    def new_head(self) -> nn.Module:
        return type(self.final_layer)(self.config)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The plain network at full depth: x [B, C, H, W], t float [B], context as `embed` takes it ->
        [B, C or 2 C, H, W]."""
        rows, cond = self.embed(x, t, context)
        for block in self.blocks:
            rows = block(rows, cond)
        return self.head(rows[:, self.num_prefix_tokens :], cond, torch.arange(len(x), device=x.device))
