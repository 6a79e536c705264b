"""How the host learns how many rows still run on a device.

The device decides which lanes exit and holds the exact count; the host launches every block over an upper bound of it.
Rows between the count and the bound are computed and never read. So all methods give the same images and exits; they
differ in how long the host waits and in how many rows are computed needlessly.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from adadiff_kernels import DeviceSet

from ..spelling import Entry, Registry


class CountSync(Protocol):
    exact: bool  # the bound equals the count after every exit layer

    def bound(self, active: DeviceSet, layers: Sequence[int], bound: int) -> int:
        """The number of rows for the blocks after layers[-1], at most `bound`, the rows of the previous block.

        layers: exit layers of this pass so far; the exit at the last one is queued and may not have run yet.
        """


@dataclass(frozen=True)
class Sync:
    """The host waits for the count after each `every`-th exit layer. Raises ValueError for `every` below 1."""

    every: int = 1

    def __post_init__(self) -> None:
        _check_whole("every", self.every)

    @property
    def exact(self) -> bool:
        return self.every == 1

    def bound(self, active: DeviceSet, layers: Sequence[int], bound: int) -> int:
        return bound if len(layers) % self.every else min(bound, active.wait(layers[-1]))


@dataclass(frozen=True)
class Lagged:
    """The host uses the last count that has reached it. It never waits, and may run many blocks ahead of the device.
    With `most`, it waits until at most `most` of its queued exits are unfinished, which keeps the device busy. Raises
    ValueError for `most` below 1.
    """

    most: int | None = None
    exact = False

    def __post_init__(self) -> None:
        if self.most is not None:
            _check_whole("most", self.most)

    def bound(self, active: DeviceSet, layers: Sequence[int], bound: int) -> int:
        if self.most is not None and len(layers) > self.most:
            return min(bound, active.wait(layers[-1 - self.most]))
        return min(bound, active.seen().count)


LONG = 300e-6  # seconds; for blocks that take longer, waiting for the count costs little
SEEN = 5  # measurements needed, and kept, for each number of rows


class Measured:
    """Waits for the count where blocks are long, and uses a count that is one exit old where they are short.

    The duration of a block over n rows is the median of the last intervals between two counts that the host waited for
    (a median, since first passes include compilation, and a delay of the host lengthens one interval and shortens the
    next). So the host waits at first for every n, and stops where blocks turn out to be short. Use one instance for the
    consecutive passes of one network. long: seconds; clock: returns seconds.
    """

    exact = False

    def __init__(self, long: float = LONG, clock: Callable[[], float] = time.perf_counter) -> None:
        self._long, self._clock, self._late = long, clock, Lagged(1)
        self._seen: dict[int, deque[float]] = {}  # by rows
        self._since: tuple[int, float] | None = None  # number of the last exit that was waited for, and when

    def seconds(self, rows: int) -> float | None:
        """Median duration of a block over `rows` rows; None before there are enough measurements."""
        seen = self._seen.get(rows, ())
        return None if len(seen) < SEEN else sorted(seen)[len(seen) // 2]

    def bound(self, active: DeviceSet, layers: Sequence[int], bound: int) -> int:
        known = self.seconds(bound)
        if known is not None and known < self._long:
            self._since = None
            return self._late.bound(active, layers, bound)
        count, now = min(bound, active.wait(layers[-1])), self._clock()
        if self._since is not None and self._since[0] == len(layers) - 1:
            self._seen.setdefault(bound, deque(maxlen=SEEN)).append(now - self._since[1])
        self._since = len(layers), now
        return count


COUNT_SYNCS: Registry[CountSync] = Registry(
    "count_sync",
    (
        Entry("sync", Sync, "every", bare=True, words={"every": "BLOCKS"}),
        Entry("lagged", Lagged, "most", bare=True, words={"most": "BLOCKS"}),
    ),
)


def count_sync_from(given: CountSync | str | None) -> CountSync | None:
    """A CountSync from itself or its spelling: "sync", "sync:4", "lagged", "lagged:2". None stays None. Raises
    ValueError for anything else."""
    if isinstance(given, str):
        return COUNT_SYNCS.read(given)
    if given is not None and not hasattr(given, "bound"):
        raise ValueError(f"count_sync is a CountSync or text such as 'lagged', got {given!r}")
    return given


ALL_EXACT = 16  # up to this many rows, every number is a bucket
BUCKETS = 32  # number of buckets of a larger batch


def bucket(n: int, B: int) -> int:
    """The number of rows that blocks are launched over when n of B run: n itself up to 16, then the next multiple of
    B / 32.

    Libraries build and cache a plan for every number of rows (slowly, for cuDNN's attention), so few numbers should
    occur.
    """
    step = max(1, B // BUCKETS)
    return n if n <= ALL_EXACT else min(B, -(-n // step) * step)


def _check_whole(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
