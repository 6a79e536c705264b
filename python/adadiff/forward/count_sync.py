"""How the host learns how many rows still run on a device.

The device decides who exits and holds the exact count; the host launches every block over a bound of the rows. Rows
between the count and the bound are computed and never read. So all of these give the same images and exits, and differ
in how long the host waits and in what is computed in vain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adadiff_kernels import DeviceSet


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


KINDS = {"sync": Sync, "lagged": Lagged}


def count_sync_from(given: CountSync | str | None) -> CountSync | None:
    """A CountSync, or its spelling: "sync", "sync:4", "lagged", "lagged:2". None stays None."""
    if not isinstance(given, str):
        if given is not None and not hasattr(given, "bound"):
            raise ValueError(f"count_sync is a CountSync or text such as 'lagged', got {given!r}")
        return given
    name, colon, value = given.partition(":")
    if name not in KINDS or (colon and not value.isdecimal()):
        raise ValueError(f"no count_sync {given!r}; there are sync, sync:BLOCKS, lagged and lagged:BLOCKS")
    return KINDS[name](int(value)) if colon else KINDS[name]()


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
