"""Shared by the GPU suites: device, timing, rows (which are not measured twice) and a time limit."""

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
    """peaks: peak bytes that PyTorch's allocator had in use during a call, beyond those before it."""

    peaks: Mapping[str, int]

    def row(self, name: str) -> dict[str, object]:
        return {**super().row(name), "peak_bytes": self.peaks[name]}


class OutOfTime(BaseException):
    """The time limit was reached before the last comparison. A BaseException, so that only the command catches it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in its block after so many seconds, also during a compilation. For the main thread only."""

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
    """One comparison. kind, parameters: of its rows; measure: makes them."""

    kind: str
    parameters: Mapping[str, object]
    measure: Callable[[], None]


@dataclass(frozen=True)
class Session:
    """rows: where results are written (None: nowhere). deadline: on the clock of time.perf_counter; no comparison
    starts after it. presets, batches: restrict those of a suite (empty: all)."""

    device: torch.device
    rows: Rows | None = None
    deadline: float = float("inf")
    presets: Sequence[str] = ()
    batches: Sequence[int] = ()
    pool: Any = field(default=None, init=False)
    keeper: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.rows is not None and self.device.type != "cuda":
            raise ValueError(f"rows need a CUDA device, got {self.device}; leave rows out for a dry run")
        if self.device.type == "cuda":
            object.__setattr__(self, "pool", torch.cuda.graph_pool_handle())
            object.__setattr__(self, "keeper", kept_alive(self.pool))

    @property
    def dry(self) -> bool:
        """Whether there is no GPU: all code runs at tiny sizes, and nothing is timed."""
        return self.device.type != "cuda"

    @staticmethod
    def chosen(everything: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
        """The elements of `everything` that are in `wanted`; all of them if `wanted` is empty."""
        return [item for item in everything if not wanted or item in wanted]

    def missing(self, suite: str, kind: str, parameters: Mapping[str, object]) -> bool:
        """Whether there are no such rows of this commit and GPU yet. Raises OutOfTime if so after the deadline."""
        if self.rows is None:
            return True
        # the last row of a comparison shows that all of its rows were written
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
        """Times the calls in turns. A turn measures the wall time of many calls, enqueued without waiting, in about
        `turn` seconds."""
        peaks = {name: self.peak(call) for name, call in calls.items()}
        if self.dry:
            measured = interleave(calls, 1, 0, timer=DeviceTimer(self.device, 0.0))
        else:
            measured = interleave(calls, repeats, timer=DeviceTimer(self.device, turn), **options)
        return Measured(measured.times, measured.again, peaks)

    def peak(self, call: Call) -> int:
        """Peak bytes, see `Measured`; for a graph, those of its call before the capture. 0 on a CPU."""
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
        """Writes a row for each variant. results: variant -> further fields of its row."""
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
        """The call's kernels as one CUDA graph, so that the host launches them at once. On a CPU, the call itself.

        The result lives in memory of the graph's own, as long as the graph. With `shared`, all graphs use the same
        memory, and the result is None.
        """
        if self.device.type != "cuda":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            call()  # warm-up: compiles, allocates what is made once
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
    """A call as one CUDA graph. result: its return value, in the graph's memory; peak: bytes, see `Measured`."""

    graph: Any
    result: object
    peak: int

    def __call__(self) -> object:
        self.graph.replay()
        return self.result


def kept_alive(pool: Any) -> torch.cuda.CUDAGraph:
    """A graph that keeps the pool in use: PyTorch refuses a pool whose graphs are all gone (pytorch PR 133600)."""
    some, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        some.zero_()
    return graph


class DeviceTimer:
    """Seconds per call: the mean of as many as fill `turn` seconds, with synchronisation only before and after all."""

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
    """Raises RuntimeError unless ||got - want|| <= tolerance ||want||, so that nothing wrong is timed."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    if not error <= tolerance:
        raise RuntimeError(f"{name} is off by {error:.2e} of the norm, allowed {tolerance:.0e}; not measured")


def no_device() -> str:
    """The reason why PyTorch finds no GPU: a build without CUDA, no GPU, or an old driver."""
    if torch.version.cuda is None:
        return f"PyTorch finds no CUDA device here (torch {torch.__version__} is built without CUDA)"
    try:
        torch.cuda.init()
        why = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    except (RuntimeError, AssertionError) as error:  # its message names a missing or old driver
        why = str(error).strip().splitlines()[0]
    return f"PyTorch finds no CUDA device here ({why})"


def device_or_exit(command: str) -> torch.device:
    """The current CUDA device. Without one, exits with a message."""
    if not torch.cuda.is_available():
        sys.exit(f"{command}: {no_device()}")
    return torch.device("cuda", torch.cuda.current_device())


def gpu_facts() -> Row:
    """The fields of `machine` in rows of this device: GPU, CUDA and driver."""
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
    """Clocks (MHz) and temperature (Celsius) by nvidia-smi, to be read right after a measurement; None if unknown."""
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
    """GB/s, with 1 GB = 10^9 bytes."""
    return moved / seconds / 1e9


def teraflops(seconds: float, macs: int) -> float:
    return 2 * macs / seconds / 1e12


def copy_of(session: Session, size: int) -> tuple[Call, int]:
    """A copy of `size` bytes on the device, and the bytes that it reads and writes together."""
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=session.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size
