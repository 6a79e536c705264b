"""Builds the extension in place and tests everything on this machine's GPU, within nine minutes: make gpu-check

Works with a python3 as it is: what is missing is named, and left out.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from rows import ROOT, cores

from gpu import lacking
from gpu.session import no_device

LIMIT = 530.0  # seconds
SANITIZED = 120.0  # seconds for one tool
RESERVED = 150.0  # seconds that tests leave for the tools
FOUND = 9  # exit status with which compute-sanitizer says that it found something
PYTHON = sys.executable


class Check:
    """Steps, each with what came of it."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.started, self.limit = time.perf_counter(), limit
        self.outcomes: dict[str, str] = {}
        self.failed = False

    def left(self) -> float:
        return self.limit - (time.perf_counter() - self.started)

    def command(
        self, name: str, command: Sequence[str], most: float | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str] | None:
        """Runs it in the time that is left, showing what it prints. None: it took too long."""
        seconds = self.left() if most is None else min(most, self.left())
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        if seconds <= 0:
            self.note(name, "not run: no time left", failed=True)
            return None
        started, lines = time.perf_counter(), []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True, **pipes
        )
        late = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))  # with the workers that it started
        late.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        process.wait()
        late.cancel()
        if process.returncode == -signal.SIGKILL:
            self.note(name, f"not finished after {seconds:.0f} s", failed=True)
            return None
        failed = process.returncode != 0
        self.note(name, f"{'FAILED' if failed else 'ok'}, {time.perf_counter() - started:.0f} s", failed)
        return subprocess.CompletedProcess(command, process.returncode, "".join(lines))

    def note(self, name: str, outcome: str, failed: bool = False) -> None:
        self.outcomes[name] = outcome
        self.failed |= failed


def missing_for_build() -> list[str]:
    """What setup.py needs and this machine lacks."""
    modules = [name for name in ("setuptools", "pybind11") if find_spec(name) is None]
    tools = [name for name in ("cmake", "ninja") if find_spec(name) is None and shutil.which(name) is None]
    compilers = (os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++")
    return [*modules, *tools, *([] if any(map(shutil.which, compilers)) else ["a C++ compiler"])]


def build(check: Check) -> None:
    if missing := missing_for_build():
        check.note("build", f"left out, missing: {', '.join(missing)}; PyTorch takes the extension's place")
        return
    check.command("build", [PYTHON, "setup.py", "build_ext", "--inplace"])


def test(check: Check) -> None:
    if find_spec("pytest") is None:
        check.note("tests", "not run, missing: pytest", failed=True)
        return
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu.lacking"]
    if find_spec("xdist") is not None:  # most of the time is Triton's compiler's, on one core
        pytest += ["-n", str(max(1, min(8, cores() // 2)))]
    check.command("GPU tests", [*pytest, *marked(), "-m", "gpu"], check.left() - RESERVED)
    # those of tests/kernels run on the device where there is one
    check.command("kernels", [*pytest, "tests/kernels", "-m", "not gpu and not slow"], check.left() - RESERVED)


def marked() -> list[str]:
    """Files with tests for a GPU: others may import what this machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text()]


def sanitize(check: Check) -> None:
    """Memory accesses, then races in shared memory, of every kernel at small sizes."""
    small = [PYTHON, "-m", "gpu.small"]
    done = check.command("small run", small)
    if done is None or done.returncode:
        return
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        check.note("compute-sanitizer", "left out: it is not installed")
        return
    for kind in ("memcheck", "racecheck"):
        name = f"compute-sanitizer {kind}"
        was = check.failed
        # without PyTorch's cache every tensor ends where its memory does
        command = [tool, "--tool", kind, "--error-exitcode", str(FOUND), *small]
        done = check.command(name, command, SANITIZED, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if done is not None and done.returncode not in (0, FOUND):
            check.failed = was  # the same run passes without the tool
            lines = done.stdout.strip().splitlines() or ["it said nothing"]
            check.note(name, f"left out: the tool does not work here ({lines[-1].strip()})")


def summary(outcomes: Mapping[str, str]) -> str:
    width = max(map(len, outcomes), default=0)
    return "\n".join(f"{name.ljust(width)}  {outcome}" for name, outcome in outcomes.items())


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit(f"gpu-check: {no_device()}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {PYTHON}")
    if lacking.STOOD_IN:
        print(f"not installed here, and stood in for (gpu/lacking.py): {', '.join(lacking.STOOD_IN)}")
    check = Check()
    for step in (build, test, sanitize):
        step(check)
    print(f"\n{summary(check.outcomes)}")
    sys.exit(check.failed)


if __name__ == "__main__":
    main()
