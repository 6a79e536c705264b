"""Waiting and waking in such a way that a signal leaves no lock held.

Python runs signal handlers in the main thread, between two bytecodes, and a handler may raise, as Ctrl-C does. `with`
on a lock of C cannot be cut in two there. A method written in Python can: an exception in the first line of
`Condition.__exit__` leaves the lock held, and all other threads wait for ever.
"""

import math
import threading
from collections import deque


class Bell:
    """Wakes the one thread that waits. A ring while nobody waits is kept for the next who does."""

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        try:
            self._silence.release()
        except RuntimeError:  # it rings already
            return

    def wait(self, seconds: float = math.inf) -> None:
        """Returns after the next ring, or after `seconds`."""
        self._silence.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))


class Bells:
    """Wakes every thread that has taken a bell. Take one, look whether what you wait for is there, and wait: then no
    ring is missed in between."""

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
            except IndexError:  # another thread was quicker
                return


class SignalSafeCondition(threading.Condition):
    """A condition that `with` acquires and releases by the C functions of its lock."""

    # looked up before the lock is acquired, so that nothing of Python runs between there and the release
    __enter__ = property(lambda self: self._lock.__enter__)  # type: ignore[assignment]
    __exit__ = property(lambda self: self._lock.__exit__)  # type: ignore[assignment]

    def wait(self, timeout: float | None = None) -> bool:
        try:
            return super().wait(timeout)
        except BaseException:
            if not self._is_owned():  # type: ignore[attr-defined]  # the signal came just after it had been let go
                self.acquire()
            raise
