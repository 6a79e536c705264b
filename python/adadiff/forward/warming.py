"""Captures the CUDA graphs of forward passes ahead of the first request."""

import torch
from torch import Tensor

from ..policies.exits import Full, Replay, Threshold
from ..policies.interface import ExitPolicy
from .count_sync import Lagged, bucket
from .forward import HasExits, run_forward
from .options import ExecutionOptions

NEVER = 1e-9  # a threshold below every score


def warm(model: HasExits, execution: ExecutionOptions, context: Tensor | None, device: torch.device) -> None:
    """Captures all pieces of passes of up to execution.max_lanes lanes: for every layer and number of rows, with and
    without score and exit. Does nothing unless runner is "captured" and max_lanes is set.

    context: of one lane, int64 [1] or [1, N, E], on the network's device; None if the network takes none.
    """
    if execution.runner != "captured" or execution.max_lanes is None:
        return
    backbone, lanes, L = model.backbone, execution.max_lanes, len(model.backbone.blocks)
    policies: list[ExitPolicy] = [Full()]
    if model.exits is not None:
        policies += [Threshold(NEVER), Replay()]
    lagged = ExecutionOptions(runner="captured", max_lanes=lanes, count_sync=Lagged(), nvtx=execution.nvtx)
    for n in sorted({bucket(n, lanes) for n in range(1, lanes + 1)}, reverse=True):
        x = torch.zeros(n, *backbone.sample_shape, dtype=torch.float32, device=device)
        t = torch.zeros(n, dtype=torch.float32, device="cpu")
        given = None if context is None else context.expand(n, *context.shape[1:]).contiguous()
        for policy in policies:
            stays = torch.full_like(t, L) if isinstance(policy, Replay) else None
            for _ in range(2):  # a piece is run, then captured
                run_forward(
                    *(model, x, t, given),
                    policies=(policy,),
                    policy_index=None,
                    threshold=stays,
                    cfg_partner=None,
                    execution=lagged,
                )
