"""How many samples share a forward pass: half as many after memory ran out, and carefully as many as before again."""

import numpy as np

FIRST, LONGEST = 16, 1024  # ticks without an error until more samples are tried


class PassSize:
    """most: samples in one forward pass, at most `capacity`.

    Somebody else on the device may have taken the memory for a while only, so after some ticks without an error, in
    each of which `most` held somebody back, it is doubled. An attempt that fails costs a forward pass; so each tick
    that fails doubles the number of ticks until the next attempt.
    """

    def __init__(self, capacity: int):
        self.most = self._capacity = max(1, capacity)
        self._wait, self._calm, self._shrunk = FIRST // 2, 0, False

    def parts(self, slots: np.ndarray) -> list[np.ndarray]:
        """slots: int64 [k], in as few forward passes as allowed."""
        return [slots[i : i + self.most] for i in range(0, len(slots), self.most)]

    def shrink(self, most: int) -> None:
        """Memory ran out: no more than `most` from now on."""
        self.most, self._shrunk = most, True

    def tick_is_done(self, running: int) -> None:
        """A tick of so many samples is complete, in however many attempts."""
        if self._shrunk:
            self._shrunk, self._calm = False, 0
            self._wait = min(2 * self._wait, LONGEST)
        elif running >= self.most:
            self._calm += 1
            if self._calm >= self._wait:
                self._calm = 0
                if self.most == self._capacity:
                    self._wait = FIRST // 2  # what was short is there again
                self.most = min(2 * self.most, self._capacity)
