"""Forward passes of captured pieces on the pretended device, for tests."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from adadiff.forward.forward import forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.output import ForwardOutput
from pretend import OnDevice, PretendDevice
from sampler.tiny import Case


@dataclass(frozen=True)
class Captured:
    """A network whose forward passes are captured, all sharing memory for so many lanes."""

    model: SimpleNamespace
    c: Case
    max_lanes: int | None = None
    count_sync: object = None
    strict: bool = True

    def __call__(self, lanes: Tensor, **own: object) -> ForwardOutput:
        execution = ExecutionOptions(runner="captured", max_lanes=self.max_lanes, count_sync=self.count_sync)
        (x, t, context) = self.c.given[lanes].all
        with PretendDevice(self.strict):
            return forward(self.model, OnDevice(x), t, context, **own, execution=execution)

    def agrees(self, lanes: Tensor, **own: object) -> ForwardOutput:
        """With the same pass on the CPU."""
        found, wanted = self(lanes, **own), forward(self.c, *self.c.given[lanes].all, **own)
        assert torch.equal(found.exit_layer.held, wanted.exit_layer)
        tolerance = {"rtol": 1e-5, "atol": 2e-5}
        torch.testing.assert_close(found.prediction.held, wanted.prediction, **tolerance)
        if wanted.scores is not None:
            torch.testing.assert_close(found.scores.held, wanted.scores, **tolerance, equal_nan=True)
        if wanted.variance is not None:
            torch.testing.assert_close(found.variance.held, wanted.variance, **tolerance)
        return found


def depths(n: int, layers: int) -> dict[str, Tensor]:
    lane = torch.arange(n)
    return {
        "nobody": torch.full((n,), float(layers)),
        "all at once": torch.full((n,), 2.0),
        "alternating": torch.where(lane % 2 == 0, 1.0, float(layers)),
        "one": torch.where(lane == n // 2, 3.0, float(layers)),
        "spread": lane * 5 % layers + 1.0,
    }
