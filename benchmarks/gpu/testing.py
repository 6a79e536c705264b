"""Runs the tests on this machine's GPU in several processes and writes one junit.xml.

python3 -m benchmarks.gpu.testing --out DIR    first the tests marked `gpu`, then those of tests/kernels, which
                                               use the GPU instead of the interpreter
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.rows import ROOT, cores

WORKERS = 8
GPU_SHARE = 0.65  # of the time: for the tests marked `gpu`
GRACE = 6.0  # seconds for pytest to write its report after an interrupt


@dataclass(frozen=True)
class Stage:
    """Tests, selected by files or folders and by a marker expression."""

    name: str
    paths: Sequence[str]
    marker: str


def stages(dry: bool) -> list[Stage]:
    if dry:
        return [
            Stage("gpu", ["tests/gpu"], "gpu and not slow"),  # all skipped without a GPU
            Stage("kernels", ["tests/kernels/test_settle_rows.py"], "not gpu and not slow"),
        ]
    return [
        Stage("gpu", marked(), "gpu and not slow"),
        Stage("kernels", ["tests/kernels"], "not gpu and not slow"),
    ]


def marked() -> list[str]:
    """Files with tests marked `gpu`; other files may import modules that this machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text()]


def commands(stage: Stage, folder: Path, workers: int) -> list[tuple[list[str], Path]]:
    """Commands and their report files: one command if pytest-xdist is installed, else one for each worker."""
    base = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    base += ["-p", "benchmarks.gpu.lacking", *stage.paths, "-m", stage.marker]
    if find_spec("xdist") is not None:
        report = folder / f"junit-{stage.name}.xml"
        return [([*base, "-n", str(workers), f"--junitxml={report}"], report)]
    made = []
    for i in range(workers):
        report = folder / f"junit-{stage.name}-{i}.xml"
        shard = ["-p", "benchmarks.gpu.shards", "--shard", f"{i}/{workers}", f"--junitxml={report}"]
        made.append(([*base, *shard], report))
    return made


def run(stage: Stage, folder: Path, workers: int, seconds: float) -> tuple[bool, list[Path]]:
    """Whether all tests passed in time, and the reports that were written."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for background jobs of a shell; children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    until = time.monotonic() + seconds
    made = commands(stage, folder, workers)
    processes = [subprocess.Popen(command, cwd=ROOT, start_new_session=True) for command, _ in made]
    try:
        for process in processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{stage.name}: not finished after {seconds:.0f} s", flush=True)
                break
    finally:
        in_time = all(process.poll() is not None for process in processes)
        stop(processes)
    fine = in_time and all(process.returncode in (0, 5) for process in processes)  # 5: a shard without tests
    return fine, [report for _, report in made if report.exists()]


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Sends SIGINT, upon which pytest writes its report, and SIGKILL to processes that continue."""
    for sign, seconds in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        running = [process for process in processes if process.poll() is None]
        for process in running:
            os.killpg(process.pid, sign)
        for process in running:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue


def merge(reports: Sequence[Path], target: Path) -> dict[str, int]:
    """Merges the reports into one file. Returns the numbers of tests, failures, errors, skipped and passed."""
    root = ET.Element("testsuites")
    for report in reports:
        try:
            root.extend(ET.parse(report).getroot().iter("testsuite"))
        except ET.ParseError:
            print(f"{report.name} is incomplete and left out", flush=True)
    part = target.with_name(target.name + ".part")
    ET.ElementTree(root).write(part, encoding="utf-8", xml_declaration=True)
    part.replace(target)
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in root) for name in ("tests", "failures", "errors", "skipped")
    }
    return {**counts, "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for junit.xml")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for all tests (default: 120)")
    parser.add_argument("--workers", type=int, default=max(1, min(WORKERS, cores() // 2)))
    parser.add_argument("--dry", action="store_true", help="run only a few tests, without a GPU")
    chosen = parser.parse_args(argv)
    if find_spec("pytest") is None:
        sys.exit("benchmarks.gpu.testing: pytest is not installed")
    started, reports, failed = time.monotonic(), [], False
    chosen.out.mkdir(parents=True, exist_ok=True)
    for stage, share in zip(stages(chosen.dry), (GPU_SHARE, 1.0), strict=True):
        left = chosen.limit - (time.monotonic() - started) - GRACE
        fine, written = run(stage, chosen.out, chosen.workers, max(0.0, share * left))
        failed, reports = failed or not fine, reports + written
        counts = merge(reports, chosen.out / "junit.xml")
        print(f"after the tests of {stage.name}: {', '.join(f'{n} {name}' for name, n in counts.items())}", flush=True)
    for report in reports:
        report.unlink()
    sys.exit(failed)


if __name__ == "__main__":
    main()
