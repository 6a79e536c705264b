"""What an exit policy is: asked after a block, for the rows that still run, it says who exits there.

n rows still run, of B lanes; layers count from 1 to L, and nobody is asked after layer L, where everybody exits. u is a
layer's uncertainty, float32 [n]. NaN never exits: NaN < threshold is false, and masks of policies are cleared there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExitContext:
    """What a policy is told about each row besides u. The tensors are its own: nobody else sees what it writes to them.

    num_layers: L. t: float [n], the network's time, 0..1000. threshold: float32 [n], what each sample asks for, else
    the policy's own `threshold`, NaN where there is neither. state: float32 [n], memory that starts at 0 in every
    forward pass; what a policy writes here it finds at the next layer.
    ids: which lanes these are; None unless the policy sets `needs_ids`.
    """

    num_layers: int
    t: Tensor
    threshold: Tensor
    state: Tensor
    ids: "LaneIds | None" = None


@dataclass(frozen=True)
class LaneIds:
    """Which lanes the rows carry, int64 [n] each: the sample's number in its run, the step it is at, counted from 0,
    and the half, 1 for the unconditional one."""

    sample: Tensor
    step: Tensor
    half: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "LaneIds":
        return LaneIds(function(self.sample), function(self.step), function(self.half))


class ExitPolicy:
    """To inherit from. One policy serves many samples at once, each with its own threshold: read it from the context,
    since `self.threshold` is only what samples get that bring none.

    needs_scores: u is read, so it is computed where the policy asks. whole_batch: looks at other rows' u, which then
    are all running rows of this policy. needs_ids: reads `context.ids`. threshold: for samples that bring none; None:
    NaN, unless needs_threshold, by which every sample has to bring one.
    """

    needs_scores: bool = True
    needs_ids: bool = False
    needs_threshold: bool = False
    whole_batch: ClassVar[bool] = False
    threshold: float | None = None

    def exit_layers(self, num_layers: int) -> Sequence[int]:
        """The layers after which somebody may exit, in 1..L-1. Others cost nothing."""
        return range(1, num_layers)

    def check_thresholds(self, thresholds: Tensor) -> None:
        """Raises ValueError where thresholds, float32 [samples], cannot be used."""

    def exit_mask(self, u: Tensor | None, layer: int, context: ExitContext) -> Tensor:
        """Who exits after `layer`: bool [n]. u: float32 [n], None unless `needs_scores`."""
        raise NotImplementedError


class LimitPolicy(ExitPolicy):
    """To inherit from: a lane exits where its u lies below a limit that is known before the forward pass.

    All limits are then computed once, and a kernel decides by them. same_limits: they depend on the threshold alone,
    not on time or ids, so that they need not be computed anew for every forward pass. It is not inherited: a class says
    so itself, and its policies have hashes.
    """

    same_limits: ClassVar[bool] = False

    def limits(self, context: ExitContext) -> Tensor:
        """float32 [L - 1, B], below which u a lane exits after each layer; infinity: whatever u is, unscored or NaN;
        minus infinity: it stays. The context is by lane."""
        raise NotImplementedError

    def exit_mask(self, u: Tensor | None, layer: int, context: ExitContext) -> Tensor:
        return below(u, self.limits(context)[layer - 1])


def below(u: Tensor | None, limit: Tensor) -> Tensor:
    """bool [n]: who exits. u: float32 [n] or None; limit: float32 [n], see `LimitPolicy.limits`."""
    always = limit.isposinf()
    return always if u is None else (u < limit) | always


def limits_from_depth(num_layers: int, depth: Tensor) -> Tensor:
    """Limits by which lanes exit after depth: float [B] blocks, whatever their u."""
    layer = torch.arange(1, num_layers, device=depth.device)[:, None]
    return torch.where(layer >= depth, torch.inf, -torch.inf).float()


def exit_layers_of(policy: ExitPolicy, num_layers: int) -> frozenset[int]:
    """The layers after which `policy` may let somebody exit. ValueError where it needs scores and asks nowhere, or
    names a layer that is not in 1..L-1."""
    given = policy.exit_layers(num_layers)
    if type(given) is not range and any(type(layer) is not int for layer in given):
        raise ValueError(f"{policy} must name layers by whole numbers, got {list(given)[:8]}")
    asked = frozenset(given)
    if asked and (min(asked) < 1 or max(asked) >= num_layers):
        wrong = sorted(layer for layer in asked if not 1 <= layer < num_layers)
        raise ValueError(f"{policy} asks after layers {wrong[:8]}; those of this network are 1..{num_layers - 1}")
    if not asked and policy.needs_scores:
        raise ValueError(f"{policy} asks after no block of a network that has {num_layers}")
    return asked
