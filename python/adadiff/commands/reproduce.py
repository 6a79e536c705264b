"""adadiff reproduce: convert, draw and evaluate as the authors did, one command after the other."""

import argparse
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ..metrics.published import PUBLISHED, Published
from ..output.filling import Process
from ..output.pictures import write_json
from ..output.shards import Manifest, present
from ..reading import read_json
from .terminal import print_table, say

SHARD = 500  # samples
Run = Callable[[Sequence[str]], None]


def reproduce(options: argparse.Namespace, run: Run) -> None:
    """run: executes one adadiff command line, given as its arguments."""
    if options.preset is None:
        _show_table()
        return
    published = _published(options.preset)
    missing = [name for name in ("weights", "reference", "features", "out") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"{options.preset} takes --{', --'.join(missing)}; without a preset, the table is shown")
    if options.n is not None and options.n < 2:
        raise ValueError(f"--n must be at least 2, got {options.n}")
    model, samples, result = (options.out / name for name in ("model.safetensors", "samples", "result.json"))
    process = Process.of(os.environ)
    lines = commands(options, published, model, samples, result)
    if not model.exists():
        if process.rank:
            raise ValueError(f"{model} is not there yet; convert it by one process first, with `--n 2`")
        options.out.mkdir(parents=True, exist_ok=True)
        _run(lines["convert"], run)
    _run(lines["sample"], run)
    manifest = Manifest.read(samples)
    done = len(present(samples, manifest))
    if done < manifest.shards:
        say(f"{done} of {manifest.shards} shards are done; run the same command again when the others are, to evaluate")
        return
    if process.rank:
        return
    _run(lines["evaluate"], run)
    _compare(options.preset, published, manifest.n, read_json(result), options)


def commands(
    options: argparse.Namespace, published: Published, model: Path, samples: Path, result: Path
) -> dict[str, list[str]]:
    """Arguments of the three commands to run, by command."""
    n = published.n if options.n is None else options.n
    convert = ["convert", str(options.weights), str(model), "--preset", options.preset]
    sample = ["sample", str(model), "--out", str(samples), "-n", str(n), "--format", "npz", "--shard", str(SHARD)]
    sample += ["--steps", str(published.steps), "--solver", published.solver, "--policy", options.policy]
    sample += ["--batch", str(options.batch)]
    if published.classes:
        sample += ["--class-labels", ",".join(map(str, range(published.classes)))]
    if published.guidance_scale != 1:
        sample += ["--guidance-scale", f"{published.guidance_scale:g}"]
    for name in ("device", "dtype", "decoder"):
        if (value := getattr(options, name)) is not None:
            sample += [f"--{name}", str(value)]
    evaluate = ["evaluate", str(samples), "--reference", str(options.reference), "--json", str(result), "--force"]
    if options.features is not None:
        evaluate += ["--features", options.features]
    return {"convert": convert, "sample": sample, "evaluate": evaluate}


def _published(preset: str) -> Published:
    if preset not in PUBLISHED:
        raise ValueError(f"no published result is known for preset {preset!r}, only for {', '.join(PUBLISHED)}")
    return PUBLISHED[preset]


def _run(line: list[str], run: Run) -> None:
    shown = shlex.join(line)
    say(f"adadiff {shown if len(shown) < 400 else shown[:300] + ' ...'}")
    run(line)


def _compare(
    preset: str, published: Published, n: int, measured: dict[str, object], options: argparse.Namespace
) -> None:
    found = _distance(measured)
    content = {
        "preset": preset, "n": n, "fid": found, "published": published.fid, "published_n": published.n,
        "solver": published.solver, "steps": published.steps, "guidance_scale": published.guidance_scale,
        "policy": options.policy, "source": published.source,
    }  # fmt: skip
    write_json(options.out / "reproduction.json", content)
    other = "" if n == published.n else f" (of {n} samples instead of {published.n}: not comparable)"
    say(f"{preset}: Fréchet distance {found:.2f}{other}; published {published.fid:.2f}, {published.source}")


def _distance(measured: dict[str, object]) -> float:
    results = measured["results"]
    (values,) = results.values() if isinstance(results, dict) else ({},)
    return float(values["frechet"])


def _show_table() -> None:
    print_table(
        [
            {
                "preset": name,
                "solver": p.solver,
                "steps": str(p.steps),
                "guidance": f"{p.guidance_scale:g}",
                "samples": f"{p.n:,}",
                "FID": f"{p.fid:.2f}",
                "reference": p.reference,
            }
            for name, p in PUBLISHED.items()
        ]
    )
