"""Measures early exit on this machine: speed, and quality of the images.

Prints a short summary; the folder --out gets report.html, tables.txt, pictures and rows.jsonl.

python benchmarks/run.py [--quick]            both suites, short: under 8 minutes (90 s) on 2 cores
python benchmarks/run.py --suite network      U-ViT-S/2 at batch 8 and 64, both dtypes, compiled baseline
python benchmarks/run.py --suite serving      throughput and latency of continuous batching: 50 minutes (--quick: 1)
python benchmarks/run.py --suite admission    order of waiting requests, on a virtual clock: 5 minutes
python benchmarks/run.py --suite http         the HTTP service compared with its engine: 20 minutes (--quick: 1)
python benchmarks/run.py --suite quality --data canvases     all methods at equal seconds: 50 minutes
python benchmarks/run.py --suite quality --data letters --screen 256 --samples 2048     five hours
python benchmarks/run.py --suite diffusers    caches in diffusers transformers: 8 minutes (--quick: 1)
python benchmarks/run.py --suite head-to-head --data canvases    other packages and methods: 25 minutes (--quick: 2)
python benchmarks/run.py --suite models       every published network: on a GPU all, on a CPU the small ones
python benchmarks/run.py --suite digits --samples 10000 --seeds 3 --quality-only --out DIR
"""

import argparse
import dataclasses
import datetime
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from adadiff.calibration.reuse_errors import LEAST_STEPS
from adadiff.commands.values import shares, whole_numbers
from adadiff.writing import replace_file
from benchmarks.baselines.sweeps import COARSE, LARGE, QUICK, Networks, Sweep, default_networks
from benchmarks.gpu.session import gpu_facts
from benchmarks.harness import threads
from benchmarks.report import html, plots
from benchmarks.report.summary import REPORT, TABLES, summary
from benchmarks.report.tables import all_tables, plain
from benchmarks.rows import ROOT, Rows, cores, machine, say
from benchmarks.suites import admission, digits, headline, http, network, pipelines, quality, serving
from benchmarks.suites import models as presets
from benchmarks.suites.equal_seconds import Comparison
from benchmarks.suites.judging import DATA
from benchmarks.suites.network import Setting

OUT = ROOT / "benchmarks" / "out"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suites = (
        "default",
        "admission",
        "diffusers",
        "digits",
        "head-to-head",
        "headline",
        "http",
        "models",
        "network",
        "quality",
        "serving",
    )
    parser.add_argument("--suite", choices=suites, default="default")
    parser.add_argument("--quick", action="store_true", help="few repeats and samples, to see that it works")
    parser.add_argument("--out", type=Path, help="folder for all output (default: benchmarks/out/DATE)")
    parser.add_argument("--presets", help="suite models: networks, separated by commas (quick: digits)")
    parser.add_argument(
        "--samples", type=_positive, help="samples for each method (default: 1000, suite quality: 512; quick: 200)"
    )
    parser.add_argument("--seeds", type=_positive, default=1, help="independent runs of --samples each (default: 1)")
    parser.add_argument(
        "--processes", type=_positive, default=cores(), help="processes that draw, of one thread each (default: cores)"
    )
    parser.add_argument(
        "--quality-only", action="store_true", help="no timing; existing rows in --out are not measured again"
    )
    parser.add_argument(
        "--data", choices=DATA, default=DATA[0], help="suites quality and head-to-head: data set (default: digits)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        type=_model,
        default=[],
        metavar="ROLE=MODEL",
        help="suite quality: full, with exits; plain, without exits, trained with the same budget; shallow, trained "
        "separately: a shipped name, a file, or empty to leave it out (default: DATA, DATA_plain and DATA_shallow, "
        "shipped or in runs/)",
    )
    parser.add_argument("--rounds", type=_positive, help="suite quality: rounds of timing; more if the machine is busy")
    parser.add_argument(
        "--screen",
        type=_positive,
        default=0,
        help="suite quality: screen all settings with this many samples, and judge only those within 10 %% of a front "
        "with --samples others (default: judge all)",
    )
    parser.add_argument("--full-sweep", action="store_true", help="suite quality: all settings; takes hours")
    parser.add_argument("--steps", type=whole_numbers, help="suite quality: numbers of solver steps, as in 6,10,20")
    parser.add_argument("--budgets", type=shares, help="suite quality: shares of the work, as in 0.4,0.55")
    chosen = parser.parse_args(argv)
    if chosen.quality_only and chosen.suite not in ("default", "digits", "quality"):
        parser.error(f"the suite {chosen.suite} measures no quality; use --suite digits")
    if chosen.suite == "http" and find_spec("uvicorn") is None:
        parser.error("the suite http needs the service: pip install 'adadiff_kernels[serve]'")
    if chosen.suite == "diffusers" and find_spec("diffusers") is None:
        parser.error("the suite diffusers needs diffusers: pip install 'adadiff_kernels[diffusers]'")
    if chosen.suite == "head-to-head" and any(find_spec(name) is None for name in ("diffusers", "cache_dit")):
        parser.error("the suite head-to-head needs diffusers and cache-dit: pip install 'adadiff_kernels[bench]'")
    if chosen.presets is not None and chosen.suite != "models":
        parser.error("--presets is for --suite models")
    try:
        chosen.preset_setting = preset_setting(chosen)
    except ValueError as error:
        parser.error(str(error))
    chosen.samples = chosen.samples or (200 if chosen.quick else 512 if chosen.suite == "quality" else 1000)
    chosen.out = chosen.out or OUT / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return chosen


