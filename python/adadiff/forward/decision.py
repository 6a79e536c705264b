"""What the policies of all lanes decide in one forward pass."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from adadiff_kernels import upload

from ..policies.interface import ExitContext, ExitPolicy, LaneIds, LimitPolicy, exit_layers_of
from ..policies.reuse import ReusePolicy


class PolicyFailure(Exception):
    """A policy raised `error`. Known to this package only: whoever called it gets the error itself."""

    def __init__(self, policy: ExitPolicy | ReusePolicy, error: BaseException):
        super().__init__(f"{policy} raised {error!r}")
        self.policy, self.error = policy, error


class ExitDecision:
    """Asks every running lane's own policy after a block.

    policies: those in use; policy_index: int64 [B], each lane's index into them, None where there is but one.
    t: float [B]; threshold: float [B], where lanes bring one, else NaN; None: nobody brings one. ids: of the lanes, for
    policies that need them (None: lane i is sample i at step 0). Thresholds are not checked here.
    `limits`: float32 [L - 1, B], contiguous, where all policies are `LimitPolicy`s; else None, and `mask` asks them.
    Everything lies on `device`, and nothing waits for it; limits of values that all lie on the CPU do so, too, and
    whoever uses the decision uploads them.
    Raises ValueError for a policy that does not fit the network, and PolicyFailure for one that raises.
    """

    def __init__(
        self,
        policies: Sequence[ExitPolicy],
        policy_index: Tensor | None,
        num_layers: int,
        t: Tensor,
        threshold: Tensor | None,
        ids: LaneIds | None,
        device: torch.device,
    ):
        B, only = len(t), len(policies) == 1
        asked = [exit_layers_of(policy, num_layers) for policy in policies]
        scoring = [layers for policy, layers in zip(policies, asked, strict=True) if policy.needs_scores]
        self.exit_layers = asked[0] if only else frozenset().union(*asked)
        self.scored = scoring[0] if only and scoring else frozenset().union(*scoring)
        self.whole_batch = any(policy.whole_batch for policy in policies)
        self.limits: Tensor | None = None
        if not self.exit_layers:
            return
        self._num_layers, self._policies, self._asked = num_layers, policies, asked
        by_limits = all(isinstance(policy, LimitPolicy) for policy in policies) and not self.whole_batch
        if by_limits and all(value is None or value.is_cpu for value in (t, policy_index, threshold)):
            device = torch.device("cpu")
        self._index = None if policy_index is None else upload(policy_index, device)
        self._t = upload(t, device)
        self._threshold = self._thresholds(t, policy_index, threshold, device)
        self._ids = None
        if any(policy.needs_ids for policy in policies):
            lane = torch.arange(B, device="cpu")
            ids = LaneIds(lane, lane * 0, lane * 0) if ids is None else ids
            self._ids = ids.map(lambda value: upload(value, device))
        self._state = torch.zeros(B, dtype=torch.float32, device=device)
        if by_limits:
            self.limits = self._all_limits(B).contiguous()

    def mask(self, u: Tensor | None, layer: int, row_to_lane: Tensor, running: Tensor | None) -> Tensor:
        """bool [n]: who exits, for policies without limits. u: float32 [n]; row_to_lane: int32 [n].

        running: bool [n], rows that still run, where only the device knows it: then every policy is asked about every
        row and heeded where it is that row's own. None: all run, and a policy is asked about its own rows.
        """
        n, lanes = len(row_to_lane), row_to_lane.long()
        mask = torch.zeros(n, dtype=torch.bool, device=row_to_lane.device)
        index = None if self._index is None else self._index[lanes]
        for k, (policy, asked) in enumerate(zip(self._policies, self._asked, strict=True)):
            if layer not in asked:
                continue
            if index is None and (running is None or not policy.whole_batch):
                own = self._ask(policy, u, layer, lanes)
                mask = own if running is None else own & running
            elif running is not None and not policy.whole_batch:
                chosen = running if index is None else running & (index == k)
                mask |= chosen & self._ask(policy, u, layer, lanes, chosen)
            else:  # its own rows alone; on a device the count is exact here, and looking is allowed
                chosen = torch.ones_like(mask) if index is None else index == k
                rows = (chosen if running is None else chosen & running).nonzero().squeeze(1)
                if len(rows):
                    mask[rows] = self._ask(policy, None if u is None else u[rows], layer, lanes[rows])
        return mask

    def _ask(
        self, policy: ExitPolicy, u: Tensor | None, layer: int, lanes: Tensor, heeded: Tensor | None = None
    ) -> Tensor:
        """bool [n], of copies that the policy may spoil. Its state is kept where it is heeded."""
        u = u if policy.needs_scores else None
        context = self._context(policy, lanes)
        before = None if heeded is None else context.state.clone()
        mask = call_policy(policy, policy.exit_mask, None if u is None else u.clone(), layer, context)
        call_policy(policy, _check_mask, mask, len(lanes), lanes.device)
        state = context.state if heeded is None else torch.where(heeded, context.state, before)
        self._state.index_copy_(0, lanes, state)
        mask = mask.expand(len(lanes))
        # a limit has decided about NaN already, whoever shares the pass
        return mask if u is None or isinstance(policy, LimitPolicy) else mask & (u == u)

    def _context(self, policy: ExitPolicy, lanes: Tensor | None) -> ExitContext:
        """By row, or by lane where lanes is None; fresh tensors."""
        take = Tensor.clone if lanes is None else lambda value: value.index_select(0, lanes)
        ids = self._ids.map(take) if policy.needs_ids else None
        return ExitContext(self._num_layers, take(self._t), take(self._threshold), take(self._state), ids)

    def _all_limits(self, B: int) -> Tensor:
        found: Tensor | None = None
        for k, (policy, asked) in enumerate(zip(self._policies, self._asked, strict=True)):
            if not asked and len(self._policies) > 1:
                continue
            limits = call_policy(policy, cast(LimitPolicy, policy).limits, self._context(policy, None))
            call_policy(policy, _check_limits, limits, self._num_layers, B)
            if self._index is None:
                return limits
            found = torch.full_like(limits, -torch.inf) if found is None else found
            found = torch.where(self._index == k, limits, found)
        return found

    def _thresholds(
        self, t: Tensor, policy_index: Tensor | None, threshold: Tensor | None, device: torch.device
    ) -> Tensor:
        """float32 [B]: what lanes bring, else what their policies have. On the CPU where all that is given lies there;
        else on the device, so that nothing waits for it, and a CUDA graph can hold it."""
        own = [torch.nan if policy.threshold is None else float(policy.threshold) for policy in self._policies]
        given = [value for value in (t, policy_index, threshold) if value is not None]
        there = torch.device("cpu") if all(value.is_cpu for value in given) else device
        found = torch.full((len(t),), own[0], dtype=torch.float32, device=there)
        for k, value in enumerate(own[1:], start=1):
            found.masked_fill_(upload(policy_index, there) == k, value)
        if threshold is not None:
            threshold = upload(threshold, there)
            found = torch.where(threshold.isnan(), found, threshold.float())
        return upload(found, device)


def decide(
    policies: Sequence[ExitPolicy],
    policy_index: Tensor | None,
    num_layers: int,
    t: Tensor,
    threshold: Tensor | None,
    ids: LaneIds | None,
    device: torch.device,
) -> ExitDecision:
    """An `ExitDecision`, one of an earlier pass where it would be the same."""
    if policy_index is None and threshold is None and t.is_cpu:
        policy = policies[0]
        if isinstance(policy, LimitPolicy) and vars(type(policy)).get("same_limits"):  # what inherits may not have them
            return _of_all_passes(policy, num_layers, len(t), device)
    return ExitDecision(policies, policy_index, num_layers, t, threshold, ids, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _of_all_passes(policy: LimitPolicy, num_layers: int, B: int, device: torch.device) -> ExitDecision:
    t = torch.zeros(B, dtype=torch.float32, device="cpu")
    made = ExitDecision((policy,), None, num_layers, t, None, None, device)
    if made.limits is not None:
        made.limits = upload(made.limits, device)
    return made


def call_policy(policy: ExitPolicy | ReusePolicy, function: Callable, *given: object) -> Any:
    """function(*given), which is the policy's. Raises PolicyFailure for what it raises."""
    try:
        return function(*given)
    except BaseException as error:
        if not isinstance(error, Exception) and type(policy).__module__.startswith("adadiff."):
            raise  # a signal's, such as Ctrl-C: policies of this package raise nothing of the kind
        raise PolicyFailure(policy, error) from error


def _check_mask(mask: object, n: int, device: torch.device) -> None:
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape in ((n,), ()) and mask.device == device
    if not fits:
        kind = f"{mask.dtype} {list(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"exit_mask must return bool [{n}] on {device}, got {kind}")


def _check_limits(limits: object, num_layers: int, B: int) -> None:
    shape = (num_layers - 1, B)
    if not isinstance(limits, Tensor) or limits.shape != shape or limits.dtype != torch.float32:
        kind = f"{limits.dtype} {list(limits.shape)}" if isinstance(limits, Tensor) else repr(limits)
        raise ValueError(f"limits must return float32 {list(shape)}, got {kind}")
