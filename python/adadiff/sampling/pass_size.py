"""The number of samples per forward pass: halved when memory runs out, and raised again step by step."""

import numpy as np

FIRST, LONGEST = 16, 1024  # ticks without an error before more samples are tried, at first and at most


class PassSize:
    """most: samples in one forward pass, at most `capacity`.

    Another process may have taken the memory for a while only, so `most` is doubled after some ticks without an error
    in which it was the limit. A failed attempt costs a forward pass, so each tick that fails doubles the number of
    ticks before the next attempt.
    """

    def __init__(self, capacity: int):
        self.most = self._capacity = max(1, capacity)
        self._wait, self._calm, self._shrunk = FIRST // 2, 0, False

    def parts(self, slots: np.ndarray) -> list[np.ndarray]:
        """Splits slots: int64 [k] into as few forward passes as possible."""
        return [slots[i : i + self.most] for i in range(0, len(slots), self.most)]

    def shrink(self, most: int) -> None:
        """After running out of memory: at most `most` samples per pass from now on."""
        self.most, self._shrunk = most, True

    def tick_is_done(self, running: int) -> None:
        """To be called after each complete tick. running: its samples."""
        if self._shrunk:
            self._shrunk, self._calm = False, 0
            self._wait = min(2 * self._wait, LONGEST)
        elif running >= self.most:
            self._calm += 1
            if self._calm >= self._wait:
                self._calm = 0
                if self.most == self._capacity:
                    self._wait = FIRST // 2  # back at full size: start over
                self.most = min(2 * self.most, self._capacity)
