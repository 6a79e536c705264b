"""Early exit in diffusers' DiTPipeline, through its own blocks or our DiT: `enable` with an exit policy.

A hook replaces the transformer's `forward`: every lane of the call (a sample, or one half of a guided one) exits by the
policy.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

from ..conversion.convert import from_transformer
from ..forward.forward import forward
from ..forward.options import ExecutionOptions
from ..models.dit import DiT
from ..policies.interface import ExitPolicy, exit_layers_of
from ..policies.spelling import policy_from
from ..sampling.reports import Totals
from ..uem import ExitConfig, Exits
from .copies import Copy
from .private import HookRegistry, ModelHook

NAME = "adadiff_early_exit"
WHOLE = 2**31  # lanes, more than any call has


@dataclass
class EarlyExit:
    """Record of an enabled pipeline. totals: counters of all calls; exit_layer: int32 [lanes], of the last forward
    pass."""

    totals: Totals = field(default_factory=Totals)
    exit_layer: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32, device="cpu"))
    num_blocks: int = 0

    def summary(self) -> str:
        done, layers = self.totals, self.exit_layer.tolist()
        share = done.blocks / (done.passes * self.num_blocks) if done.passes else 1.0
        return (
            f"transformer: early exit, {self.num_blocks} blocks\nlast call: lanes left after blocks {layers}\n"
            f"{1 - share:.1%} of the blocks left out in {done.ticks} calls"
        )


def enable_early_exit(
    pipe: DiTPipeline | DiTTransformer2DModel,
    policy: str | ExitPolicy,
    exits: Exits | None = None,
    *,
    fused: bool = False,
) -> EarlyExit:
    """`enable` for exit policies: lanes of `pipe` exit by `policy`, scored by `exits`, which were trained for its
    transformer.

    exits: may be None for policies without scores, such as "exit:depth=20" or "full"; exits with their own heads need
    `fused`. fused: run a copy of the weights in our DiT, which fuses residual sums, scores and norms on a GPU and
    computes all modulation in one matrix product; otherwise the pipeline's own blocks run. If no lane exits, images
    equal those of the untouched pipeline: bit for bit through its own blocks, within rounding through ours.
    The transformer may change afterwards (loaded or edited weights, `to` another device or dtype); the copy is renewed
    at the next call.
    Returns a record that every call adds to. Raises ValueError for another pipeline and exits that do not fit.
    """
    transformer = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "transformer", None)
    if not isinstance(transformer, DiTTransformer2DModel):
        raise ValueError(f"policy '{policy}' is for a DiTPipeline, got {type(pipe).__name__}")
    backbone = DiffusersDiT(transformer)
    policy = policy_from(policy)
    exit_layers_of(policy, len(backbone.blocks))
    if exits is None and policy.needs_scores:
        raise ValueError(f"{policy} reads scores; give the exits that were trained for this transformer")
    if exits is not None:
        blocks, _, dim = exits.weight.shape
        if (blocks, dim) != (len(backbone.blocks), backbone.dim):
            raise ValueError(
                f"these exits are for {blocks} blocks of {dim} channels, the transformer has {len(backbone.blocks)} "
                f"of {backbone.dim}"
            )
        if exits.heads is not None and not fused:
            raise ValueError(
                "these exits have their own heads, which do not work with a pipeline's blocks; use fused=True"
            )
    else:
        with torch.device("cpu"):
            exits = Exits(backbone, ExitConfig(shared_head=True))  # its scores are not used
    hook = _Hook(transformer, backbone, exits, policy, fused)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, NAME)
    return hook.record


def record_of(transformer: nn.Module) -> EarlyExit | None:
    """The record of an enabled transformer; None if early exit is not enabled."""
    registry = getattr(transformer, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(NAME)
    return None if hook is None else hook.record


def disable_early_exit(transformer: DiTTransformer2DModel) -> None:
    transformer._diffusers_hook.remove_hook(NAME, recurse=False)


class _Hook(ModelHook):
    """The hook of a transformer. backbone, exits: of the present call, for `forward`."""

    backbone: "DiffusersDiT | DiT"
    exits: Exits

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        own: "DiffusersDiT",
        exits: Exits,
        policy: ExitPolicy,
        fused: bool,
    ):
        super().__init__()
        self.policy, self.record = policy, EarlyExit(num_blocks=len(own.blocks))
        self._transformer, self._own, self._given = transformer, own, exits
        self._copy = Copy(transformer, lambda: _through_our_blocks(transformer)) if fused else None
        self._place: tuple[torch.device, torch.dtype] | None = None
        if self._copy is not None:
            self._copy()  # raises now for weights that cannot be copied

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise ValueError("a transformer with early exit cannot be copied; call disable first")

    def __reduce__(self) -> NoReturn:
        raise ValueError("a transformer with early exit cannot be pickled; call disable first, or save its state dict")

    def _prepare(self, x: Tensor) -> ExecutionOptions:
        """Sets backbone and exits for one call, from the present state of the transformer."""
        if len(self._transformer.transformer_blocks) != len(self._own.blocks):
            raise ValueError("the transformer has another number of blocks now; call disable, then enable")
        self.backbone, device = self._own if self._copy is None else self._copy(), x.device
        if self._place != (device, x.dtype):
            self._place, dtype = (device, x.dtype), x.dtype
            self._moved = Copy(self._given, lambda: _placed(self._given, device, dtype))
        self.exits = self._moved()
        # the pipeline's blocks run on the whole call, as without the hook: other shapes could round differently
        return ExecutionOptions(group_size=WHOLE if self._copy is None and device.type == "cpu" else None)

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
        execution = self._prepare(hidden_states)
        options = {"policy": self.policy, "execution": execution}
        output = forward(self, hidden_states, timestep.float(), class_labels, **options)
        done = self.record.totals
        done.ticks += 1
        done.passes += len(timestep)
        done.blocks += int(output.exit_layer.sum())
        done.macs += output.macs
        done.macs_full += output.macs_full
        done.rows_moved += output.rows_moved
        self.record.exit_layer = output.exit_layer
        out = output.prediction
        if output.variance is not None:
            out = torch.cat([out, output.variance], 1)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _through_our_blocks(transformer: DiTTransformer2DModel) -> DiT:
    if any(value.is_meta for value in transformer.parameters()):
        raise ValueError(
            "fused=True copies all weights, and some are offloaded; use enable_model_cpu_offload, or fused=False"
        )
    network = from_transformer(transformer.state_dict(), transformer.config)
    return network.to(transformer.device, transformer.dtype).requires_grad_(False)


def _placed(exits: Exits, device: torch.device, dtype: torch.dtype) -> Exits:
    """`exits` on `device`, a copy only if needed. Of its parts only heads must have the dtype of the hidden states."""
    heads = exits.heads is not None and any(value.dtype != dtype for value in exits.heads.parameters())
    if exits.weight.device == device and not heads:
        return exits
    moved = copy.deepcopy(exits).to(device)
    if moved.heads is not None:
        moved.heads.to(dtype)
    return moved


@dataclass(frozen=True)
class DiffusersCond:
    """Conditioning by lane: t, labels: as passed; time, both: the first block's embedding of the time, and of time and
    label."""

    t: Tensor
    labels: Tensor
    time: Tensor
    both: Tensor


class DiffusersBlock:
    skip_from = None

    def __init__(self, transformer: DiTTransformer2DModel, index: int):
        self._transformer, self._index = transformer, index

    @property
    def _block(self) -> Any:
        """The present block at this index, which may have been replaced."""
        return self._transformer.transformer_blocks[self._index]

    def __call__(
        self,
        x: Tensor,
        cond: DiffusersCond,
        skip: None = None,
        index: None = None,
        row_to_lane: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        t, labels = cond.t, cond.labels
        if row_to_lane is not None:
            t, labels = (value.index_select(0, row_to_lane) for value in (t, labels))
        y = self._block(x, timestep=t, class_labels=labels)
        return y if out is None else out.copy_(y)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one lane, including the time embedder that each block has."""
        D = self._block.attn1.to_q.in_features
        return 12 * D * D * tokens + 2 * tokens * tokens * D + 7 * D * D + 256 * D


