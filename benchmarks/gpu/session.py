"""What the GPU suites share: the device and its clock, rows that are not measured twice, and a limit of time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Comparison, interleave, peak_bytes
from benchmarks.rows import Row, Rows, dtype_name, say

Call = Callable[[], object]
MOST_CALLS = 10_000  # in one turn


@dataclass(frozen=True)
class Measured(Comparison):
    """peaks: the most bytes that PyTorch's allocator had out during one call, above what it had before."""

    peaks: Mapping[str, int]

    def row(self, name: str) -> dict[str, object]:
        return {**super().row(name), "peak_bytes": self.peaks[name]}


class OutOfTime(BaseException):
    """The limit came before the last comparison. No error of a comparison: nobody but the command is to catch it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime after so many seconds, whatever is being compiled or measured. For the main thread."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Task:
    """One comparison: kind and parameters say what its rows are; measure makes them."""

    kind: str
    parameters: Mapping[str, object]
    measure: Callable[[], None]


@dataclass(frozen=True)
class Session:
    """rows: where results go (None: nowhere). deadline: on the clock of time.perf_counter; no comparison starts after
    it. presets, batches: those to measure of whatever a suite has (none: all)."""

    device: torch.device
    rows: Rows | None = None
    deadline: float = float("inf")
    presets: Sequence[str] = ()
    batches: Sequence[int] = ()
    pool: Any = field(default=None, init=False)
    keeper: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.rows is not None and self.device.type != "cuda":
            raise ValueError(f"rows are measured on a CUDA device, got {self.device}; a dry run has none")
        if self.device.type == "cuda":
            object.__setattr__(self, "pool", torch.cuda.graph_pool_handle())
            object.__setattr__(self, "keeper", kept_alive(self.pool))

    @property
    def dry(self) -> bool:
        """Without a GPU: every line runs, at tiny sizes, and nothing is claimed of a second."""
        return self.device.type != "cuda"

    @staticmethod
    def chosen(everything: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
        """Those of a suite's own that are wanted; nothing wanted: all."""
        return [one for one in everything if not wanted or one in wanted]

    def missing(self, suite: str, kind: str, parameters: Mapping[str, object]) -> bool:
        """Whether this commit has yet to make these rows on this GPU. Raises OutOfTime where there is no time to."""
        if self.rows is None:
            return True
        # the last row of a comparison: those before it have been written by then
        if any(
            (row["suite"], row["kind"], row["parameters"]) == (suite, kind, dict(parameters))
            and (row["commit"], row["machine"].get("gpu")) == (self.rows.commit, self.rows.machine["gpu"])
            and row.get("last")
            for row in self.rows.rows
        ):
            return False
        if time.perf_counter() > self.deadline:
            raise OutOfTime
        say(f"{suite}: {', '.join(f'{name} {value}' for name, value in parameters.items())}")
        return True

    def compare(self, calls: Mapping[str, Call], repeats: int = 9, turn: float = 0.02, **options: Any) -> Measured:
        """Each call in turns; a turn is one stretch of wall time over many calls that were enqueued without waiting."""
        peaks = {name: self.peak(call) for name, call in calls.items()}
        if self.dry:
            measured = interleave(calls, 1, 0, timer=DeviceTimer(self.device, 0.0))
        else:
            measured = interleave(calls, repeats, timer=DeviceTimer(self.device, turn), **options)
        return Measured(measured.times, measured.again, peaks)

    def peak(self, call: Call) -> int:
        """Bytes, see `Measured`; of a graph those that its call took when it was captured. 0 on a CPU."""
        if isinstance(call, Captured):
            return call.peak
        return 0 if self.device.type != "cuda" else peak_bytes(call, self.device)

    def write(
        self,
        suite: str,
        kind: str,
        parameters: Mapping[str, object],
        measured: Comparison,
        results: Mapping[str, Mapping[str, object]],
        dtype: torch.dtype,
    ) -> None:
        """One row a variant. results: what else a variant's row says."""
        if self.rows is None:
            return
        clocks = gpu_state()
        for position, (variant, own) in enumerate(results.items(), start=1):
            given = {"dtype": dtype_name(dtype), "gpu_state": clocks, "last": position == len(results)}
            self.rows.write(suite, kind, variant, parameters, **given, **measured.row(variant), **own)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def captured(self, call: Call, shared: bool = False) -> Call:
        """The call's kernels as one CUDA graph, so that replaying them costs the host one launch.

        What the call returns lives in memory of its own as long as the graph does; with `shared` it returns nothing
        that is still needed, and all such graphs work in the same memory. On a CPU: the call.
        """
        if self.device.type != "cuda":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            call()  # compiles and allocates what is made once
            peak = peak_bytes(call, self.device)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph, pool=self.pool if shared else None, stream=stream):
            result = call()
        return Captured(graph, None if shared else result, peak)

    def compile(self, function: Callable[..., Any], dynamic: bool, mode: str = "default") -> Callable[..., Any]:
        """torch.compile; in a dry run the function itself."""
        return function if self.dry else torch.compile(function, dynamic=dynamic, mode=mode)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Captured:
    """A call as one CUDA graph. result: what it returned, in the graph's memory; peak: bytes, see `Measured`."""

    graph: Any
    result: object
    peak: int

    def __call__(self) -> object:
        self.graph.replay()
        return self.result


