"""What a forward pass with exits needs of a network: blocks, and a way in and out.

Everything about a lane (time, label, modulation) is computed once in a forward pass, by `embed`, and stays by lane; a
block gathers it for its rows. Rows are hidden states [n, T, D] of the n lanes that still run, in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from adadiff_kernels import Norm


class Conditioning(Protocol):
    """What `embed` knows about each lane: a dataclass whose tensors all are by lane, [B, ...]. `time` is the network's
    own time embedding, float [B, Dt]."""

    time: Tensor


class Branch(Protocol):
    """One residual update, y = x + gate * (branch(norm(x)) + bias), in parts, for the fused pass."""

    bias: Tensor | None  # [D], what the last product adds and could leave out
    unit: str  # "attention", "cross" (attention to the context) or "mlp"

    def norm(self, cond: Any) -> Norm | None:
        """None: the branch reads the rows as they are."""

    def gate(self, cond: Any) -> Tensor | None:
        """[B, D] by lane, or None for a plain residual."""

    def __call__(self, h: Tensor, cond: Any, row_to_lane: Tensor | None, add_bias: bool = True) -> Tensor:
        """h: normalised rows [n, T, D] of the lanes row_to_lane, int32 [n]; None: row i carries lane i. Returns fresh
        rows [n, T, D], over which the sum is written. Without add_bias, which only a branch that has a `bias` is asked
        for, the fused pass adds it."""

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
        """The plain block: x [n, T, D] -> fresh rows [n, T, D], in `out` if that is given.

        skip: [n or more, T, D], where `skip_from` is set: row r joins skip[index[r]], int64 or int32 [n], without index
        skip[r]. row_to_lane: int32 [n]; None: row i carries lane i, and there are as many rows as lanes.
        """

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one lane."""


class FusableBlock(Block, Protocol):
    """Its residual sums, scores and norms are one pass on a GPU."""

    branches: Sequence[Branch]

    def join(self, x: Tensor, skip: Tensor, row_to_lane: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """x: [n, T, D] -> [n, T, D], the block's input with its long skip, see `adadiff_kernels.join_skip`. Only asked
        of blocks with `skip_from`."""


class Backbone(Protocol):
    blocks: Sequence[Block]
    dim: int  # D, channels of a row
    time_dim: int  # Dt, channels of Conditioning.time
    num_prefix_tokens: int  # leading tokens that are not patches
    tokens: int  # T, patches and num_prefix_tokens
    patch_dim: int  # p * p * C, numbers predicted per patch
    sample_shape: tuple[int, int, int]  # C, H, W
    learned_variance: bool  # heads return 2 C channels: the prediction, then v (see adadiff_kernels.solver_step)

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Conditioning]:
        """x [B, C, H, W], t float [B], context (labels i64 [B], text [B, N, E] or None) -> rows [B, T, D], contiguous,
        and cond. The context may lie on the CPU beside x on a GPU; only there are its values checked."""

    def head(self, patches: Tensor, cond: Any, lanes: Tensor) -> Tensor:
        """patches [n, T - num_prefix_tokens, D] of the lanes i32 [n] -> prediction [n, C or 2 C, H, W]."""

    def new_head(self) -> nn.Module:
        """A fresh module, called like `head`, for exits with a head of their own."""

    def unpatchify(self, values: Tensor) -> Tensor:
        """values [n, T - num_prefix_tokens, p * p * C] -> [n, C, H, W]."""

    def patchify(self, images: Tensor) -> Tensor:
        """The inverse of `unpatchify`."""

    def stem_and_head_macs(self) -> tuple[int, int]:
        """Multiply-adds for one lane before the blocks and in the head."""


class NetworkConfig(Protocol):
    """A frozen dataclass that says all about a network but its weights. Networks that can be narrow have a `width`,
    the share of heads and MLP channels that there are, default 1."""

    channels: int  # of what it denoises
    dim: int  # D, channels of a row
    tokens: int  # T, rows of the position embedding
    image_size: int  # height and width of what it denoises
    blocks: int  # L
    num_classes: int  # labels it takes, the null class included; 0 = none
    context_tokens: int  # of text; 0 = none
    context_dim: int  # of its embeddings, without meaning where there is none


@dataclass(frozen=True)
class Preset:
    """A published network and what else its `ModelConfig` says, where the fields are explained."""

    network: NetworkConfig
    schedule: str
    null_label: int | None = None
    guided_channels: int | None = None
    latent_scale: float | None = None
    prediction_type: str = "epsilon"
    latent_shift: float = 0.0


@dataclass(frozen=True)
class Family:
    """What a file in this folder adds to the package: a configuration, the network it builds, and published ones."""

    config: type
    network: type
    presets: Mapping[str, Preset]
