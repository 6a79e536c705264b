"""How the host learns how many rows still run on a device.

The device decides who exits and holds the exact count; the host launches every block over a bound of the rows. Rows
between the count and the bound are computed and never read. So all of these give the same images and exits, and differ
in how long the host waits and in what is computed in vain.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from adadiff_kernels import DeviceSet

from ..spelling import Entry, Registry


class CountSync(Protocol):
    exact: bool  # the bound is the count, after every layer at which somebody may exit

    def bound(self, active: DeviceSet, layers: Sequence[int], bound: int) -> int:
        """Rows for the blocks after layers[-1], at most `bound`, those of the block before.

        layers: where somebody could exit in this pass; the last exit is queued, and perhaps not yet done.
        """


@dataclass(frozen=True)
class Sync:
    """The host waits for the count after every `every` layers at which somebody may exit."""

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
    """The host goes by the last count it has seen. It never waits, and may be many blocks ahead of the device; with
    `most`, it waits until all but so many of the exits it has queued are done, which leaves the device enough to do.
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


LONG = 300e-6  # seconds of a block, beyond which waiting for its count costs little
SEEN = 5


class Measured:
    """Waits for the count where blocks take long, and goes by a count one exit late where they are short.

    How long a block over so many rows takes is the median of what the host saw last between two counts that it waited
    for: the first passes also compile and plan, and a host that was late itself sees one interval too long and one too
    short. So every number of rows is waited for at first, and those that turn out to be short no more. One serves the
    passes of one network, one after the other. clock: in seconds.
    """

    exact = False

    def __init__(self, long: float = LONG, clock: Callable[[], float] = time.perf_counter) -> None:
        self._long, self._clock, self._late = long, clock, Lagged(1)
        self._seen: dict[int, deque[float]] = {}  # by rows
        self._since: tuple[int, float] | None = None  # number of the last exit that was waited for, and when

    def seconds(self, rows: int) -> float | None:
        """Of a block over so many rows; None before it has been seen often enough."""
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
    """A CountSync, or its spelling: "sync", "sync:4", "lagged", "lagged:2". None stays None."""
    if isinstance(given, str):
        return COUNT_SYNCS.read(given)
    if given is not None and not hasattr(given, "bound"):
        raise ValueError(f"count_sync is a CountSync or text such as 'lagged', got {given!r}")
    return given


ALL_EXACT = 16  # up to so many rows every number is a bucket
BUCKETS = 32  # of a batch, beyond


def bucket(n: int, B: int) -> int:
    """Rows that blocks are launched over where n of B run: n itself up to 16, then the next multiple of B / 32.

    Libraries choose and keep a plan for every number of rows they meet (cuDNN's attention takes long over one), so they
    are to meet few.
    """
    step = max(1, B // BUCKETS)
    return n if n <= ALL_EXACT else min(B, -(-n // step) * step)


def _check_whole(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
