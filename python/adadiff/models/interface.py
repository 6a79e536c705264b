"""What the engine asks of a network: blocks made of branches, and a way in and out.

A branch is one residual update, `y = x + gate * branch(norm(x))`. The engine owns the residual stream, so that it can
fuse the sum with the uncertainty score and drop the rows that have left; a network owns everything else.
Everything per sample (time, label, modulation) is computed once per evaluation in `embed`, stays by lane, and is
gathered through `lanes` (i32[n], row -> lane) when a row needs it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from adadiff_kernels import Norm


class Conditioning(Protocol):
    """What `embed` knows about each lane. `time` is the network's own time embedding, float [B, Dt]."""

    time: Tensor


class Branch(Protocol):
    bias: Tensor | None  # [D], what the last product adds and could leave out

    def norm(self, cond: Any) -> Norm: ...

    def gate(self, cond: Any) -> Tensor | None:
        """[B, D] by lane, or None for a plain residual."""

    def __call__(self, h: Tensor, add_bias: bool = True) -> Tensor:
        """h: normalised rows [n, T, D]. Returns fresh rows [n, T, D]; the engine writes its sum over them. Without
        add_bias, which only a branch that has a `bias` is asked for, the engine adds it in the pass of the sum."""


class Block(Protocol):
    branches: Sequence[Branch]
    skip_from: int | None  # index of the block whose output joins this one's input

    def __call__(self, x: Tensor, cond: Any, skip: Tensor | None = None) -> Tensor:
        """The plain block: x, skip [B, T, D], rows in the order of the lanes -> [B, T, D]."""

    def join(self, x: Tensor, skip: Tensor, lanes: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """x, skip: [n, T, D] -> [n, T, D]. Only called where `skip_from` is set.

        With lanes i32 [n] and index i32 [B], skip is as its block wrote it, and row r joins skip[index[lanes[r]]].
        """

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one lane."""


class WholeBlock:
    """To inherit from: a block that is not ours. It makes its sums itself, and the engine scores what it returns."""

    skip_from = None

    def whole(self, x: Tensor, cond: Any, lanes: Tensor) -> Tensor:
        """x: [n, T, D] -> fresh rows [n, T, D]."""
        raise NotImplementedError

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one lane."""
        raise NotImplementedError


class Backbone(Protocol):
    blocks: Sequence[Block | WholeBlock]
    dim: int  # D, channels of a row
    time_dim: int  # Dt, channels of Conditioning.time
    num_prefix_tokens: int  # leading tokens that are not patches
    tokens: int  # T, patches and num_prefix_tokens
    patch_dim: int  # p * p * C, numbers of the noise predicted per patch
    sample_shape: tuple[int, int, int]  # C, H, W
    learned_variance: bool  # heads return 2 C channels: the noise, then v (see adadiff_kernels.solver_step)

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
    """A frozen dataclass that says all about a network but its weights."""

    channels: int  # of what it denoises
    dim: int  # D, channels of a row
    tokens: int  # T, rows of the position embedding
    blocks: int  # L
    num_classes: int  # labels it takes, the null class included; 0 = none
    context_tokens: int  # of text; 0 = none


@dataclass(frozen=True)
class Preset:
    """A published network and what else its `ModelConfig` says, where the fields are explained."""

    network: NetworkConfig
    schedule: str
    null_label: int | None = None
    guided_channels: int | None = None
    latent_scale: float | None = None


@dataclass(frozen=True)
class Family:
    """What a file in this folder adds to the package: a configuration, the network it builds, and published ones."""

    config: type
    network: type
    presets: Mapping[str, Preset]
