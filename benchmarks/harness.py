"""Timing: the variants of a comparison take turns; the first is measured twice, which shows the noise (A/A)."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

AA_TOLERANCE = 0.03  # two measurements of the same thing may differ by this much
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Times:
    """Seconds of a call, or ratios of two calls, one number for each round. Raises ValueError for no or invalid
    numbers."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples or not all(0 <= seconds < float("inf") for seconds in self.samples):
            raise ValueError(f"times are one or more finite numbers of seconds, got {self.samples}")

    def quantile(self, level: float) -> float:
        """Quantile with linear interpolation, numpy's default."""
        return float(np.quantile(self.samples, level))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def n(self) -> int:
        return len(self.samples)

    def row(self) -> dict[str, float]:
        return {
            "median": self.median,
            "p20": self.quantile(0.2),
            "p80": self.quantile(0.8),
            "min": min(self.samples),
            "n": self.n,
        }


@dataclass(frozen=True)
class Comparison:
    """Variants measured in turns. again: second measurement of the first variant."""

    times: Mapping[str, Times]
    again: Times

    @property
    def baseline(self) -> str:
        return next(iter(self.times))

    @property
    def aa_ratio(self) -> float:
        return _ratio(self.again, self.times[self.baseline]).median

    @property
    def usable(self) -> bool:
        return abs(self.aa_ratio - 1) <= AA_TOLERANCE

    def median(self, name: str) -> float:
        return self.times[name].median

    def ratio(self, one: str, other: str) -> Times:
        """Ratios of the seconds of two variants in each round, so that drift between rounds cancels."""
        return _ratio(self.times[one], self.times[other])

    def row(self, name: str) -> dict[str, object]:
        """The timing part of a row."""
        return {"seconds": self.times[name].row(), "aa_ratio": self.aa_ratio, "usable": self.usable}


def _ratio(one: Times, other: Times) -> Times:
    return Times(tuple(a / b for a, b in zip(one.samples, other.samples, strict=True)))


def interleave(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    *,
    pairs: Mapping[str, str] | None = None,
    turn: float = 0.0,
    limit: float = float("inf"),
    kept: Path | None = None,
    label: str = "",
    clock: Callable[[], float] = time.perf_counter,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> Comparison:
    """Runs every variant once in each round, in random order, so that drift favours none.

    repeats: number of rounds. warmup: rounds that are discarded. pairs: variants that run directly after each other, in
    alternating order, to be compared with `Comparison.ratio`. turn: a call shorter than this many seconds is repeated
    for so long, and its mean is taken. limit: after MIN_ROUNDS rounds, no round is started that would exceed this many
    seconds in total. kept: file in which finished rounds are saved; those found there are not run again. timer: runs a
    call's turn and returns the seconds of one call; for asynchronous devices, which the host's clock cannot time.
    Raises ValueError for no variants or invalid numbers.
    """
    if not variants or repeats < 1 or warmup < 0:
        raise ValueError(f"a comparison takes variants, repeats >= 1 and warmup >= 0, got {repeats=}, {warmup=}")
    names = list(variants)
    calls = {**variants, "": variants[names[0]]}
    pairs = pairs or {}
    if set(pairs) & set(pairs.values()):
        raise ValueError(f"a variant belongs to one pair at most, got {pairs}")
    timer = timer or (lambda call: _turn(call, turn, clock))
    units = [[name, *([pairs[name]] if name in pairs else [])] for name in calls if name not in pairs.values()]
    rounds = _read(kept)
    bar = tqdm(total=len(calls) * (warmup + repeats), desc=label, leave=False, disable=None)
    bar.update(len(calls) * len(rounds))
    with torch.inference_mode(), bar:
        for number in (*range(warmup), *range(warmup + len(rounds), warmup + repeats)):
            if len(rounds) >= MIN_ROUNDS and sum(taken for taken, _ in rounds) * (1 + 1 / len(rounds)) > limit:
                break
            started = clock()
            seconds = {}
            for index in np.random.default_rng(number).permutation(len(units)):
                for name in units[index][:: -1 if number % 2 else 1]:
                    seconds[name] = timer(calls[name])
                    bar.update()
            if number >= warmup:
                rounds.append((clock() - started, seconds))
                _write(kept, rounds)
    times = {name: Times(tuple(seconds[name] for _, seconds in rounds[:repeats])) for name in calls}
    return Comparison({name: times[name] for name in names}, times[""])


Round = tuple[float, dict[str, float]]  # seconds of the round, and of every variant


def _read(kept: Path | None) -> list[Round]:
    return json.loads(kept.read_text()) if kept is not None and kept.exists() else []


def _write(kept: Path | None, rounds: list[Round]) -> None:
    if kept is not None:
        part = kept.with_name(kept.name + ".part")
        part.write_text(json.dumps(rounds))
        os.replace(part, kept)  # atomic, so that the file is never incomplete


def _turn(call: Callable[[], object], least: float, clock: Callable[[], float]) -> float:
    """Mean seconds of a call. Not a median, which would hide interference from other processes in short calls."""
    calls, started = 0, clock()
    while True:
        call()
        calls += 1
        taken = clock() - started
        if taken >= least:
            return taken / calls


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that PyTorch's allocator hands out during a call, besides weights and inputs. Includes memory that
    operators allocate internally, and that of compiled code."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every start and stop of the profiler prints a line on stderr
    with (
        torch.inference_mode(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        call()
    live = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Sets PyTorch's number of intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_micro_batch(run: Callable[[int], object], batch: int, seconds: float = 0.2) -> int:
    """The m among 1, 2, 4, ..., batch for which run(m) takes the least time per lane."""
    sizes = [1 << i for i in range(batch.bit_length()) if 1 << i < batch] + [batch]
    per_lane = {}
    with torch.inference_mode():
        run(1)
        for size in tqdm(sizes, desc="best micro-batch", leave=False, disable=None):
            per_lane[size] = _turn(lambda m=size: run(m), seconds, time.perf_counter) / size
    return min(per_lane, key=per_lane.__getitem__)
