"""Measures early exit on this machine: speed, and beside it the quality of the images.

python benchmarks/run.py [--quick]            both suites, short: under 8 minutes (90 s) on 2 cores
python benchmarks/run.py --suite network      U-ViT-S/2 at batch 8 and 64, both dtypes, compiled baseline
python benchmarks/run.py --suite serving      throughput and latency of continuous batching: 50 minutes (--quick: 1)
python benchmarks/run.py --suite models       every published network: on a GPU all, on a CPU the small ones
python benchmarks/run.py --suite digits --samples 10000 --seeds 3 --quality-only --out DIR
"""

import argparse
import datetime
import sys
from pathlib import Path

import digits
import network
import plots
import presets
import quality
import serving
import torch
from gpu.session import gpu_facts
from harness import threads
from network import Setting
from rows import ROOT, Rows, cores, machine, say
from tables import all_tables, plain

OUT = ROOT / "benchmarks" / "out"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("default", "digits", "network", "serving", "models"), default="default")
    parser.add_argument("--quick", action="store_true", help="few repeats, few samples: shows that it works")
    parser.add_argument("--out", type=Path, help="folder for rows and pictures (default: benchmarks/out/DATE)")
    parser.add_argument("--presets", help="of the suite models, separated by commas (quick: digits)")
    parser.add_argument("--samples", type=_positive, help="digits drawn by each method (default: 1000; quick: 200)")
    parser.add_argument("--seeds", type=_positive, default=1, help="independent runs of so many samples (default: 1)")
    parser.add_argument("--processes", type=_positive, default=cores(), help="that draw digits, one thread each")
    parser.add_argument(
        "--quality-only", action="store_true", help="no timing; rows that --out has are not drawn again"
    )
    chosen = parser.parse_args(argv)
    if chosen.quality_only and chosen.suite in ("network", "serving", "models"):
        parser.error(f"the suite {chosen.suite} measures no quality; use --suite digits")
    if chosen.presets is not None and chosen.suite != "models":
        parser.error("--presets are those of --suite models")
    try:
        chosen.models = preset_setting(chosen)
    except ValueError as error:
        parser.error(str(error))
    chosen.samples = chosen.samples or (200 if chosen.quick else 1000)
    chosen.out = chosen.out or OUT / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return chosen


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def main() -> None:
    chosen = arguments()
    try:
        cuda = chosen.suite == "models" and chosen.models.device.type == "cuda"
        rows = Rows(chosen.out, gpu_facts() if cuda else None)
    except ValueError as error:
        sys.exit(f"run.py: {error}")
    say("  ".join(f"{name}: {value}" for name, value in machine().items()))
    before = len(rows.rows)
    interrupted = False
    try:
        if chosen.suite == "serving":
            serving.run(rows, serving.QUICK if chosen.quick else serving.FULL)
        if chosen.suite == "models":
            presets.run(rows, chosen.models)
        if chosen.suite in ("default", "digits"):
            measure_digits(rows, chosen)
        if chosen.suite in ("default", "network") and not chosen.quality_only:
            network.run(rows, network_settings(chosen))
    except KeyboardInterrupt:
        interrupted = True
    for table in all_tables(rows.rows):
        print("\n" + plain(table))
    pictures = plots.draw(rows.rows, chosen.out)
    print(f"\n{len(rows.rows) - before} new rows in {rows.path}")
    print(*(f"picture: {path}" for path in pictures), sep="\n")
    if interrupted:
        sys.exit("interrupted: what was finished is in the rows")


def measure_digits(rows: Rows, chosen: argparse.Namespace) -> None:
    middle = len(digits.THRESHOLDS) // 2
    thresholds = digits.THRESHOLDS[middle : middle + 1] if chosen.quick else digits.THRESHOLDS
    if not chosen.quality_only:
        if chosen.quick:
            digits.speed(rows, thresholds, samples=64, repeats=3, limit=5, grid=3)
            digits.overhead(rows, [torch.float32], repeats=5, limit=3)
        else:
            digits.speed(rows, thresholds)
            digits.overhead(rows)
            if chosen.suite == "digits" and torch.get_num_threads() > 1:
                with threads(1):
                    digits.speed(rows, thresholds)
                    digits.overhead(rows)
    quality.measure(
        rows,
        digits.MODEL,
        digits.PLAIN_MODEL,
        thresholds,
        digits.FEWER_STEPS,
        samples=chosen.samples,
        runs=chosen.seeds,
        processes=chosen.processes,
    )


def preset_setting(chosen: argparse.Namespace) -> presets.Setting:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = None if chosen.presets is None else chosen.presets.split(",")
    if chosen.quick:
        return presets.Setting(device, names or ["digits"], repeats=2, limit=20)
    return presets.Setting(device, names)


def network_settings(chosen: argparse.Namespace) -> list[Setting]:
    """bfloat16 where the CPU multiplies it itself; emulated, it would only measure the emulation."""
    native = machine()["bfloat16"]
    every = torch.get_num_threads()
    dtype = torch.bfloat16 if native else torch.float32
    if chosen.quick:
        return [Setting(4, dtype, every, repeats=2)]
    if chosen.suite == "network":
        if not native:
            say("bfloat16 is emulated on this CPU and is left out")
        dtypes = (torch.float32, torch.bfloat16) if native else (torch.float32,)
        settings = [Setting(batch, d, every, 9, 60 + 6 * batch, compiled=True) for d in dtypes for batch in (8, 64)]
        return settings + [Setting(8, d, 1, 5, 120) for d in dtypes if every > 1]
    settings = [Setting(8, dtype, every, 5, 40), Setting(32, dtype, every, 2)]
    return settings + [Setting(8, dtype, 1, 2)] * (every > 1)


if __name__ == "__main__":
    main()
