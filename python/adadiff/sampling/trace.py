"""One sample, recorded step by step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..forward.options import ExecutionOptions
from ..model import Model
from .batch import Batch
from .params import SamplingParams
from .records import PassRecord
from .sample_batch import SampleBatch


@dataclass(frozen=True)
class Trace:
    """S forward passes of one sample. t: float32 [S], the network's time. exit_layer: uint8 [S, 2], of the conditional
    and the unconditional lane, 0 without one. scores: float32 [S, 2, L], NaN where not computed. x: float32
    [S, C, H, W], the sample after each step; x0: float32 [S, C, H, W], the image predicted in each step."""

    t: Tensor
    exit_layer: Tensor
    scores: Tensor
    x: Tensor
    x0: Tensor

    @property
    def exit_scores(self) -> Tensor:
        """float32 [S]: the conditional lane's uncertainty at its exit, NaN where it was not computed."""
        layer = self.exit_layer[:, :1].long().clamp(min=1) - 1
        return self.scores[:, 0].gather(1, layer)[:, 0]


def trace(
    model: Model, params: SamplingParams | None = None, *, execution: ExecutionOptions | None = None, **settings: object
) -> Trace:
    """Draws one sample, as `sample(model, 1, params, **settings)` does, and records every step.

    Raises ValueError as `sample` does. NaN and infinity are returned, for inspection.
    """
    params = SamplingParams.of(params, {**settings, "record_scores": True})
    batch = Batch(model, 1, execution=execution)
    slots = batch.admit(SampleBatch.of(model, 1, params), np.zeros(1, dtype=np.int64))
    records: list[PassRecord] = []
    x, x0 = [], []
    while batch.count:
        tick = batch.tick()
        if tick.failed:
            raise next(iter(tick.failed.values()))
        records += tick.records
        x.append(batch.peek(slots)[0].cpu())
        x0.append(batch.predicted_x0(int(slots[0])).cpu())
        batch.release(tick.done)
    known = [record.read() for record in records]
    return Trace(
        t=torch.from_numpy(np.concatenate([record.t for record in records])),
        exit_layer=torch.from_numpy(np.concatenate([own.exit_layer for own in known])),
        scores=torch.from_numpy(np.concatenate([own.scores for own in known])),
        x=torch.stack(x),
        x0=torch.stack(x0),
    )
