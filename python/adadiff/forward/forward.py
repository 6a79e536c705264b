"""One forward pass of a network with exits: for each block run, score and exit; heads at the end."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from adadiff_kernels import upload_together

from ..models.interface import Backbone
from ..policies.calibrated import Calibration
from ..policies.interface import ExitPolicy, LaneIds
from ..policies.spelling import DEFAULT, policy_from
from ..uem import Exits
from .branch_plan import branch_update, plan_branches
from .branches import BranchLaneRunner, BranchRunner
from .captured import in_pieces
from .count_sync import Sync
from .decision import ExitDecision, PolicyFailure, decide
from .lane_by_lane import LaneRunner
from .layers import Asked, Done, Layers
from .options import DEFAULT as EXECUTION
from .options import ExecutionOptions
from .output import ForwardOutput
from .placement import DevicePlacement, HostPlacement, device_set
from .predictions import predictions
from .rest_of_network import RestOfNetwork, reuses_rest
from .reuse_lanes import ReuseLanes, log_not_captured
from .runner import BlockRunner
from .structure import structure_of


class HasExits(Protocol):
    """An `adadiff.Model`, or any object with a network and its exits."""

    backbone: Backbone
    exits: Exits | None


def forward(
    model: HasExits,
    x: Tensor,
    t: Tensor,
    context: Tensor | None = None,
    *,
    policy: ExitPolicy | str | Sequence[ExitPolicy] = DEFAULT,
    policy_index: Tensor | None = None,
    threshold: Tensor | None = None,
    cfg_partner: Tensor | None = None,
    execution: ExecutionOptions | None = None,
    record_scores: bool = False,
) -> ForwardOutput:
    """The network's prediction for B lanes, each at its own timestep and with its own exit policy.

    x: [B, C, H, W]; t: float [B], the network's time, 0..1000; context: class labels int64 [B], text [B, N, E] or None.
    Per-lane inputs may be on the CPU or on x's device; outputs are on x's device. Values on a GPU are not checked.
    policy: one for all lanes, or several with policy_index: int64 [B], the index of each lane's policy.
    threshold: float [B], replaces the policy's threshold (NaN: keeps it); cfg_partner: int64 [B], the other half of a
    guided sample (the lane itself if none): partners exit together, by the larger uncertainty.
    execution: `ExecutionOptions` (default: `ExecutionOptions()`). record_scores: fills `ForwardOutput.scores`.
    Raises ValueError for inputs that require grad, thresholds that a policy refuses, an invalid cfg_partner, partners
    with different thresholds or policies, and a policy that needs exits on a model without; and whatever a policy
    raises.
    """
    policies = tuple(policy) if isinstance(policy, Sequence) and not isinstance(policy, str) else (policy,)
    calibration: Calibration | None = getattr(model, "calibration", None)
    policies = tuple(policy_from(one, calibration) for one in policies)
    _check_lanes(x, t, policies, policy_index, threshold, cfg_partner)
    try:
        return run_forward(
            model,
            x,
            t,
            context,
            policies=policies,
            policy_index=policy_index,
            threshold=threshold,
            cfg_partner=cfg_partner,
            execution=execution or EXECUTION,
            record_scores=record_scores,
        )
    except PolicyFailure as failure:
        error = failure.error
    raise error  # with its original traceback


@torch.no_grad()
def run_forward(
    model: HasExits,
    x: Tensor,
    t: Tensor,
    context: Tensor | None,
    *,
    policies: Sequence[ExitPolicy],
    policy_index: Tensor | None,
    threshold: Tensor | None,
    cfg_partner: Tensor | None,
    execution: ExecutionOptions,
    record_scores: bool = False,
    ids: LaneIds | None = None,
    reuse: ReuseLanes | None = None,
) -> ForwardOutput:
    """`forward` without its checks. ids: of the lanes, for policies that need them. reuse: what lanes may reuse from
    earlier steps. Raises PolicyFailure for an error in a policy."""
    backbone, exits, device = model.backbone, model.exits, x.device
    structure = structure_of(backbone)
    decision = decide(policies, policy_index, structure.num_layers, t, threshold, ids, device)
    if exits is None and decision.exit_layers:
        raise ValueError("this network has no exits; only the policy 'full' can run it")
    check_execution(execution, policies, device)
    reuse = reuse if reuse is not None and reuse.any else None
    branches = None if reuse is None else plan_branches(reuse, structure.branches, t)
    t, partner = _upload(t, cfg_partner, decision, device)
    way = in_pieces if execution.runner == "captured" else directly
    if reuse is not None and way is in_pieces:
        log_not_captured()
        way = directly
    asked = Asked(
        backbone, exits, structure, decision, execution, x, t, context, partner, record_scores, reuse, branches
    )
    prediction, placement, scores, rows, head_layer, updates = way(asked)
    variance = None
    if backbone.learned_variance:
        prediction, variance = prediction.chunk(2, dim=1)
    costs = structure.costs(exits, decision.scored)
    if branches is not None:
        costs = replace(costs, saved=branches.saved, branches=branches.reused)
        update = branch_update(reuse.store, branches, placement.exit_layer, bool(decision.exit_layers))
        updates = (*updates, update)
    optional = {"scores": scores, "variance": variance, "head_layer": head_layer, "updates": updates}
    return ForwardOutput(prediction, placement.exit_layer, costs, rows, placement.moved, **optional)


def _upload(
    t: Tensor, partner: Tensor | None, decision: ExitDecision, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """t and partner, int32 [B], on the device; also uploads the decision's limits. CPU tensors go in one transfer."""
    if device.type == "cpu":
        return t, None if partner is None else partner.int()
    values = [t, None if partner is None else partner.int(), decision.limits]
    waiting = [value if value is not None and value.is_cpu else None for value in values]
    if any(value is not None for value in waiting):
        arrived = upload_together(waiting, device)
        values = [old if new is None else new for old, new in zip(values, arrived, strict=True)]
    t, partner, decision.limits = values
    return t, partner


