"""When a run begins: which call of a transformer belongs to which step of which run of a pipeline."""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .compaction import version


@dataclass(frozen=True)
class Visit:
    """One call. context: of diffusers; shapes: what its arguments look like; call: which of several in the same step;
    new_run: everything from before it belongs to another run."""

    context: str
    shapes: Any
    call: int
    new_run: bool

    @property
    def key(self) -> Any:
        return self.context, self.shapes, self.call


@dataclass
class _Site:
    """Where calls of one context and shape stand. index: the scheduler's, None where it counts none. sample: of the
    last call, by which calls for the same step, as for two halves of guidance, are told from those of another run that
    begins at the same time; empty where a scheduler tells."""

    t: float
    index: int | None
    call: int
    sample: list[tuple[Tensor, int | None]]


class RunWatch:
    """Which calls make up a run.

    pipe: the pipeline that was enabled, whose scheduler is followed where no pipeline is seen calling. Another one that
    calls the same transformer begins a run, in which its own scheduler is followed.

    In a pipeline a run begins where its scheduler has new times, where the scheduler's count goes back, and where the
    network's time turns round; two calls at one time are of one step unless the scheduler has stepped between them.
    Without a scheduler that takes these steps, a run begins where time goes back, and where the time is the same but
    the sample another. rising: the time then goes up during a run. A thread has runs of its own.
    """

    def __init__(self, pipe: Any, rising: bool):
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._caller: Any = None  # a weak reference, None outside of a pipeline's call
        self._rising = 1.0 if rising else -1.0
        self._timesteps: Any = None
        self._thread: int | None = None
        self._followed = False
        self._sign: float | None = None  # of the changes of time in this run, None before the first
        self._first: tuple[float, int | None] = 0.0, None  # time and index of the run's first call
        self._now: tuple[float, int | None] = self._first
        self._before: int | None = None  # index at the step before
        self._steps = 0
        self._sites: dict[Any, _Site] = {}

    def reset(self) -> None:
        self._sites.clear()

    def pipe(self) -> Any:
        """That calls, else that was enabled; None without one, and where it is gone."""
        known = self._caller if self._caller is not None else self._pipe
        return None if known is None else known()

    def visit(self, context: str, shapes: Any, t: Tensor, sample: Any, caller: Any = None) -> Visit:
        """Notes a call. t: float [B]; sample: the hidden states it is for, or a list of them; caller: the pipeline that
        makes it, None where none is seen."""
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
        unstepped = index == -1 and self._steps > 0  # somebody's own loop
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
        """How many steps follow that of the last call. ValueError where the pipeline's scheduler cannot tell."""
        if self._pipe is not None and self.pipe() is None:
            raise ValueError("the pipeline whose steps are counted is gone; call disable, and enable the one in use")
        if self._timesteps is None:
            raise ValueError("counting steps from the end takes a pipeline whose scheduler has timesteps")
        scheduler, index = getattr(self.pipe(), "scheduler", None), self._now[1]
        if hasattr(scheduler, "step_index") and index is not None and index >= 0:
            if index == self._before:
                raise ValueError("how many steps are left? The scheduler of the pipeline that is enabled does not step")
            place = index
        else:  # nobody has stepped it, or it does not count
            place = self._steps + self._first_place(scheduler)
        left = len(self._timesteps) - 1 - place
        if left < 0:
            raise ValueError(f"how many steps are left? The pipeline's scheduler has taken all {len(self._timesteps)}")
        return left

    def _first_place(self, scheduler: Any) -> int:
        """Of the run's first time among the scheduler's, which is not 0 for a picture that is only changed."""
        if hasattr(scheduler, "step_index"):
            return getattr(scheduler, "begin_index", None) or 0
        time = self._first[0]
        times = [float(one) for one in self._timesteps]
        return times.index(time) if time > 1 and time in times else 0  # up to 1 it may be in another unit


def _index(scheduler: Any) -> int | None:
    """How many steps the scheduler says it has taken, -1 before the first, None where it does not count."""
    if not hasattr(scheduler, "step_index"):
        return getattr(scheduler, "counter", None)  # of PNDM
    return -1 if scheduler.step_index is None else int(scheduler.step_index)


def _parts(sample: Any) -> list[tuple[Tensor, int | None]]:
    return [(held(one), version(one)) for one in ([sample] if isinstance(sample, Tensor) else sample)]


def held(value: Any) -> Any:
    """Something to compare with later: a copy of tensors whose changes in place are not counted."""
    if isinstance(value, list | tuple):
        return [held(one) for one in value]
    return value.clone() if isinstance(value, Tensor) and version(value) is None else value


def identical_parts(a: Any, b: Any) -> bool:
    """Of two tensors, or two lists of them: NaN equals NaN."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    return all(identical_parts(one, two) for one, two in zip(a, b, strict=True))


def _equal(a: list[tuple[Tensor, int | None]], b: list[tuple[Tensor, int | None]]) -> bool:
    """NaN equals NaN."""
    for (now, new), (then, old) in zip(a, b, strict=True):
        if now is then:
            if new != old:
                return False
        elif not identical_parts(now, then):
            return False
    return True
