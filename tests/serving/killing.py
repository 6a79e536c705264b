"""A policy that kills the engine that draws with it, as a defect of ours would."""

import gc

import torch
from torch import Tensor

from adadiff.engine.engine import Engine
from adadiff.policies.interface import ExitContext, LimitPolicy


class Killing(LimitPolicy):
    """After its first step no engine of the process admits anybody."""

    needs_scores = False

    def limits(self, context: ExitContext) -> Tensor:
        for found in gc.get_objects():
            if isinstance(found, Engine):
                found._admit = lambda: 1 / 0
        shape = context.num_layers - 1, len(context.t)
        return torch.full(shape, -torch.inf, dtype=torch.float32, device=context.t.device)