class DiffusersDiT:
    """Adapts a `DiTTransformer2DModel` to the `Backbone` interface."""

    num_prefix_tokens = 0
    learned_variance = False  # the pipeline splits the channels itself

    def __init__(self, transformer: DiTTransformer2DModel):
        config = transformer.config
        self._transformer, self._patch = transformer, config.patch_size
        self.blocks = [DiffusersBlock(transformer, i) for i in range(len(transformer.transformer_blocks))]
        self.dim = self.time_dim = transformer.inner_dim
        self.tokens = (config.sample_size // config.patch_size) ** 2
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.patch_dim = config.patch_size**2 * config.in_channels

    def parameters(self) -> Iterator[Tensor]:
        return self._transformer.parameters()

    def embed(self, x: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, DiffusersCond]:
        rows = self._transformer.pos_embed(x)
        embedder = self._transformer.transformer_blocks[0].norm1.emb
        time = embedder.timestep_embedder(embedder.time_proj(t).to(rows.dtype))
        return rows, DiffusersCond(t, context, time, embedder(t, context, hidden_dtype=rows.dtype))

    def head(self, patches: Tensor, cond: DiffusersCond, lanes: Tensor) -> Tensor:
        network = self._transformer
        shift, scale = network.proj_out_1(F.silu(cond.both[lanes.long()])).chunk(2, dim=1)
        values = network.proj_out_2(network.norm_out(patches) * (1 + scale[:, None]) + shift[:, None])
        n, T, _ = values.shape
        side, p = round(T**0.5), self._patch
        pixels = values.view(n, side, side, p, p, network.out_channels).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(n, network.out_channels, side * p, side * p)

    def stem_and_head_macs(self) -> tuple[int, int]:
        D, T = self.dim, self.tokens
        return T * self.patch_dim * D, T * D * self._patch**2 * self._transformer.out_channels + 3 * D * D + 256 * D
