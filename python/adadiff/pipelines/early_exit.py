"""Early exit for a DiTPipeline as it is, through its own blocks or through ours. Needs diffusers.

A hook takes the place of the transformer's `forward`: every lane of the call (a sample, or one half of a guided one)
leaves when its rule says so.
"""

from dataclasses import dataclass, field

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

from ..conversion.convert import from_transformer
from ..forward.forward import evaluate
from ..models.dit import DiT
from ..models.interface import WholeBlock
from ..policies.exit_policies import Rule, layers_asked, rule_from
from ..sampling.reports import Totals
from ..uem import ExitConfig, Exits

NAME = "adadiff_early_exit"


@dataclass
class EarlyExit:
    """What an enabled pipeline did so far. exit_layer: int32 [lanes], of the last evaluation."""

    totals: Totals = field(default_factory=Totals)
    exit_layer: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))


def enable_early_exit(
    pipe: DiTPipeline, exits: Exits | None = None, rule: str | Rule = "threshold:0.1", *, fused: bool = False
) -> EarlyExit:
    """From now on, lanes of `pipe` leave by `rule`, scored by `exits`, which were trained for its transformer.

    exits: may be None with rules that read no score, such as "depth:20" or "full"; with heads of their own they need
    `fused`. fused: a copy of the weights runs through our DiT, whose residual sums, scores and norms are one pass and
    whose modulation is one product; otherwise the pipeline's own blocks run. Where nobody leaves, images are those of
    the untouched pipeline: the same bits through its own blocks, within rounding through ours.
    Returns a record that every call adds to. Raises ValueError for another pipeline, exits that do not fit, and a
    pipeline that is enabled already.
    """
    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, DiTTransformer2DModel):
        raise ValueError(f"early exit is for a DiTPipeline, got {type(pipe).__name__}")
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(NAME) is not None:
        raise ValueError("early exit is enabled already; call disable_early_exit first")
    backbone, rule = DiffusersDiT(transformer), rule_from(rule)
    layers_asked(rule, len(backbone.blocks))
    if exits is None and rule.scored:
        raise ValueError(f"{rule} reads scores; give the exits that were trained for this transformer")
    if exits is not None:
        blocks, _, dim = exits.weight.shape
        if (blocks, dim) != (len(backbone.blocks), backbone.dim):
            raise ValueError(
                f"these exits are for {blocks} blocks of {dim} channels, the transformer has {len(backbone.blocks)} "
                f"of {backbone.dim}"
            )
        if exits.heads is not None and not fused:
            raise ValueError(
                "these exits have heads of their own, which a pipeline's blocks do not fit; take fused=True"
            )
    else:
        exits = Exits(backbone, ExitConfig(shared_head=True))  # nobody reads its scores
    if fused:
        backbone = from_transformer(transformer.state_dict(), transformer.config)
        backbone.to(transformer.device, transformer.dtype).requires_grad_(False)
    record = EarlyExit()
    registry.register_hook(_Hook(backbone, exits, rule, record), NAME)
    return record


def disable_early_exit(pipe: DiTPipeline) -> None:
    """Undoes `enable_early_exit`. ValueError where it is not enabled."""
    registry = getattr(getattr(pipe, "transformer", None), "_diffusers_hook", None)
    if registry is None or registry.get_hook(NAME) is None:
        raise ValueError("early exit is not enabled in this pipeline")
    registry.remove_hook(NAME, recurse=False)


class _Hook(ModelHook):
    def __init__(self, backbone: "DiffusersDiT | DiT", exits: Exits, rule: Rule, record: EarlyExit):
        super().__init__()
        self.backbone, self.exits, self.rule, self.record = backbone, exits, rule, record

    def new_forward(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        if timestep is None or class_labels is None or cross_attention_kwargs:
            raise ValueError("early exit takes timestep and class_labels, and no cross_attention_kwargs")
        t = timestep.float()
        # their blocks see the whole call at once, as ever: other shapes would round otherwise
        group = max(1, len(t)) if isinstance(self.backbone, DiffusersDiT) else None
        result = evaluate(self.backbone, self.exits, self.rule, hidden_states, t, class_labels, group=group)
        done = self.record.totals
        self.record.totals = Totals(
            done.ticks + 1,
            done.evaluations + len(t),
            done.blocks + int(result.exit_layer.sum()),
            done.macs + result.macs,
            done.macs_full + result.macs_full,
            done.rows_moved + result.moved,
        )
        self.record.exit_layer = result.exit_layer
        out = result.eps if result.variance is None else torch.cat([result.eps, result.variance], 1)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


@dataclass(frozen=True)
class DiffusersCond:
    """By lane: time and labels as given, and what the first block's embedder makes of the time and of both."""

    t: Tensor
    labels: Tensor
    time: Tensor
    both: Tensor


class DiffusersBlock(WholeBlock):
    def __init__(self, block: nn.Module):
        self._block = block

    def whole(self, x: Tensor, cond: DiffusersCond, lanes: Tensor) -> Tensor:
        lanes = lanes.long()
        return self._block(x, timestep=cond.t[lanes], class_labels=cond.labels[lanes])

    def macs(self, tokens: int) -> int:
        """A block of DiT, with the embedder of time that each of them has."""
        D = self._block.attn1.to_q.in_features
        return 12 * D * D * tokens + 2 * tokens * tokens * D + 7 * D * D + 256 * D


class DiffusersDiT:
    """A `DiTTransformer2DModel` as the engine wants a network."""

    num_prefix_tokens = 0
    learned_variance = False  # the pipeline takes all channels and splits them itself

    def __init__(self, transformer: DiTTransformer2DModel):
        config = transformer.config
        self._transformer, self._patch = transformer, config.patch_size
        self.blocks = [DiffusersBlock(block) for block in transformer.transformer_blocks]
        self.dim = self.time_dim = transformer.inner_dim
        self.tokens = (config.sample_size // config.patch_size) ** 2
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.patch_dim = config.patch_size**2 * config.in_channels

    def embed(self, x: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, DiffusersCond]:
        rows = self._transformer.pos_embed(x)
        embedder = self._transformer.transformer_blocks[0].norm1.emb
        time = embedder.timestep_embedder(embedder.time_proj(t).to(rows.dtype))
        return rows, DiffusersCond(t, context, time, embedder(t, context, hidden_dtype=rows.dtype))

    def head(self, patches: Tensor, cond: DiffusersCond, lanes: Tensor) -> Tensor:
        own = self._transformer
        shift, scale = own.proj_out_1(F.silu(cond.both[lanes.long()])).chunk(2, dim=1)
        values = own.proj_out_2(own.norm_out(patches) * (1 + scale[:, None]) + shift[:, None])
        n, T, _ = values.shape
        side, p = round(T**0.5), self._patch
        pixels = values.view(n, side, side, p, p, own.out_channels).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(n, own.out_channels, side * p, side * p)

    def stem_and_head_macs(self) -> tuple[int, int]:
        D, T = self.dim, self.tokens
        return T * self.patch_dim * D, T * D * self._patch**2 * self._transformer.out_channels + 3 * D * D + 256 * D
