"""The interface of exit policies: called after a block for the running rows, a policy returns which of them exit.

n of B lanes still run; layers count from 1 to L, and after layer L every lane exits without a call. u is a layer's
uncertainty, float32 [n]. Rows with a NaN u do not exit: NaN < threshold is false, and a policy's mask is cleared there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExitContext:
    """What a policy knows about each row besides u. The tensors are copies; writing to them affects no other policy.

    num_layers: L. t: float [n], the network's time, 0..1000. threshold: float32 [n], the sample's own, else the
    policy's `threshold`, NaN if there is neither. state: float32 [n], memory of the policy: 0 at the start of every
    forward pass, and kept from layer to layer.
    ids: the lanes' identities; None unless the policy sets `needs_ids`.
    """

    num_layers: int
    t: Tensor
    threshold: Tensor
    state: Tensor
    ids: "LaneIds | None" = None


@dataclass(frozen=True)
class LaneIds:
    """The identity of each row's lane, int64 [n] each: sample, its number in the run; step, counted from 0; half, 1 for
    the unconditional lane, else 0."""

    sample: Tensor
    step: Tensor
    half: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "LaneIds":
        return LaneIds(function(self.sample), function(self.step), function(self.half))


class ExitPolicy:
    """Base class of exit policies. One policy object serves many samples at once, each with its own threshold: read it
    from the context; `self.threshold` is only the default of samples without one.

    needs_scores: whether the policy reads u, which is then computed at its exit layers. whole_batch: whether a row's
    decision depends on other rows; the policy is then called for all its running rows together. needs_ids: whether it
    reads `context.ids`. threshold: the default; None: NaN. needs_threshold: without a default, every sample has to set
    its threshold.
    """

    needs_scores: bool = True
    needs_ids: bool = False
    needs_threshold: bool = False
    whole_batch: ClassVar[bool] = False
    threshold: float | None = None

    def exit_layers(self, num_layers: int) -> Sequence[int]:
        """The layers after which lanes may exit, in 1..L-1. Other layers are neither scored nor decided."""
        return range(1, num_layers)

    def check_thresholds(self, thresholds: Tensor) -> None:
        """Raises ValueError for invalid thresholds: float32 [samples]."""

    def exit_mask(self, u: Tensor | None, layer: int, context: ExitContext) -> Tensor:
        """bool [n]: rows that exit after `layer`. u: float32 [n], None unless `needs_scores`."""
        raise NotImplementedError


class LimitPolicy(ExitPolicy):
    """Base class of policies under which a lane exits when its u is below a limit known before the forward pass.

    All limits of a pass are computed at once, and a kernel decides by them. same_limits: limits depend on the policy's
    fields alone, not on time or ids, so that they are reused in later passes. Not inherited: each class sets it itself;
    its policies must be hashable.
    """

    same_limits: ClassVar[bool] = False

    def limits(self, context: ExitContext) -> Tensor:
        """float32 [L - 1, B]: a lane exits after a layer if its u is below this; +inf: always, even if u is NaN or not
        computed; -inf: never. The context is by lane."""
        raise NotImplementedError

    def exit_mask(self, u: Tensor | None, layer: int, context: ExitContext) -> Tensor:
        return below(u, self.limits(context)[layer - 1])


def below(u: Tensor | None, limit: Tensor) -> Tensor:
    """bool [n]: rows that exit. u: float32 [n] or None; limit: float32 [n], see `LimitPolicy.limits`."""
    always = limit.isposinf()
    return always if u is None else (u < limit) | always


def limits_from_depth(num_layers: int, depth: Tensor) -> Tensor:
    """Limits, float32 [L - 1, B], with which lanes exit after depth: float [B] blocks, whatever their u."""
    layer = torch.arange(1, num_layers, device=depth.device)[:, None]
    return torch.where(layer >= depth, torch.inf, -torch.inf).float()


def exit_layers_of(policy: ExitPolicy, num_layers: int) -> frozenset[int]:
    """The layers after which `policy` may let lanes exit. Raises ValueError for layers outside 1..L-1, and for a policy
    that needs scores but has no layers."""
    given = policy.exit_layers(num_layers)
    if type(given) is not range and any(type(layer) is not int for layer in given):
        raise ValueError(f"{policy} must name layers by whole numbers, got {list(given)[:8]}")
    asked = frozenset(given)
    if asked and (min(asked) < 1 or max(asked) >= num_layers):
        wrong = sorted(layer for layer in asked if not 1 <= layer < num_layers)
        raise ValueError(f"{policy} exits after layers {wrong[:8]}; those of this network are 1..{num_layers - 1}")
    if not asked and policy.needs_scores:
        raise ValueError(f"{policy} has no exit layer in a network of {num_layers} blocks")
    return asked
