"""The result of one tick of a batch, and data of its forward passes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import Guidance, SolverState, guide

from ..diffusion.prediction import predicted_sample
from ..forward.feature_store import StoreUpdate
from ..model import Model
from .records import PassRecord
from .stages import Switch


class Tick(NamedTuple):
    """The result of one tick. slots: int64 [k], whose samples made a step. done: int64 [m], slots whose samples are
    finished. failed: slot -> error; its sample has made no step.
    records: exit layers that became known, in step order: those of the previous tick and, if samples are done, of this
    one, so that a sample that is done is complete (unless the batch is `late`).
    """

    slots: np.ndarray
    done: np.ndarray
    failed: dict[int, BaseException]
    records: tuple[PassRecord, ...]


class Step(NamedTuple):
    """One forward pass and solver step of samples at slots: int64 [k]. there: slots on the device. x: float32
    [k, C, H, W], the states before the step. Set until they are written: solver, the states after it; switch, samples
    that go on to the teacher; updates, of the lanes' feature store."""

    slots: np.ndarray
    there: Tensor
    solver: SolverState | None
    x: Tensor
    prediction: Tensor  # of all lanes
    guidance: Guidance | None
    record: PassRecord
    switch: Switch | None  # samples whose student is done
    updates: tuple[StoreUpdate, ...] = ()

    def without_solver(self) -> "Step":
        return self._replace(solver=None, switch=None, updates=())

    def predicted_x0(self, i: int, model: Model) -> Tensor:
        """x0 by the prediction of the i-th sample: float32 [C, H, W], see `Batch.predicted_x0`."""
        lanes, device = self.record.lanes, self.x.device
        eps = self.prediction[i if lanes.conditional is None else int(lanes.conditional[i])][None].float()
        if (guidance := self.guidance) is not None and lanes.unconditional[i] >= 0:
            one = torch.tensor([i], dtype=torch.int64, device=device)
            channels = None if guidance.channels is None else guidance.channels[one]
            eps = guide(eps, guidance.uncond[guidance.row[one]], guidance.weight[one], channels)
        alpha, sigma = model.schedule.alpha_sigma(torch.tensor(self.record.t[i], dtype=torch.float64, device="cpu"))
        return predicted_sample(model.config.prediction_type, eps[0], self.x[i], alpha.item(), sigma.item()).float()
