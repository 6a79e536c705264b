"""In which order lanes go through the network: those expected to exit last come first.

The rows that exit then lie at the end already, and few have to move. The order changes no result, only what it costs.
"""

import numpy as np

BINS = 64  # over the network's time, 0..1000
RATE = 0.3  # weight of the newest observation


class ExpectedDepth:
    """Exit layer by timestep, learnt while running, and by how much each slot's sample differs from it.

    Until a timestep has been seen, noisier samples are expected to exit earlier. Arrays are NumPy's: on a few numbers
    its operations take a third of the time of PyTorch's.
    """

    def __init__(self, num_layers: int, slots: int):
        self._curve = np.linspace(num_layers, 1, BINS)
        self._own = np.zeros(2 * slots)  # by slot and half (conditional, unconditional)

    def order(self, t: np.ndarray, slots: np.ndarray, half: np.ndarray) -> np.ndarray:
        """int64 [n]: positions of the lanes, deepest first. t: float [n], in 0..1000; slots, half: int64 [n], half in
        {0, 1}."""
        return (-self._curve[_bin(t)] - self._own[2 * slots + half]).argsort(kind="stable")

    def learn(
        self, t: np.ndarray, slots: np.ndarray, half: np.ndarray, exit_layer: np.ndarray, same: np.ndarray
    ) -> None:
        """exit_layer: [n], blocks that the lanes ran at t; same: bool [n], the slot still has that sample."""
        index, key = _bin(t), 2 * slots + half
        off, own = exit_layer - self._curve[index], self._own[key]
        self._own[key] = own + (off - own) * (RATE * same)
        count = np.bincount(index, minlength=BINS)
        self._curve += RATE * np.bincount(index, off, BINS) / np.maximum(count, 1)

    def forget(self, slots: np.ndarray) -> None:
        """Other samples take these slots."""
        self._own[2 * slots] = self._own[2 * slots + 1] = 0


def _bin(t: np.ndarray) -> np.ndarray:
    return np.minimum((t * (BINS / 1000)).astype(np.int64), BINS - 1)