def kept_alive(pool: Any) -> torch.cuda.CUDAGraph:
    """A graph that works in the pool: PyTorch refuses one whose graphs have all gone (pytorch pull request 133600)."""
    some, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        some.zero_()
    return graph


class DeviceTimer:
    """Seconds of one call, over as many as fill `turn` seconds, enqueued one after another; waits at both ends only."""

    def __init__(self, device: torch.device, turn: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.turn, self.clock = device, turn, clock

    def __call__(self, call: Call) -> float:
        once = self._take(call, 1)
        calls = min(round(self.turn / max(once, 1e-9)), MOST_CALLS)
        return self._take(call, calls) if calls > 1 else once

    def _take(self, call: Call, calls: int) -> float:
        started = self._now()
        for _ in range(calls):
            call()
        return (self._now() - started) / calls

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def check_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """RuntimeError unless ||got - want|| <= tolerance ||want||: what is wrong is not timed."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    if not error <= tolerance:
        raise RuntimeError(f"{name} is off by {error:.2e} of the norm, allowed {tolerance:.0e}; not measured")


def no_device() -> str:
    """Why there is no GPU to use: the machine has none, its driver is too old, or PyTorch would not see it."""
    if torch.version.cuda is None:
        return f"PyTorch finds no CUDA device here (torch {torch.__version__} is built without CUDA)"
    try:
        torch.cuda.init()
        why = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    except (RuntimeError, AssertionError) as error:  # which says whether there is no driver, or an old one
        why = str(error).strip().splitlines()[0]
    return f"PyTorch finds no CUDA device here ({why})"


def device_or_exit(command: str) -> torch.device:
    """The current CUDA device; without one the command ends with a line that says so."""
    if not torch.cuda.is_available():
        sys.exit(f"{command}: {no_device()}")
    return torch.device("cuda", torch.cuda.current_device())


def gpu_facts() -> Row:
    """What the numbers depend on, for rows of this device."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": found.name,
        "gpu_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "compute_capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "driver": _query("driver_version"),
    }


def gpu_state() -> Row:
    """Clocks (MHz) and temperature, read right after a measurement; None where nvidia-smi does not tell."""
    names = ("clocks.sm", "clocks.mem", "temperature.gpu")
    values = (_query(",".join(names)) or "").split(", ")
    known = dict(zip(names, values, strict=False)) if len(values) == len(names) else {}
    return {name: int(known[name]) if known.get(name, "").isdecimal() else None for name in names}


def _query(what: str) -> str | None:
    """nvidia-smi's answer for the current device."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def gigabytes(seconds: float, moved: int) -> float:
    """GB/s, of 10^9 bytes."""
    return moved / seconds / 1e9


def teraflops(seconds: float, macs: int) -> float:
    return 2 * macs / seconds / 1e12


def copy_of(session: Session, size: int) -> tuple[Call, int]:
    """A copy of `size` bytes on the device, and the bytes it moves: each is read and written."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=session.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size
