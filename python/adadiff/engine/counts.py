"""How the host learns how many rows still run on a device.

The device decides who leaves and holds the exact count; the host launches every block over a bound of the rows. Rows
between the count and the bound are computed and never looked at; rows beyond a bound that is too small are parked and
resumed in a later pass. So all of these give the same images and exits, and differ in what they wait for and waste.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adadiff_kernels import DeviceSet


class Counts(Protocol):
    exact: bool  # the bound is the count, after every layer that is asked
    parks: bool  # the bound may be below the count

    def bound(self, active: DeviceSet, layers: Sequence[int], bound: int) -> int:
        """Rows for the blocks after layers[-1], at most `bound`, those of the block before.

        layers: where somebody has been asked in this pass; the last leave is queued, and perhaps not yet done.
        """


@dataclass(frozen=True)
class Sync:
    """The host waits for the count after every `every` layers at which somebody is asked."""

    every: int = 1
    parks = False

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
    `most`, it waits until all but so many of the leaves it has queued are done, which leaves the device enough to do.
    """

    most: int | None = None
    exact = False
    parks = False

    def __post_init__(self) -> None:
        if self.most is not None:
            _check_whole("most", self.most)

    def bound(self, active: DeviceSet, layers: Sequence[int], bound: int) -> int:
        if self.most is not None and len(layers) > self.most:
            return min(bound, active.wait(layers[-1 - self.most]))
        return min(bound, active.seen().count)


@dataclass(frozen=True)
class Planned:
    """The host goes by how deep the lanes are expected to run, and waits once, for the number of those parked.

    depth: blocks expected of each lane of one evaluation, in any order. `sample` and `Engine` learn it by timestep.
    """

    depth: tuple[float, ...] | None = None
    exact = False
    parks = True

    def __post_init__(self) -> None:
        if self.depth is not None and not all(math.isfinite(depth) for depth in self.depth):
            raise ValueError(f"expected depths must be finite, got {self.depth[:8]}")

    def of(self, depth: Sequence[float]) -> "Planned":
        return dataclasses.replace(self, depth=tuple(depth))

    def bound(self, active: DeviceSet, layers: Sequence[int], bound: int) -> int:
        room = sum(depth > layers[-1] for depth in self.depth)
        return min(bound, active.seen().count, room)


STRATEGIES = {"sync": Sync, "lagged": Lagged, "planned": Planned}


def counts_from(counts: Counts | str | None, batch_invariant: bool = False) -> Counts | None:
    """A strategy, or its spelling: "sync", "sync:4", "lagged", "lagged:2", "planned". None stays None."""
    if counts is not None and batch_invariant:
        raise ValueError("batch_invariant runs lane by lane, on a host that knows the count; leave counts out")
    if not isinstance(counts, str):
        if counts is not None and not hasattr(counts, "bound"):
            raise ValueError(f"counts is a strategy or a spelling such as 'lagged', got {counts!r}")
        return counts
    name, colon, value = counts.partition(":")
    if name not in STRATEGIES or (colon and (name == "planned" or not value.isdecimal())):
        raise ValueError(f"no counts {counts!r}; there are sync, sync:BLOCKS, lagged, lagged:BLOCKS and planned")
    return STRATEGIES[name](int(value)) if colon else STRATEGIES[name]()


def check_rules(counts: Counts | None, by_lane: bool) -> None:
    """by_lane: no rule looks at the whole batch. ValueError where one does, and rows may be there that have left."""
    if counts is not None and not counts.exact and not by_lane:
        raise ValueError(f"a rule that looks at the whole batch needs the exact count, counts='sync'; got {counts}")


def _check_whole(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
