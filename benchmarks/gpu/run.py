"""Measures on a CUDA device and writes rows. The same command continues an interrupted run.

make gpu-bench SUITE=NAME                    ceilings, attention, passes, mlp, network, serving, decision,
                                             diffusers or all
make gpu-bench SUITE=all ARGS='--out DIR'    does not repeat measurements of this commit and GPU in DIR
python3 -m benchmarks.gpu.run --dry                     every suite at tiny sizes on the CPU, nothing timed or written

With PYTHONPATH=python, which make sets.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.gpu import attention, ceilings, decision, diffusers, lacking, mlp, network, passes, serving
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.session import OutOfTime, Session, device_or_exit, gpu_facts, limited
from benchmarks.report.tables import latest, plain
from benchmarks.rows import ROOT, Rows, say

OUT = ROOT / "benchmarks" / "out" / "gpu"
SUITES = {
    "ceilings": ceilings,
    "attention": attention,
    "passes": passes,
    "mlp": mlp,
    "network": network,
    "serving": serving,
    "decision": decision,
    "diffusers": diffusers,
}
LIMIT = 500.0  # seconds, so that a command takes at most nine minutes
GRACE = 0.2  # share of the limit, at most 25 seconds, for the comparison that is running when the limit is reached


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=(*SUITES, "all"), action="append", help="may be repeated (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for rows (default: benchmarks/out/gpu)")
    parser.add_argument("--commit", help="commit to record in rows, for a tree without git")
    parser.add_argument("--preset", action="append", default=[], help="of the suite network; may be repeated")
    parser.add_argument("--batch", action="append", type=int, default=[], help="of the suite network; may be repeated")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds after which no comparison starts (default: 500)"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: shows that every line runs")
    return parser.parse_args(argv)


def run_suite(session: Session, suite: ModuleType) -> int:
    """Runs every comparison without rows. Failures are reported and do not stop the others, except in a dry run.

    Returns the number of failures."""
    failed = 0
    for task in suite.tasks(session):
        if session.missing(suite.SUITE, task.kind, task.parameters):
            try:
                task.measure()
            except torch.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                say(f"out of memory: {str(error).splitlines()[0]}")
                failed += 1
            except Exception:
                if session.dry:
                    raise
                traceback.print_exc()
                failed += 1
    return failed


def main(argv: list[str] | None = None) -> None:
    chosen = arguments(argv)
    suites = [name for name in SUITES if not chosen.suite or {name, "all"} & set(chosen.suite)]
    if chosen.dry:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, which is later
        for name in suites:
            run_suite(Session(torch.device("cpu"), presets=chosen.preset), SUITES[name])
        print(f"dry run of {', '.join(suites)}: nothing was measured")
        return
    device = device_or_exit("gpu-bench")
    try:
        rows = Rows(chosen.out, gpu_facts(), chosen.commit)
    except ValueError as error:
        sys.exit(f"gpu-bench: {error}")
    say("  ".join(f"{name}: {value}" for name, value in rows.machine.items()))
    if lacking.STOOD_IN:
        say(f"not installed, and not needed: {', '.join(lacking.STOOD_IN)}")
    session = Session(device, rows, time.perf_counter() + chosen.limit, chosen.preset, chosen.batch)
    before, stopped, failed = len(rows.rows), False, 0
    try:
        with limited(chosen.limit + min(25.0, GRACE * chosen.limit)):
            for name in suites:
                failed += run_suite(session, SUITES[name])
    except (OutOfTime, KeyboardInterrupt):
        stopped = True
    wanted = {f"gpu-{name}" for name in suites}
    for table in gpu_tables.all_tables([row for row in latest(rows.rows) if row["suite"] in wanted]):
        print("\n" + plain(table))
    print(f"\n{len(rows.rows) - before} new rows in {rows.path}")
    if stopped:
        print("stopped before the end; run the same command to continue")
    if failed:
        sys.exit(f"gpu-bench: {failed} comparisons failed, see above")


if __name__ == "__main__":
    main()
