"""Each lane's prediction, by the head of its exit layer."""

import torch
from torch import Tensor

from ..models.interface import Backbone
from ..uem import Exits
from .lane_by_lane import LaneRunner
from .placement import DevicePlacement, HostPlacement
from .rest_of_network import RestOfNetwork
from .runner import BlockRunner


def predictions(
    runner: BlockRunner | LaneRunner,
    placement: HostPlacement | DevicePlacement,
    backbone: Backbone,
    exits: Exits | None,
    rest: RestOfNetwork | None = None,
) -> Tensor:
    """[B, C or 2 C, H, W]. One head call if the head is shared or no lane exited early; else one for each layer with
    exits or, if only the device knows the exits, one for the last layer and one for all others. rest: for lanes that
    may reuse the rest of the network, which use the head of the layer at which that ended."""
    patches, last = placement.saved[:, backbone.num_prefix_tokens :], len(backbone.blocks)
    if not len(patches):
        C, H, W = backbone.sample_shape
        return patches.new_empty(0, 2 * C if backbone.learned_variance else C, H, W)
    lanes = placement.row_to_lane  # all lanes in order if none exited early
    if not placement.in_order:
        lanes = torch.arange(len(patches), dtype=torch.int32, device=patches.device)
    shared = exits is None or exits.heads is None
    if rest is not None:
        patches = rest.completed(patches)
        if not shared:
            layers = placement.exit_layer.where(~rest.reused, rest.head_layer())
            if isinstance(placement, DevicePlacement) and isinstance(runner, BlockRunner):
                return without_the_host(runner, backbone, exits, patches, lanes, layers)
            return _by_layer(runner, backbone, exits, patches, layers)
    if shared or (placement.exits is not None and all(layer == last for layer, _, _ in placement.exits)):
        return runner.head(backbone.head, patches, lanes)
    # where heads are small, one call for all lanes takes less time than several
    by_lane = isinstance(placement, DevicePlacement) and isinstance(runner, BlockRunner)
    if placement.exits is None or (by_lane and exits.config.head == "linear"):
        return without_the_host(runner, backbone, exits, patches, lanes, placement.exit_layer)
    parts = []
    for layer, before, after in reversed(placement.exits):  # lanes that exited last lie first
        lanes = placement.order[after:before]
        parts.append(runner.head(exits.head(backbone, layer), patches.index_select(0, lanes), lanes))
    prediction = torch.cat(parts)
    return torch.empty_like(prediction).index_copy_(0, placement.order.long(), prediction)


def _by_layer(
    runner: BlockRunner | LaneRunner, backbone: Backbone, exits: Exits, patches: Tensor, layers: Tensor
) -> Tensor:
    """Lane i through the head of layers[i]: int32 [B]. Synchronises with the device."""
    parts, order = [], []
    for layer in layers.unique().tolist():
        order.append((layers == layer).nonzero().squeeze(1))
        selected = patches.index_select(0, order[-1])
        parts.append(runner.head(exits.head(backbone, layer), selected, order[-1].int()))
    prediction = torch.cat(parts)
    return torch.empty_like(prediction).index_copy_(0, torch.cat(order), prediction)


def without_the_host(
    runner: BlockRunner, backbone: Backbone, exits: Exits | None, patches: Tensor, lanes: Tensor, exit_layer: Tensor
) -> Tensor:
    """[n, C or 2 C, H, W], without host synchronisation. patches: [n, N, D] of lanes: int32 [n]; exit_layer: int32 [n].
    exits: None if no lane exits early."""
    prediction = runner.head(backbone.head, patches, lanes)
    if exits is None or exits.heads is None:
        return prediction
    at_last = (exit_layer == len(backbone.blocks)).view(-1, 1, 1, 1)
    return torch.where(at_last, prediction, runner.heads_by_lane(patches, lanes, exit_layer))
