"""What one tick of a batch did, and what its forward passes leave to look at."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import Guidance, SolverState, guide

from ..diffusion.prediction import predicted_sample
from ..forward.feature_store import StoreUpdate
from ..model import Model
from .records import PassRecord
from .stages import Switch


@dataclass(frozen=True)
class Tick:
    """What one tick did. slots: int64 [k], those whose samples made a step. done: int64, slots whose samples are
    finished. failed: slot -> why; its sample has made no step.
    records: exit layers that became known, in the order of the steps: those of the tick before, and where samples are
    done, those of this one, so that all are known of a sample that is done (unless the batch is `late`).
    """

    slots: np.ndarray
    done: np.ndarray
    failed: dict[int, BaseException]
    records: tuple[PassRecord, ...]


@dataclass(frozen=True)
class Step:
    """One forward pass and solver step of samples at slots: int64 [k], which `there` says on the device. solver: what
    they have become, switch: who goes on to another network, and updates of what their lanes keep, None and none once
    that is written; x: float32 [k, C, H, W], what they were."""

    slots: np.ndarray
    there: Tensor
    solver: SolverState | None
    x: Tensor
    prediction: Tensor  # of all lanes
    guidance: Guidance | None
    record: PassRecord
    switch: Switch | None  # of those whose student is done
    updates: tuple[StoreUpdate, ...] = ()

    def without_solver(self) -> "Step":
        return replace(self, solver=None, switch=None, updates=())

    def predicted_x0(self, i: int, model: Model) -> Tensor:
        """The image that the prediction of the i-th sample would end in: float32 [C, H, W], see `Batch`."""
        lanes, device = self.record.lanes, self.x.device
        eps = self.prediction[i if lanes.conditional is None else int(lanes.conditional[i])][None].float()
        if (guidance := self.guidance) is not None and lanes.unconditional[i] >= 0:
            one = torch.tensor([i], dtype=torch.int64, device=device)
            channels = None if guidance.channels is None else guidance.channels[one]
            eps = guide(eps, guidance.uncond[guidance.row[one]], guidance.weight[one], channels)
        alpha, sigma = model.schedule.alpha_sigma(torch.tensor(self.record.t[i], dtype=torch.float64, device="cpu"))
        return predicted_sample(model.config.prediction_type, eps[0], self.x[i], alpha.item(), sigma.item()).float()
