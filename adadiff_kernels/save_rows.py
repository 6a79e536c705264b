"""Rows of lanes that stop are kept where no later block writes, without the host knowing which they are.

    saved[lane[r]] = rows[r]   for every r with |exit_layer[lane[r]]| = layer

rows hold what the block `layer` wrote, in the order after its leave; saved is by lane. An exit layer is that of a
`DeviceSet`: positive where the lane left, negative where it is parked.
"""

import torch
from torch import Tensor


def save_rows_reference(rows: Tensor, saved: Tensor, lane: Tensor, exit_layer: Tensor, layer: int) -> None:
    """`save_rows` in PyTorch, on any device, without waiting for it: every row is read, and most are written back."""
    stops = exit_layer.index_select(0, lane).abs() == layer
    own = torch.where(stops.view(-1, *[1] * (rows.dim() - 1)), rows, saved.index_select(0, lane))
    saved.index_copy_(0, lane.long(), own)


def check_save(rows: Tensor, saved: Tensor, lane: Tensor, exit_layer: Tensor, layer: int) -> None:
    """ValueError where shapes or dtypes do not fit."""
    if rows.dim() < 2 or saved.shape[1:] != rows.shape[1:] or saved.dtype != rows.dtype:
        raise ValueError(
            f"rows and saved must be [n, ...] and [B, ...] of one dtype, got {rows.dtype} {list(rows.shape)} and "
            f"{saved.dtype} {list(saved.shape)}"
        )
    for name, value, length in (("lane", lane, rows.shape[0]), ("exit_layer", exit_layer, saved.shape[0])):
        if value.dtype != torch.int32 or value.shape != (length,):
            raise ValueError(f"{name} must be int32 [{length}], got {value.dtype} {list(value.shape)}")
    if not isinstance(layer, int | torch.SymInt) or layer < 1:
        raise ValueError(f"layer must be an int of 1 or more, got {layer!r}")