def _model(text: str) -> tuple[str, str | None]:
    role, equals, name = text.partition("=")
    if not equals or role not in (field.name for field in dataclasses.fields(Networks)):
        raise argparse.ArgumentTypeError(f"takes full=MODEL, plain=MODEL or shallow=MODEL, got {text!r}")
    return role, name or None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def main() -> None:
    chosen = arguments()
    try:
        cuda = chosen.suite == "models" and chosen.preset_setting.device.type == "cuda"
        rows = Rows(chosen.out, gpu_facts() if cuda else None)
        comparison = compared(rows, chosen) if chosen.suite == "quality" else None
    except ValueError as error:
        sys.exit(f"run.py: {error}")
    say(f"rows and report go to {chosen.out}")
    interrupted = False
    try:
        measure(rows, comparison, chosen)
    except KeyboardInterrupt:
        interrupted = True
    report(rows)
    if interrupted:
        sys.exit("interrupted: what was finished is in the rows")


def measure(rows: Rows, comparison: Comparison | None, chosen: argparse.Namespace) -> None:
    if chosen.suite == "admission":
        admission.run(rows, admission.QUICK if chosen.quick else admission.FULL)
    if chosen.suite == "http":
        http.run(rows, http.QUICK if chosen.quick else http.FULL)
    if chosen.suite == "serving":
        serving.run(rows, serving.QUICK if chosen.quick else serving.FULL)
    if chosen.suite == "headline":
        headline.run(rows)
    if chosen.suite == "head-to-head":
        from benchmarks.suites import head_to_head  # imports cache-dit

        sizes = head_to_head.QUICK if chosen.quick else head_to_head.FULL
        head_to_head.HeadToHead(rows, chosen.data, default_networks(chosen.data).full, sizes).run()
    if chosen.suite == "diffusers":
        pipelines.run(rows, pipelines.QUICK if chosen.quick else pipelines.FULL)
    if comparison is not None:
        given = {"samples": chosen.samples, "runs": chosen.seeds, "processes": chosen.processes}
        comparison.run(**given, timing=not chosen.quality_only, screen=chosen.screen)
    if chosen.suite == "models":
        presets.run(rows, chosen.preset_setting)
    if chosen.suite in ("default", "digits"):
        measure_digits(rows, chosen)
    if chosen.suite in ("default", "network") and not chosen.quality_only:
        network.run(rows, network_settings(chosen))


def report(rows: Rows) -> None:
    """Writes tables, pictures and an HTML page with both to the rows' folder, and prints the summary to stdout."""
    say("tables, pictures and report")
    lines = summary(rows.rows, rows.folder)
    pictures = [*plots.draw(rows.rows, rows.folder), *sorted(rows.folder.glob("reliability-*.png"))]
    tables = "\n\n".join(plain(table) for table in all_tables(rows.rows)) + "\n"
    page = html.page(lines[:-1], rows.rows, pictures)  # without the last line, the path of the report
    for name, text in ((TABLES, tables), (REPORT, page)):
        replace_file(rows.folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    print(file=sys.stderr)
    print(*lines, sep="\n", flush=True)


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


def compared(rows: Rows, chosen: argparse.Namespace) -> Comparison:
    models = dict(chosen.models)
    networks = Networks(**models) if len(models) == 3 else dataclasses.replace(default_networks(chosen.data), **models)
    usual = LARGE if networks.large else COARSE
    sweep = QUICK if chosen.quick else Sweep() if chosen.full_sweep else usual
    given = {"steps": chosen.steps, "budgets": chosen.budgets}
    if chosen.steps:
        solver = sweep.estimated[0][0]
        estimated = tuple((solver, steps) for steps in chosen.steps if steps >= LEAST_STEPS)
        sweep = dataclasses.replace(sweep, between=(), estimated=estimated)
    sweep = dataclasses.replace(sweep, **{name: tuple(value) for name, value in given.items() if value})
    if chosen.rounds:
        sweep = dataclasses.replace(sweep, repeats=chosen.rounds, limit=math.inf)
    for role, name in dataclasses.asdict(networks).items():
        say(f"{role}: {name or 'none, so nothing that needs it is compared'}")
    return Comparison(rows, chosen.data, networks, sweep)


def preset_setting(chosen: argparse.Namespace) -> presets.Setting:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = None if chosen.presets is None else chosen.presets.split(",")
    if chosen.quick:
        return presets.Setting(device, names or ["digits"], repeats=2, limit=20)
    return presets.Setting(device, names)


def network_settings(chosen: argparse.Namespace) -> list[Setting]:
    """Settings of the suite network. bfloat16 only if the CPU supports it natively."""
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
