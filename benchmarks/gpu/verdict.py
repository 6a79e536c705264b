"""Tests, measurements and traces on a GPU in ten minutes, the most important parts first.

make gpu-verdict                                       all parts
make gpu-verdict ARGS="--only tests,network64,dit64"   some of them
make gpu-verdict ARGS="--out DIR --commit HASH"        folder to write to, and commit to record in rows
python3 -m benchmarks.gpu.verdict --dry                every part at tiny sizes, without a GPU: nothing is measured

Each part is a process group with a time limit of its own; the others do not depend on its success. After each part the
folder holds all results so far: log.txt, rows.jsonl, summary.json, junit.xml, trace-8.json.gz and trace-64.json.gz.
Installs nothing. Rows of the same commit and GPU are not measured again.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu import diffusers, lacking
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.session import device_or_exit, gpu_facts
from benchmarks.report.tables import latest, plain
from benchmarks.rows import ROOT, commit, read

OUT = ROOT / "benchmarks" / "out" / "verdict"
LAST_START, END = 540.0, 590.0  # seconds: no part starts after the first, none runs beyond the second
FOUND = 9  # exit status of compute-sanitizer if it finds an error


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu.{name}", *map(str, arguments)]


@dataclass(frozen=True)
class Part:
    """limit: seconds. most: seconds that must be left for it to start. second: runs only if named by --only."""

    name: str
    limit: float
    command: Callable[["Run", float], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    most: float = 15.0
    second: bool = False


@dataclass(frozen=True)
class Outcome:
    """status: ok, failed, late, left out, not run or interrupted."""

    part: str
    status: str
    seconds: float = 0.0
    why: str = ""


def suites(
    *names: str, presets: Sequence[str] = (), batches: Sequence[int] = ()
) -> Callable[["Run", float], list[str]]:
    def command(run: "Run", limit: float) -> list[str]:
        named = [word for name in names for word in ("--suite", name)]
        named += [word for preset in presets for word in ("--preset", preset)]
        named += [word for batch in batches for word in ("--batch", str(batch))]
        return module("run", *named, "--out", run.out, "--commit", run.commit, "--limit", f"{0.8 * limit:.0f}")

    return command


def build(run: "Run", limit: float) -> list[str]:
    """Builds the extension in place, for this GPU alone. A dry run builds elsewhere and does not change it."""
    where = ["--inplace"] if not run.dry else [f"--build-lib={run.scratch}", f"--build-temp={run.scratch}"]
    chips = "90" if run.dry else "native"
    return ["env", f"CUDAARCHS={chips}", sys.executable, "setup.py", "build_ext", *where]


def memcheck(run: "Run", limit: float) -> list[str]:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    checked = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND)] if tool and not run.dry else []
    return [*checked, *module("small")]


L2, DIT = "imagenet256_uvit_large", "dit_xl_2_256"
PARTS = {
    part.name: part
    for part in (
        Part("build", 60, build),
        Part("small", 45, lambda run, limit: module("small")),
        Part(
            "tests",
            120,
            lambda run, limit: module("testing", "--out", str(run.out), "--limit", f"{limit:.0f}"),
        ),
        Part("ceilings", 30, suites("ceilings", "attention")),
        Part("traces", 30, lambda run, limit: module("traces", "--out", str(run.out))),
        Part("passes", 100, suites("passes")),
        Part("network64", 90, suites("network", presets=[L2], batches=[64])),
        Part("network8", 70, suites("network", presets=[L2], batches=[8])),
        Part("serving", 45, suites("serving")),
        Part("decision", 30, suites("decision")),
        Part("mlp", 30, suites("mlp")),
        Part("diffusers", 110, suites("diffusers"), second=True),
        # without PyTorch's caching allocator, memory ends with its tensor, so that every overrun is found
        Part("memcheck", 60, memcheck, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, most=45.0),
        Part("dit64", 90, suites("network", presets=[DIT], batches=[64]), second=True),
        Part("dit8", 70, suites("network", presets=[DIT], batches=[8]), second=True),
    )
}


class Run:
    """A run of the verdict: folder, clock and outcomes of the parts."""

    def __init__(self, out: Path, at: str | None, dry: bool, clock: Callable[[], float] = time.monotonic):
        self.out, self.commit, self.dry, self.clock = out, at or commit(), dry, clock
        self.started, self.outcomes = clock(), []
        self.process: subprocess.Popen | None = None
        self.facts = {} if dry else gpu_facts()
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("a")

    @property
    def scratch(self) -> Path:
        return self.out / "build"

    @property
    def elapsed(self) -> float:
        return self.clock() - self.started

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def run(self, part: Part) -> Outcome:
        limit = min(part.limit, END - self.elapsed)
        if self.elapsed > LAST_START or limit < part.most:
            return Outcome(part.name, "not run", why=f"{max(0.0, END - self.elapsed):.0f} s were left")
        if missing := MISSING.get(part.name, list)():
            return Outcome(part.name, "left out", why=f"missing: {', '.join(missing)}")
        command = [*part.command(self, limit), *(["--dry"] if self.dry and part.name != "build" else [])]
        self.say(f"\n== {self.elapsed:.0f} s: {part.name}, at most {limit:.0f} s: {' '.join(command)}")
        started = self.clock()
        status, last = self.wait(command, {**os.environ, **part.environment}, limit)
        outcome, why = "ok", ""
        if status is None:
            outcome, why = "late", f"not finished after {limit:.0f} s"
        elif status and part.name == "memcheck" and command[0] != sys.executable and status != FOUND:
            outcome, why = "left out", f"the tool does not work here: {last}"
        elif status:
            outcome, why = "failed", last
        return Outcome(part.name, outcome, round(self.clock() - started, 1), why)

    def wait(self, command: Sequence[str], environment: Mapping[str, str], limit: float) -> tuple[int | None, str]:
        """Runs the command in a process group of its own, and prints and logs its output. Returns its exit status (None
        if it exceeded the limit) and its last line."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
        self.process, last, late = process, "", threading.Event()
        timers = [threading.Timer(limit, stop, (process, signal.SIGTERM, late))]
        timers.append(threading.Timer(limit + 3, stop, (process, signal.SIGKILL, late)))
        for timer in timers:
            timer.start()
        try:
            for line in process.stdout:
                self.say(line.rstrip("\n"))
                last = line.strip() or last
            process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            if process.poll() is None:  # interrupted
                stop(process, signal.SIGKILL)
            self.process = None
        return None if late.is_set() else process.returncode, last

    def note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.say(f"== {outcome.part}: {outcome.status}{f', {outcome.why}' if outcome.why else ''}")
        summary = {
            "commit": self.commit,
            "dry": self.dry,
            "seconds": round(self.elapsed, 1),
            "gpu": self.facts,
            "torch": torch.__version__,
            "parts": [asdict(one) for one in self.outcomes],
        }
        part = self.out / "summary.json.part"
        part.write_text(json.dumps(summary, indent=1) + "\n")
        part.replace(self.out / "summary.json")


