"""The caches of diffusers and of cache-dit around one of our networks, in the form that these packages expect: a module
whose blocks lie in a list and are called one after the other.

Both packages decide for the whole batch. What they replace is a block's call or the list of blocks, so conditioning and
long skips are not handed from call to call but kept in the module. All of it is for one batch in lockstep.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from adadiff.models.interface import Backbone, Block, Conditioning
from benchmarks.baselines.walk import Network

WARM_UP = 3  # first steps without reuse: TaylorSeer's default in diffusers; as many for cache-dit


class _Between:
    """What blocks of one forward pass share besides the rows. skips: output of a block, by its index."""

    def __init__(self) -> None:
        self.cond: Conditioning | None = None
        self.skips: dict[int, Tensor] = {}


class ListedBlock(nn.Module):
    """A block that takes rows [B, T, D] alone."""

    def __init__(self, block: Block, index: int, between: _Between, kept: bool):
        super().__init__()
        self.block, self._index, self._between, self._kept = block, index, between, kept

    def forward(self, hidden_states: Tensor) -> Tensor:
        between, source = self._between, self.block.skip_from
        given = () if source is None else (between.skips[source],)
        rows = self.block(hidden_states, between.cond, *given)
        if self._kept:
            between.skips[self._index] = rows
        return rows


TransformerBlockRegistry.register(
    ListedBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
)


class Listed(nn.Module, CacheMixin):
    """One of our networks for diffusers' hooks and cache-dit; shares its weights. Called like it."""

    _cache_config = None

    def __init__(self, backbone: Backbone):
        super().__init__()
        self._between = _Between()
        self._backbone = (backbone,)  # in a tuple, so that its blocks are not found twice
        sources = {block.skip_from for block in backbone.blocks}
        self.transformer_blocks = nn.ModuleList(
            ListedBlock(block, i, self._between, kept=i in sources) for i, block in enumerate(backbone.blocks)
        )
        self.sample_shape = backbone.sample_shape

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        (backbone,) = self._backbone
        rows, self._between.cond = backbone.embed(x, t, context)
        for block in self.transformer_blocks:
            rows = block(rows)
        lanes = torch.arange(len(x), dtype=torch.int32)
        return backbone.head(rows[:, backbone.num_prefix_tokens :], self._between.cond, lanes)


class Diffusers:
    """A cache of diffusers. Called once at the start of each batch; returns the network for its steps."""

    def __init__(self, backbone: Backbone, config: Any):
        self._module = Listed(backbone)
        self._module.enable_cache(config)

    def __call__(self) -> Network:
        self._module._reset_stateful_cache()
        return self._step

    def _step(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        with self._module.cache_context("batch"):
            return self._module(x, t, context)


def first_block_cache(threshold: float, backbone: Backbone) -> Diffusers:
    return Diffusers(backbone, FirstBlockCacheConfig(threshold=threshold))


def taylor_seer(every: int, backbone: Backbone) -> Diffusers:
    """The last block's output is extrapolated linearly, and no block runs: what diffusers calls its lite mode, which
    saves most."""
    last = len(backbone.blocks) - 1
    config = TaylorSeerCacheConfig(
        cache_interval=every,
        disable_cache_before_step=WARM_UP,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf"transformer_blocks\.{last}"],
        skip_predict_identifiers=[rf"transformer_blocks\.{i}" for i in range(last)],
    )
    return Diffusers(backbone, config)


def mag_cache(threshold: float, ratios: Sequence[float], backbone: Backbone) -> Diffusers:
    """ratios: of `mag_ratios`, one for each step."""
    config = MagCacheConfig(threshold=threshold, num_inference_steps=len(ratios), mag_ratios=list(ratios))
    return Diffusers(backbone, config)


def mag_ratios(backbone: Backbone, steps: int, run: Callable[[Callable[[], Network]], object]) -> list[float]:
    """MagCache's calibration: growth of the blocks' residual from step to step. run: draws a batch with a network that
    is made by the given function. diffusers only prints the result."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(Diffusers(backbone, MagCacheConfig(num_inference_steps=steps, calibrate=True)))
    line = next(line for line in reversed(printed.getvalue().splitlines()) if line.startswith("["))
    ratios = [float(one) for one in line.strip("[] ").split(",")]
    if len(ratios) != steps:
        raise RuntimeError(f"MagCache's calibration gave {len(ratios)} ratios for {steps} steps")
    return ratios


class CacheDiT:
    """cache-dit's DBCache: the first block decides; optionally TaylorSeer extrapolates the residual. Called once at the
    start of each batch; returns the network for its steps."""

    def __init__(self, threshold: float, steps: int, taylor: bool, backbone: Backbone):
        with _quiet():
            import cache_dit
            from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, TaylorSeerCalibratorConfig

            self._refresh, self._steps = cache_dit.refresh_context, steps
            self._module = Listed(backbone)
            cache_dit.enable_cache(
                BlockAdapter(
                    transformer=self._module,
                    blocks=self._module.transformer_blocks,
                    forward_pattern=ForwardPattern.Pattern_3,
                ),
                cache_config=DBCacheConfig(
                    Fn_compute_blocks=1,
                    Bn_compute_blocks=0,
                    max_warmup_steps=WARM_UP,
                    residual_diff_threshold=threshold,
                    num_inference_steps=steps,
                ),
                calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None,
            )

    def __call__(self) -> Network:
        with _quiet():
            self._refresh(self._module, num_inference_steps=self._steps)
        return self._module


@contextmanager
def _quiet() -> Iterator[None]:
    """cache-dit logs every call of its interface."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
