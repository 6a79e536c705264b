"""In which order lanes go through the network: those expected to leave last come first.

Leavers are then the tail already, and little has to move. The order changes no result, only what it costs.
"""

import torch
from torch import Tensor

BINS = 64  # over the network's time, 0..1000
RATE = 0.3  # weight of the newest observation


class ExpectedDepth:
    """Exit depth by timestep, learnt while running, and by how much each place's sample differs from it.

    Until a timestep has been seen, noisier samples are expected to leave earlier.
    """

    def __init__(self, layers: int, places: int):
        self._curve = torch.linspace(layers, 1, BINS)
        self._own = torch.zeros(places, 2)  # by place and lane (conditional, unconditional)

    def order(self, t: Tensor, places: Tensor, half: Tensor) -> Tensor:
        """int64 [n]: positions of the lanes, deepest first. t: float [n]; places, half: int64 [n], half in {0, 1}."""
        return torch.argsort(self._curve[self._bin(t)] + self._own[places, half], descending=True, stable=True)

    def learn(self, t: Tensor, places: Tensor, half: Tensor, depth: Tensor) -> None:
        """depth: [n], blocks that the lanes ran at t."""
        index = self._bin(t)
        off = depth - self._curve[index]
        self._own[places, half] += RATE * (off - self._own[places, half])
        count = torch.bincount(index, minlength=BINS)
        self._curve += RATE * torch.zeros(BINS).index_add_(0, index, off) / count.clamp(min=1)

    def forget(self, places: Tensor) -> None:
        """Other samples take these places."""
        self._own[places] = 0

    @staticmethod
    def _bin(t: Tensor) -> Tensor:
        return (t * (BINS / 1000)).long().clamp(0, BINS - 1)
