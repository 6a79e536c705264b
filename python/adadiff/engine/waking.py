"""Waiting and waking of threads such that a signal leaves no lock held.

Python runs signal handlers in the main thread, between two bytecodes, and a handler may raise, as Ctrl-C does. `with`
on a lock implemented in C cannot be interrupted there. A method written in Python can: an exception in the first line
of `Condition.__exit__` leaves the lock held, and all other threads wait forever.
"""

import math
import threading
from collections import deque


class Bell:
    """Wakes one waiting thread. A ring while no thread waits is kept for the next one."""

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        try:
            self._silence.release()
        except RuntimeError:  # a ring is pending already
            return

    def wait(self, seconds: float = math.inf) -> None:
        """Returns after the next ring, or after `seconds`."""
        self._silence.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))


class Bells:
    """Wakes every thread that has taken a bell. To miss no ring, take a bell, check the condition, and then wait."""

    def __init__(self) -> None:
        self._taken: deque[Bell] = deque()

    def take(self) -> Bell:
        bell = Bell()
        self._taken.append(bell)
        return bell

    def ring(self) -> None:
        while self._taken:
            try:
                self._taken.popleft().ring()
            except IndexError:  # another thread took the last one
                return


class SignalSafeCondition(threading.Condition):
    """A condition whose `with` calls the C functions of its lock directly."""

    # looked up before the lock is acquired, so that no Python code runs between `with` and the release
    __enter__ = property(lambda self: self._lock.__enter__)  # type: ignore[assignment]
    __exit__ = property(lambda self: self._lock.__exit__)  # type: ignore[assignment]

    def wait(self, timeout: float | None = None) -> bool:
        try:
            return super().wait(timeout)
        except BaseException:
            if not self._is_owned():  # type: ignore[attr-defined]  # interrupted after the release
                self.acquire()
            raise
