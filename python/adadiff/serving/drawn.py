"""Numbers about a finished image, for its reply, the metrics and the log."""

from dataclasses import dataclass

import numpy as np

from ..sampling.reports import RequestReport


@dataclass(frozen=True)
class Drawn:
    """layers: uint8 [steps, 2], number of blocks that the conditional and the unconditional half ran at each step; 0:
    not computed. waited, seconds: in the queue, and from then on. blocks, passes: sums over both halves."""

    seed: int
    num_layers: int
    layers: np.ndarray
    waited: float
    seconds: float
    blocks: int
    passes: int

    @staticmethod
    def of(seed: int, report: RequestReport) -> "Drawn":
        layers = report.exit_layer.numpy()[:, 0]
        return Drawn(
            seed=seed,
            num_layers=report.num_layers,
            layers=layers,
            waited=max(report.waited, 0.0),
            seconds=report.seconds,
            blocks=int(layers.sum()),
            passes=int(np.count_nonzero(layers)),
        )

    @property
    def steps(self) -> int:
        return len(self.layers)

    @property
    def mean_exit_layer(self) -> float:
        return self.blocks / max(self.passes, 1)

    @property
    def share_left_out(self) -> float:
        """Share of the network's blocks that were skipped."""
        return 1 - self.blocks / max(self.passes * self.num_layers, 1)
