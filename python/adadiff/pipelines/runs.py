"""Assigns each call of a transformer to a run of the pipeline and to a step of it."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .compaction import version


@dataclass(frozen=True)
class Visit:
    """One call. context: diffusers' cache context; shapes: key of its arguments' shapes; call: its index among several
    calls in one step; new_run: whether it begins a run."""

    context: str
    shapes: Any
    call: int
    new_run: bool

    @property
    def key(self) -> Any:
        return self.context, self.shapes, self.call


@dataclass
class _Site:
    """The state of calls of one context and shape. index: the scheduler's step index, None if it has none. sample: of
    the last call, to distinguish calls of one step (such as two guidance halves) from another run that begins at the
    same time; empty if a scheduler tells."""

    t: float
    index: int | None
    call: int
    sample: list[tuple[Tensor, int | None]]


class RunWatch:
    """Detects which calls make up a run.

    pipe: the pipeline that was enabled; its scheduler is followed unless another pipeline is found to be calling. A
    call by another pipeline begins a run, in which that pipeline's scheduler is followed.

    With a scheduler, a run begins when it has new timesteps, when its step index goes back, and when the network's time
    reverses direction; two calls at the same time belong to one step unless the scheduler has stepped in between.
    Without a scheduler that steps, a run begins when time goes back, and when time is the same but the sample differs.
    rising: whether time rises during a run in that case. A call from another thread begins a run.
    """

    def __init__(self, pipe: Any, rising: bool):
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._caller: Any = None  # a weak reference, None outside of a pipeline's call
        self._rising = 1.0 if rising else -1.0
        self._timesteps: Any = None
        self._thread: int | None = None
        self._followed = False
        self._sign: float | None = None  # sign of time changes in this run, None before the first
        self._first: tuple[float, int | None] = 0.0, None  # time and index of the run's first call
        self._now: tuple[float, int | None] = self._first
        self._before: int | None = None  # index at the previous step
        self._steps = 0
        self._sites: dict[Any, _Site] = {}

    def reset(self) -> None:
        self._sites.clear()

    def pipe(self) -> Any:
        """The calling pipeline, else the enabled one; None if there is none or it no longer exists."""
        known = self._caller if self._caller is not None else self._pipe
        return None if known is None else known()

    def visit(self, context: str, shapes: Any, t: Tensor, sample: Any, caller: Any = None) -> Visit:
        """Registers a call. t: float [B]; sample: its hidden states, or a list of them; caller: the calling pipeline,
        None if not found."""
        if caller is not (None if self._caller is None else self._caller()):
            self.reset()
        self._caller = None if caller is None else weakref.ref(caller)
        scheduler = getattr(self.pipe(), "scheduler", None)
        timesteps, thread, time = getattr(scheduler, "timesteps", None), threading.get_ident(), float(t.max())
        index = _index(scheduler)
        followed = timesteps is not None and (index is None or index < len(timesteps))
        new_run = not self._sites or (thread, followed) != (self._thread, self._followed)
        new_run |= timesteps is not self._timesteps  # schedulers make a new tensor for each run
        self._timesteps, self._thread, self._followed = timesteps, thread, followed
        unstepped = index == -1 and self._steps > 0  # a user's own loop, without scheduler steps
        parts = _parts(sample) if not followed or index == -1 else []
        key = context, shapes
        site = self._sites.get(key)
        if site is not None and not new_run:
            sign = (time > site.t) - (time < site.t)
            if followed and self._sign is None and sign:
                self._sign = float(sign)
            new_run = sign == -(self._sign or self._rising)
            if followed and index is not None and site.index is not None:
                new_run |= index < site.index
            if (not followed or unstepped) and not sign:
                new_run |= not _equal(parts, site.sample)
        if new_run:
            self._begin(time, index, followed)
            site = None
        elif (time, index) != self._now:
            self._steps, self._before, self._now = self._steps + 1, self._now[1], (time, index)
        call = site.call + 1 if site is not None and (site.t, site.index) == (time, index) else 0
        self._sites[key] = _Site(time, index, call, parts)
        return Visit(context, shapes, call, new_run)

    def _begin(self, time: float, index: int | None, followed: bool) -> None:
        self._sites.clear()
        self._sign = None if followed else self._rising
        self._first = self._now = time, index
        self._before, self._steps = None, 0

    def steps_left(self) -> int:
        """The number of steps after that of the last call. Raises ValueError if the scheduler cannot tell."""
        if self._pipe is not None and self.pipe() is None:
            raise ValueError("the enabled pipeline no longer exists; call disable, and enable the one in use")
        if self._timesteps is None:
            raise ValueError("counting steps from the end needs a pipeline whose scheduler has timesteps")
        scheduler, index = getattr(self.pipe(), "scheduler", None), self._now[1]
        if hasattr(scheduler, "step_index") and index is not None and index >= 0:
            if index == self._before:
                raise ValueError("cannot count the steps left: the scheduler of the enabled pipeline does not step")
            done = index
        else:  # it has not been stepped, or has no step index
            done = self._steps + self._first_place(scheduler)
        left = len(self._timesteps) - 1 - done
        if left < 0:
            raise ValueError(f"cannot count the steps left: the scheduler has taken all {len(self._timesteps)}")
        return left

    def _first_place(self, scheduler: Any) -> int:
        """The index of the run's first time among the scheduler's; above 0 for image-to-image."""
        if hasattr(scheduler, "step_index"):
            return getattr(scheduler, "begin_index", None) or 0
        time = self._first[0]
        times = [float(one) for one in self._timesteps]
        return times.index(time) if time > 1 and time in times else 0  # times up to 1 may be in another unit


def _index(scheduler: Any) -> int | None:
    """The scheduler's step index, -1 before the first step; None if it has none."""
    if not hasattr(scheduler, "step_index"):
        return getattr(scheduler, "counter", None)  # PNDM's
    return -1 if scheduler.step_index is None else int(scheduler.step_index)


def _parts(sample: Any) -> list[tuple[Tensor, int | None]]:
    return [(held(one), version(one)) for one in ([sample] if isinstance(sample, Tensor) else sample)]


def held(value: Any) -> Any:
    """A value to compare with later; tensors that do not count in-place changes are copied."""
    if isinstance(value, list | tuple):
        return [held(one) for one in value]
    return value.clone() if isinstance(value, Tensor) and version(value) is None else value


def identical_parts(a: Any, b: Any) -> bool:
    """Whether two tensors, or two lists of them, are equal; NaN equals NaN."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    return all(identical_parts(one, two) for one, two in zip(a, b, strict=True))


def _equal(a: list[tuple[Tensor, int | None]], b: list[tuple[Tensor, int | None]]) -> bool:
    """Whether two lists are equal; NaN equals NaN."""
    for (now, new), (then, old) in zip(a, b, strict=True):
        if now is then:
            if new != old:
                return False
        elif not identical_parts(now, then):
            return False
    return True