def stop(process: subprocess.Popen, sign: int, late: threading.Event | None = None) -> None:
    """Signals the whole process group, including the workers of the process."""
    if late is not None:
        late.set()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sign)


def missing_for_build() -> list[str]:
    """What setup.py needs and this machine lacks. Without the extension, PyTorch operators are used."""
    modules = [name for name in ("setuptools", "pybind11") if find_spec(name) is None]
    tools = [name for name in ("cmake", "ninja") if find_spec(name) is None and shutil.which(name) is None]
    compilers = (os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return [
        *modules,
        *tools,
        *([] if any(map(shutil.which, compilers)) else ["a C++ compiler"]),
        *([] if nvcc else ["nvcc"]),
    ]


MISSING: dict[str, Callable[[], list[str]]] = {
    "build": missing_for_build,
    "tests": lambda: [] if find_spec("pytest") else ["pytest"],
    "diffusers": diffusers.missing,
}


def chosen_parts(only: str | None) -> list[Part]:
    """The parts named in `only`, or all but the second ones. Raises ValueError for unknown names."""
    if only is None:
        return [part for part in PARTS.values() if not part.second]
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise ValueError(f"no part {', '.join(unknown) or only!r}; there are {', '.join(PARTS)}")
    return [part for part in PARTS.values() if part.name in names]


def interrupted(sign: int, _: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PART,PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for everything (default: benchmarks/out/verdict)")
    parser.add_argument("--commit", help="commit to record in rows, for a tree without git")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: shows that every part runs")
    chosen = parser.parse_args(argv)
    try:
        parts = chosen_parts(chosen.only)
    except ValueError as error:
        sys.exit(f"gpu-verdict: {error}")
    if not chosen.dry:
        device_or_exit("gpu-verdict")
    signal.signal(signal.SIGTERM, interrupted)
    run = Run(chosen.out, chosen.commit, chosen.dry)
    run.say(f"commit {run.commit}, torch {torch.__version__}, {run.facts.get('gpu', 'no GPU, a dry run')}")
    if lacking.STOOD_IN:
        run.say(f"not installed, replaced by stand-ins (gpu/lacking.py): {', '.join(lacking.STOOD_IN)}")
    for part in parts:
        try:
            run.note(run.run(part))
        except KeyboardInterrupt:
            run.note(Outcome(part.name, "interrupted"))
            break
    shutil.rmtree(run.scratch, ignore_errors=True)
    rows = run.out / "rows.jsonl"
    for table in gpu_tables.all_tables(latest(read(rows))) if rows.exists() else ():
        run.say("\n" + plain(table))
    width = max(len(one.part) for one in run.outcomes)
    lines = (f"{one.part:{width}}  {one.seconds:6.1f} s  {one.status}  {one.why}".rstrip() for one in run.outcomes)
    run.say(f"\nafter {run.elapsed:.0f} s, in {run.out}:\n" + "\n".join(lines))
    sys.exit(any(one.status not in ("ok", "left out") for one in run.outcomes))


if __name__ == "__main__":
    main()
