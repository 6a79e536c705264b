"""The interface between networks and forward passes with exits: blocks, stem and head.

`embed` computes everything about a lane (time, label, modulation) once in a forward pass; it is stored by lane, and a
block gathers it for its rows. Rows are hidden states [n, T, D] of the n running lanes, in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from adadiff_kernels import Norm


class Conditioning(Protocol):
    """The conditioning of each lane: a dataclass whose tensors are all by lane, [B, ...]. `time` is the network's time
    embedding, float [B, Dt]."""

    time: Tensor


class Branch(Protocol):
    """One residual update, y = x + gate * (branch(norm(x)) + bias), in parts, for the fused pass."""

    bias: Tensor | None  # [D], bias of the last linear layer, which can leave it out
    unit: str  # "attention", "cross" (attention to the context) or "mlp"

    def norm(self, cond: Any) -> Norm | None:
        """The norm before the branch; None: the branch reads the rows as they are."""

    def gate(self, cond: Any) -> Tensor | None:
        """The gate, [B, D] by lane; None for a plain residual."""

    def __call__(self, h: Tensor, cond: Any, row_to_lane: Tensor | None, add_bias: bool = True) -> Tensor:
        """The branch's output in new memory, [n, T, D], which the fused pass may overwrite. h: normalised rows
        [n, T, D]; row_to_lane: int32 [n], None: row i holds lane i. add_bias: False only for a branch with `bias`,
        which the fused pass then adds."""

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one lane."""


class Block(Protocol):
    skip_from: int | None  # index of the block whose output joins this one's input

    def __call__(
        self,
        x: Tensor,
        cond: Any,
        skip: Tensor | None = None,
        index: Tensor | None = None,
        row_to_lane: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The plain block: x [n, T, D] -> [n, T, D] in new memory, or in `out` if given.

        skip: [n or more, T, D], if `skip_from` is set: row r joins skip[index[r]] or, without index, skip[r]. index:
        int64 or int32 [n]. row_to_lane: int32 [n]; None: row i holds lane i, and there are as many rows as lanes.
        """

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one lane."""


class FusableBlock(Block, Protocol):
    """A block that exposes its branches, so that a GPU runs residual sum, score and norm in one pass."""

    branches: Sequence[Branch]

    def join(self, x: Tensor, skip: Tensor, row_to_lane: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """x: [n, T, D] -> [n, T, D], the block's input joined with its long skip, see `adadiff_kernels.join_skip`. Only
        called if `skip_from` is set."""


class Backbone(Protocol):
    blocks: Sequence[Block]
    dim: int  # D, channels of a row
    time_dim: int  # Dt, channels of Conditioning.time
    num_prefix_tokens: int  # leading tokens that are not patches
    tokens: int  # T, patches and num_prefix_tokens
    patch_dim: int  # p * p * C, values of a patch
    sample_shape: tuple[int, int, int]  # C, H, W
    learned_variance: bool  # heads return 2 C channels: the prediction, then v (see adadiff_kernels.solver_step)

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Conditioning]:
        """The stem: x [B, C, H, W], t float [B], context (labels int64 [B], text [B, N, E] or None) -> rows [B, T, D],
        contiguous, and the conditioning. The context may be on the CPU while x is on a GPU; its values are checked only
        on the CPU. Raises ValueError for other shapes or labels."""

    def head(self, patches: Tensor, cond: Any, lanes: Tensor) -> Tensor:
        """patches [n, T - num_prefix_tokens, D] of lanes int32 [n] -> prediction [n, C or 2 C, H, W]."""

    def new_head(self) -> nn.Module:
        """A new module, called like `head`, for exits with their own heads."""

    def unpatchify(self, values: Tensor) -> Tensor:
        """values [n, T - num_prefix_tokens, p * p * C] -> [n, C, H, W]."""

    def patchify(self, images: Tensor) -> Tensor:
        """The inverse of `unpatchify`."""

    def stem_and_head_macs(self) -> tuple[int, int]:
        """Multiply-adds for one lane in the stem and in the head."""


class NetworkConfig(Protocol):
    """A frozen dataclass that describes a network without its weights. Networks that can be narrow have a `width`, the
    share of heads and MLP channels in use, default 1."""

    channels: int  # of images or latents
    dim: int  # D, channels of a row
    tokens: int  # T, prefix tokens included
    image_size: int  # height and width of images or latents
    blocks: int  # L
    num_classes: int  # number of labels, null class included; 0 = none
    context_tokens: int  # text tokens; 0 = none
    context_dim: int  # channels of text embeddings; unused without text


@dataclass(frozen=True)
class Preset:
    """A published network and the other fields of its `ModelConfig`, which explains them."""

    network: NetworkConfig
    schedule: str
    null_label: int | None = None
    guided_channels: int | None = None
    latent_scale: float | None = None
    prediction_type: str = "epsilon"
    latent_shift: float = 0.0


@dataclass(frozen=True)
class Family:
    """What a network file provides: the configuration class, the network class, and presets of published networks."""

    config: type
    network: type
    presets: Mapping[str, Preset]
