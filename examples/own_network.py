"""Describe a network of your own in one file, train it with exits, and draw with early exit.

    python examples/own_network.py

A small U-ViT: patches and a time token, blocks, and long skips from the first half to the second. Blocks that also show
their `branches` are run in fused passes on a GPU; see python/adadiff/models/interface.py. After a training so short, a
few pixels lie far outside [-1, 1]; picture files clamp them.

Takes 16 s of CPU time and prints (the last number differs a little from machine to machine):

    16 samples in ... s (.../s); 3.50 of 5 blocks a step (70.0%), 67.4% of the multiply-adds...
    images [16, 1, 8, 8]: 96% of the values within [-1.1, 1.1]
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import adadiff
from adadiff.config import PRESETS, ModelConfig
from adadiff.models import FAMILIES
from adadiff.models.interface import Family
from adadiff.models.layers import Attention, Mlp, PatchEmbed, patchify, timestep_embedding, unpatchify
from adadiff.training.config import TrainConfig
from adadiff.training.trainer import Trainer
from adadiff.uem import ExitConfig


@dataclass(frozen=True)
class MyConfig:
    image_size: int = 8
    channels: int = 1
    patch: int = 2
    dim: int = 48
    blocks: int = 5
    num_classes: int = 0  # of labels; this network takes none
    context_tokens: ClassVar[int] = 0  # of text
    context_dim: ClassVar[int] = 0

    @property
    def tokens(self) -> int:
        return 1 + (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class MyConditioning:
    time: Tensor  # [B, D], what `embed` knows of each lane


class MyBlock(nn.Module):
    def __init__(self, dim: int, skip_from: int | None):
        super().__init__()
        self.skip_from, self.dim = skip_from, dim
        self.skip = None if skip_from is None else nn.Linear(2 * dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, 3, True), Mlp(dim, 4 * dim)

    def forward(self, x, cond, skip=None, index=None, row_to_lane=None, out=None):
        if self.skip is not None:  # rows of the block that it skips from: row r joins skip[index[r]]
            x = self.skip(torch.cat([x, skip if index is None else skip.index_select(0, index)], -1))
        x = x + self.attn(self.norm1(x))
        return torch.add(x, self.mlp(self.norm2(x)), out=out)

    def macs(self, tokens: int) -> int:
        return self.attn.macs(tokens) + self.mlp.macs(tokens) + (0 if self.skip is None else 2 * self.dim**2 * tokens)


class MyHead(nn.Sequential):
    def __init__(self, config: MyConfig):
        super().__init__(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.patch**2 * config.channels))
        self.patch = config.patch

    def forward(self, patches: Tensor, cond: MyConditioning, lanes: Tensor) -> Tensor:
        return unpatchify(super().forward(patches), self.patch)


class MyNetwork(nn.Module):
    num_prefix_tokens, learned_variance = 1, False  # the time token is no patch

    def __init__(self, config: MyConfig):
        super().__init__()
        self.config, L = config, config.blocks
        self.dim = self.time_dim = config.dim
        self.tokens, self.patch_dim = config.tokens, config.patch**2 * config.channels
        self.sample_shape = config.channels, config.image_size, config.image_size
        self.stem = PatchEmbed(config.channels, config.dim, config.patch)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, config.tokens, config.dim))
        self.blocks = nn.ModuleList(MyBlock(config.dim, L - 1 - i if 2 * i > L - 1 else None) for i in range(L))
        self.head = self.new_head()

    def embed(self, x: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, MyConditioning]:
        time = timestep_embedding(t, self.dim).to(self.pos_embed.dtype)
        return torch.cat([time[:, None], self.stem(x.to(time.dtype))], 1) + self.pos_embed, MyConditioning(time)

    def new_head(self) -> MyHead:
        return MyHead(self.config)

    def patchify(self, images: Tensor) -> Tensor:
        return patchify(images, self.config.patch)

    def unpatchify(self, values: Tensor) -> Tensor:
        return unpatchify(values, self.config.patch)

    def stem_and_head_macs(self) -> tuple[int, int]:
        return 2 * ((self.tokens - 1) * self.dim * self.patch_dim,)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        (rows, cond), outputs = self.embed(x, t, context), []
        for block in self.blocks:
            rows = block(rows, cond, None if block.skip_from is None else outputs[block.skip_from])
            outputs.append(rows)
        return self.head(rows[:, 1:], cond, torch.arange(len(x)))


FAMILIES["mine"] = Family(MyConfig, MyNetwork, {})  # from here on files of it can be saved and loaded
PRESETS["mine"] = ModelConfig(MyConfig(), "stable_diffusion", exits=ExitConfig())


def main(steps: int = 400) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig("mine", "digits", steps=steps, warmup=50, label_drop=0.0, loss="supervised")
        model = adadiff.load(Trainer(config, Path(folder)).run())
    images, report = adadiff.sample(model, 16, steps=20, policy="exit:depth=3.5", batch=16)
    print(report)
    near = (images.abs() <= 1.1).float().mean()  # values are nominally in [-1, 1], and not clipped
    print(f"images {list(images.shape)}: {near:.0%} of the values within [-1.1, 1.1]")


if __name__ == "__main__":
    main()
