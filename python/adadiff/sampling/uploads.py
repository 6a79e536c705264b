"""Uploads all indices that one step needs from the host, in one transfer."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from adadiff_kernels import upload_together

from .lanes import Lanes
from .slots import SlotState


class StepIndices(NamedTuple):
    """Indices of k samples and B lanes on the device; int64 unless stated, None if not needed.

    slots [k]; row [k], of the solver's tables; seed, step [k], if a step adds noise. sample [B], of each lane, if lanes
    are not in sample order; context [B], row of `SlotState.context` of each lane, if there is one. conditional,
    unconditional [k]: lanes of each sample, -1 if none; weight [k], float32; channels [k].
    """

    slots: Tensor
    row: Tensor
    seed: Tensor | None
    step: Tensor | None
    sample: Tensor | None
    context: Tensor | None
    conditional: Tensor | None
    unconditional: Tensor | None
    weight: Tensor | None
    channels: Tensor | None


def step_indices(
    state: SlotState, lanes: Lanes, slots: np.ndarray, row: np.ndarray, step: np.ndarray, noise: bool
) -> StepIndices:
    """Uploads the indices of a step. slots, row, step: int64 [k]. noise: whether the solver adds noise."""
    given: dict[str, np.ndarray | None] = {"slots": slots, "row": row, "conditional": lanes.conditional}
    if not lanes.in_order:
        given["sample"] = lanes.sample
    if noise:
        given["seed"], given["step"] = state.seed[slots], step
    if state.context is not None:
        given["context"] = slots if lanes.in_order else slots[lanes.sample] + state.capacity * lanes.half
    if lanes.unconditional is not None:
        given["unconditional"], given["weight"] = lanes.unconditional, state.guidance[slots]
        channels = state.channels[slots]
        if (channels != state.solver.x.shape[1]).any():
            given["channels"] = channels
    return StepIndices(*upload_together(list(map(given.get, StepIndices._fields)), state.device))
