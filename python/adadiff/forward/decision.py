"""The exit decisions of all lanes' policies in one forward pass."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from adadiff_kernels import upload

from ..policies.interface import ExitContext, ExitPolicy, LaneIds, LimitPolicy, exit_layers_of
from ..policies.reuse import ReusePolicy


class PolicyFailure(Exception):
    """A policy raised `error`. Internal to this package: callers get the error itself."""

    def __init__(self, policy: ExitPolicy | ReusePolicy, error: BaseException):
        super().__init__(f"{policy} raised {error!r}")
        self.policy, self.error = policy, error


class ExitDecision:
    """Evaluates each running lane's own exit policy after a block.

    policies: all policies of the pass; policy_index: int64 [B], each lane's index into them, None for a single policy.
    t: float [B]; threshold: float [B], NaN for lanes that use their policy's; None: all do. ids: of the lanes, for
    policies that need them (None: lane i is sample i at step 0). Thresholds are not checked here.
    `limits`: float32 [L - 1, B], contiguous, if all policies are `LimitPolicy`s; else None, and `mask` calls them.
    All tensors are on `device`, without host synchronisation; limits computed from CPU tensors alone stay on the CPU,
    and the caller uploads them.
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
        """bool [n]: rows that exit, for policies without limits. u: float32 [n]; row_to_lane: int32 [n].

        running: bool [n], rows that still run, if only the device knows them: then every policy is called for all rows,
        and its answer is used for its own rows. None: all rows run, and a policy is called for its own rows only.
        """
        n, lanes = len(row_to_lane), row_to_lane.long()
        mask = torch.zeros(n, dtype=torch.bool, device=row_to_lane.device)
        index = None if self._index is None else self._index[lanes]
        for k, (policy, asked) in enumerate(zip(self._policies, self._asked, strict=True)):
            if layer not in asked:
                continue
            if index is None and (running is None or not policy.whole_batch):
                exits = self._ask(policy, u, layer, lanes)
                mask = exits if running is None else exits & running
            elif running is not None and not policy.whole_batch:
                chosen = running if index is None else running & (index == k)
                mask |= chosen & self._ask(policy, u, layer, lanes, chosen)
            else:  # its own rows only; on a device the count is exact here, and synchronising is allowed
                chosen = torch.ones_like(mask) if index is None else index == k
                rows = (chosen if running is None else chosen & running).nonzero().squeeze(1)
                if len(rows):
                    mask[rows] = self._ask(policy, None if u is None else u[rows], layer, lanes[rows])
        return mask

    def _ask(
        self, policy: ExitPolicy, u: Tensor | None, layer: int, lanes: Tensor, heeded: Tensor | None = None
    ) -> Tensor:
        """bool [n]: calls the policy with copies, which it may overwrite. Stores its state for rows where `heeded`."""
        u = u if policy.needs_scores else None
        context = self._context(policy, lanes)
        before = None if heeded is None else context.state.clone()
        mask = call_policy(policy, policy.exit_mask, None if u is None else u.clone(), layer, context)
        call_policy(policy, _check_mask, mask, len(lanes), lanes.device)
        state = context.state if heeded is None else torch.where(heeded, context.state, before)
        self._state.index_copy_(0, lanes, state)
        mask = mask.expand(len(lanes))
        # NaN never exits, except by a limit of +inf, which a `LimitPolicy` handles itself
        return mask if u is None or isinstance(policy, LimitPolicy) else mask & (u == u)

    def _context(self, policy: ExitPolicy, lanes: Tensor | None) -> ExitContext:
        """The context of rows with these lanes, or by lane if `lanes` is None; always copies."""
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
        """float32 [B]: the lanes' own thresholds, else those of their policies. Computed on the CPU if all inputs are
        there, else on the device, without host synchronisation, so that a CUDA graph can hold it."""
        defaults = [torch.nan if policy.threshold is None else float(policy.threshold) for policy in self._policies]
        inputs = [value for value in (t, policy_index, threshold) if value is not None]
        at = torch.device("cpu") if all(value.is_cpu for value in inputs) else device
        found = torch.full((len(t),), defaults[0], dtype=torch.float32, device=at)
        for k, value in enumerate(defaults[1:], start=1):
            found.masked_fill_(upload(policy_index, at) == k, value)
        if threshold is not None:
            threshold = upload(threshold, at)
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
    """An `ExitDecision`; that of an earlier pass is returned again if it would be the same."""
    if policy_index is None and threshold is None and t.is_cpu:
        policy = policies[0]
        if isinstance(policy, LimitPolicy) and vars(type(policy)).get("same_limits"):  # subclasses may differ
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
    """Calls function(*given) of a policy; an exception in it becomes PolicyFailure."""
    try:
        return function(*given)
    except BaseException as error:
        if not isinstance(error, Exception) and type(policy).__module__.startswith("adadiff."):
            raise  # from a signal such as Ctrl-C: this package's own policies raise no BaseException
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
