"""One forward pass whose lanes run different networks: a shallow one at noisy timesteps, a narrow one, a student.

Lanes of the same network run together, by their policies; the results are merged by lane.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import upload

from ..model import Model
from ..policies.exits import Full
from ..policies.interface import ExitPolicy, LaneIds
from .forward import run_forward
from .options import ExecutionOptions
from .output import Costs, ForwardOutput
from .reuse_lanes import ReuseLanes
from .structure import structure_of


class Network(NamedTuple):
    """A model, and whether policies apply in it (`asks`); if not, every lane runs all its blocks."""

    model: Model
    asks: bool


class NetworkChoice(Protocol):
    """Which network a lane runs, by its time. networks: the alternatives to the model itself."""

    networks: Sequence[Network]

    def choose(self, t: np.ndarray) -> np.ndarray:
        """t: float32 [k]. Returns int64 [k]: 0 for the model, i for networks[i - 1]."""


def run_networks(
    networks: Sequence[Network],
    network: Tensor,
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
    run: Callable[..., ForwardOutput] = run_forward,
) -> ForwardOutput:
    """`run_forward` with a network per lane. network: int64 [B] on the CPU, an index into networks.

    networks[0] is the reference: its multiply-adds count as the full cost, and its rows are reported. Scores are
    recorded for networks in which policies apply and that have as many layers as networks[0]. Lanes reuse features only
    in networks in which policies apply, and only features of the same network, see `ReuseLanes.network`.
    Raises ValueError as `run_forward` does, and for partners that run different networks.
    """
    if cfg_partner is not None and not torch.equal(network[cfg_partner.cpu()], network):
        raise ValueError("partners exit together, so they need one network; these have different ones")
    parts: list[ForwardOutput] = []
    groups: list[Tensor] = []
    present = network.unique().tolist()
    for k in present:
        lanes, (model, asks) = (network == k).nonzero().squeeze(1), networks[k]
        own_x, own_t, own_context = _take(lanes, x, t, context)
        given: dict[str, object] = {"policies": (Full(),), "policy_index": None, "threshold": None, "cfg_partner": None}
        if asks:
            index, thresholds = _take(lanes, policy_index, threshold)
            given = {"policies": policies, "policy_index": index, "threshold": thresholds}
            given["cfg_partner"] = _partners(cfg_partner, network == k, lanes)
            given["ids"] = None if ids is None else ids.map(lambda value, lanes=lanes: value[lanes])
            given["record_scores"] = record_scores
            if reuse is not None and (own_reuse := reuse.take(lanes)).any:
                given["reuse"] = own_reuse
        parts.append(run(model, own_x, own_t, own_context, execution=execution, **given))
        groups.append(lanes)
    return _merge(networks, network, present, parts, torch.cat(groups), record_scores)


def _take(lanes: Tensor, *values: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value[upload(lanes, value.device)] for value in values]


def _partners(partner: Tensor | None, own: Tensor, lanes: Tensor) -> Tensor | None:
    """The partners of `lanes` as indices among the lanes where own: bool [B] is true."""
    return None if partner is None else own.long().cumsum(0)[partner.cpu()[lanes]] - 1


def _merge(
    networks: Sequence[Network],
    network: Tensor,
    present: Sequence[int],
    parts: Sequence[ForwardOutput],
    lanes: Tensor,
    record_scores: bool,
) -> ForwardOutput:
    """Merges the results by lane. lanes: int64 [B], the lanes of all parts in turn; present: the parts' networks."""
    first, B, L = parts[0], len(lanes), len(networks[0].model.backbone.blocks)
    device, lanes_there = first.prediction.device, upload(lanes, first.prediction.device)

    def by_lane(name: str) -> Tensor:
        return in_place(torch.cat([getattr(part, name) for part in parts]))

    def in_place(joined: Tensor) -> Tensor:
        return torch.empty_like(joined).index_copy_(0, lanes_there, joined)

    head_layer = None
    if any(part.head_layer is not None for part in parts):
        none = [torch.zeros_like(part.exit_layer) if part.head_layer is None else part.head_layer for part in parts]
        head_layer = in_place(torch.cat(none))

    scores, begin = None, 0
    if record_scores:
        scores = torch.full((L, B), math.nan, dtype=torch.float32, device=device)
        for part in parts:
            at = lanes_there[begin : begin + len(part.prediction)]
            if part.scores is not None and len(part.scores) == L:
                scores[:, at] = part.scores
            begin += len(at)
    full = first.costs if present[0] == 0 else structure_of(networks[0].model.backbone).costs(None, frozenset())
    rank = torch.searchsorted(torch.tensor(present, dtype=torch.int64, device="cpu"), network)
    costs = Costs(
        full.plain,
        tuple(part.costs.by_exit_layer[0] for part in parts),
        tuple(rank.tolist()),
        tuple(networks[k].asks for k in present),
        tuple(part.costs.own_head[0] for part in parts),
        *(_by_lane(parts, lanes, name) for name in ("saved", "branches")),
    )
    return ForwardOutput(
        prediction=by_lane("prediction"),
        exit_layer=by_lane("exit_layer"),
        costs=costs,
        rows=first.rows if present[0] == 0 else (0,) * L,
        moved=sum((part.moved for part in parts[1:]), first.moved),
        scores=scores,
        variance=None if first.variance is None else by_lane("variance"),
        head_layer=head_layer,
        updates=tuple(update for part in parts for update in part.updates),
    )


def _by_lane(parts: Sequence[ForwardOutput], lanes: Tensor, name: str) -> np.ndarray | None:
    """Merges the field `name` of the parts' costs: int64 [B, L + 1], L of the deepest network; None if no part has
    it."""
    if all(getattr(part.costs, name) is None for part in parts):
        return None
    found = np.zeros((len(lanes), max(len(part.costs.by_exit_layer[0]) for part in parts)), dtype=np.int64)
    for part, own in zip(parts, lanes.split([len(part.prediction) for part in parts]), strict=True):
        if (values := getattr(part.costs, name)) is not None:
            found[own.numpy(), : values.shape[1]] = values
    return found