def directly(asked: Asked) -> Done:
    """Runs the pass eagerly: each operation is called (on a device: queued) in turn."""
    backbone, exits, structure, decision, execution, x, t, context, partner, record_scores, reuse, _ = asked
    B, device, invariant = len(x), x.device, execution.batch_invariant
    host = device.type == "cpu" and execution.count_sync is None
    runner = _runner(asked, host)
    hidden = runner.embed(x, t, context, bool(decision.scored), decision.limits if host else None)
    scores = rest = None
    if record_scores:
        scores = torch.full((structure.num_layers, B), torch.nan, dtype=torch.float32, device=device)
    if reuse is not None and reuses_rest(reuse):
        rest = RestOfNetwork(reuse, backbone, t, hidden, runner, invariant)
    with nullcontext() if host else device_set(B, device) as active:
        placement: HostPlacement | DevicePlacement
        if host:
            placement = HostPlacement(hidden, decision, partner)
        else:
            count_sync = execution.count_sync or Sync()
            leave = bool(decision.exit_layers or (rest is not None and rest.layers))
            placement = DevicePlacement(active, hidden, decision, partner, count_sync, not invariant, leave)
        del hidden
        rows = Layers(runner, placement, structure, decision, scores, rest).run()
        placement.skips.clear()
        placement.finish(placement.hidden, structure.num_layers)
    given = runner, placement, backbone, exits if decision.exit_layers else None
    if rest is None:
        return Done(predictions(*given), placement, scores, rows)
    head_layer = rest.head_layer()
    return Done(predictions(*given, rest), placement, scores, rows, head_layer, rest.updates(placement))


def _runner(asked: Asked, host: bool) -> BlockRunner | LaneRunner:
    given = asked.backbone, asked.exits, asked.execution, asked.structure, host
    if asked.branches is None:
        return (LaneRunner if asked.execution.batch_invariant else BlockRunner)(*given)
    return (BranchLaneRunner if asked.execution.batch_invariant else BranchRunner)(*given, asked.branches)


def check_execution(execution: ExecutionOptions, policies: Sequence[ExitPolicy], device: torch.device) -> None:
    """Raises ValueError for options that do not fit the policies or the device."""
    count_sync = execution.count_sync
    if count_sync is not None and not count_sync.exact and any(policy.whole_batch for policy in policies):
        raise ValueError(
            f"a policy that looks at the whole batch needs the exact count, count_sync='sync'; got {count_sync}"
        )
    if execution.runner == "captured" and device.type == "cpu":
        raise ValueError("runner='captured' captures the work of a GPU; on the CPU take 'eager' or 'compiled'")
    if execution.runner == "captured" and torch.is_autocast_enabled(device.type):
        raise ValueError("runner='captured' does not support autocast; convert the model to that dtype instead")
    if execution.group_size is not None and device.type != "cpu":
        raise ValueError(f"groups are for the CPU; leave group_size out on {device}")


def _check_lanes(
    x: Tensor,
    t: Tensor,
    policies: Sequence[ExitPolicy],
    policy_index: Tensor | None,
    threshold: Tensor | None,
    cfg_partner: Tensor | None,
) -> None:
    """Raises ValueError for per-lane inputs that do not fit."""
    if x.requires_grad:
        raise ValueError("forward is for inference; x must not require grad")
    shape = t.shape
    if policy_index is None and len(policies) != 1:
        raise ValueError(f"{len(policies)} policies need policy_index, the index of each lane's own")
    if policy_index is not None and (policy_index.dtype != torch.int64 or policy_index.shape != shape):
        raise ValueError(
            f"policy_index must be int64 {list(shape)}, one policy per lane, got {policy_index.dtype} "
            f"{list(policy_index.shape)}"
        )
    if policy_index is not None and policy_index.is_cpu and not _within(policy_index, len(policies)):
        raise ValueError(f"policy_index must lie in [0, {len(policies)}), the policies given")
    if threshold is not None and threshold.shape != shape:
        raise ValueError(f"threshold must be one number per lane, {list(shape)}, got {list(threshold.shape)}")
    for k, policy in enumerate(policies):
        lanes = None if policy_index is None else policy_index == k
        if threshold is None:
            if policy.threshold is None and policy.needs_threshold and len(t):  # policies check their own thresholds
                raise ValueError(f"{policy} needs a threshold for every lane")
        elif threshold.is_cpu and (lanes is None or lanes.is_cpu):
            values = threshold if lanes is None else threshold[lanes]
            if len(values):
                policy.check_thresholds(values)
    if cfg_partner is not None and cfg_partner.is_cpu:
        _check_partners(cfg_partner, policy_index, threshold, shape)


def _check_partners(partner: Tensor, policy_index: Tensor | None, threshold: Tensor | None, shape: torch.Size) -> None:
    lanes = torch.arange(len(partner), device="cpu")
    fits = partner.dtype == torch.int64 and partner.shape == shape
    if not fits or not _within(partner, len(lanes)) or not torch.equal(partner[partner], lanes):
        raise ValueError("cfg_partner must be int64 [B], each lane's partner, whose partner is that lane in turn")
    alike = threshold is None or not threshold.is_cpu
    if not alike and not torch.equal(threshold[partner].nan_to_num(), threshold.nan_to_num()):
        raise ValueError("partners exit together, so they need one threshold")
    if policy_index is not None and policy_index.is_cpu and not torch.equal(policy_index[partner], policy_index):
        raise ValueError("partners exit together, so they need one policy")


def _within(index: Tensor, end: int) -> bool:
    return bool(((index >= 0) & (index < end)).all())
