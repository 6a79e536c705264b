"""Overhead of the engine's Python code, without a GPU: ratios to the plain network, with every block scored, no exits.

python benchmarks/studies/commits/host.py            this commit
python benchmarks/studies/commits/host.py base       commit 28883ee, in the worktree of compare.py --keep FOLDER
                                                     (--tree FOLDER/28883ee)

One thread. Each ratio is the median of interleaved pairs, with that of the plain network to itself (A/A). With device
launches as no-ops: host microseconds for each block, from the difference between 13 blocks and 3, and of a forward pass
or an engine's tick besides its blocks. These calls follow each other in rows, as those of an engine do, so that the
processor's caches hold their code.
"""

import argparse
import dataclasses
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from compare import ROOT, python

Call = Callable[[], object]
THETA = 1e-6  # below every uncertainty, so no lane exits
STEPS = 20
PAIRS = 200
ROW, ROWS = 100, 4  # calls of one kind that follow each other with launches as no-ops, and how often


def ratio(ours: Call, plain: Call, pairs: int = PAIRS) -> dict[str, float]:
    """Ratios of seconds, ours to plain and plain to plain, in pairs of alternating order."""
    for call in (ours, plain, ours, plain):
        call()
    found: list[tuple[float, float]] = []
    for number in range(pairs):
        calls = {"ours": ours, "plain": plain, "again": plain}
        taken = {}
        for name in list(calls)[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            calls[name]()
            taken[name] = time.perf_counter() - started
        found.append((taken["ours"] / taken["plain"], taken["again"] / taken["plain"]))
    over, again = np.array(found).T
    low, high = np.quantile(over, [0.2, 0.8])
    return {"ratio": float(np.median(over)), "p20": low, "p80": high, "aa": float(np.median(again)), "pairs": pairs}


def measure(dialect: object, chosen: set[str]) -> dict[str, dict[str, float]]:
    import adadiff

    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}

    def note(name: str, make: Callable[[], dict[str, float]]) -> None:
        if not chosen or any(part in name for part in chosen):
            found[name] = make()
            print(f"{name:44} " + "  ".join(f"{k} {v:.4g}" for k, v in found[name].items()), flush=True)

    digits = adadiff.load("digits")
    for B in (8, 1, 64):
        x, t, labels = torch.randn(B, 1, 8, 8), torch.linspace(1, 999, B), torch.arange(B) % 10
        pairs = PAIRS if B < 64 else PAIRS // 2
        with torch.inference_mode():
            ours, plain = (
                lambda x=x, t=t, labels=labels: dialect.forward(digits, x, t, labels, THETA),
                lambda x=x, t=t, labels=labels: digits.backbone(x, t, labels),
            )
            note(f"forward, digits, batch {B}", lambda o=ours, p=plain, n=pairs: ratio(o, p, n))
    for B in (8, 1):
        x, t, labels = torch.randn(B, 1, 8, 8), torch.full((B,), 500.0), torch.arange(B) % 10

        def own_calls(x=x, t=t, labels=labels) -> None:
            with torch.inference_mode():
                for _ in range(STEPS):
                    digits.backbone(x, t, labels)

        given = (digits, B, STEPS, THETA, [i % 10 for i in range(B)], B)
        note(f"sample, digits, batch {B}", lambda g=given, p=own_calls: ratio(lambda: dialect.draw(*g), p))
    with torch.inference_mode():
        x, t, labels = torch.randn(64, 1, 8, 8), torch.linspace(1, 999, 64), torch.arange(64) % 10

        def compiled() -> dict[str, float]:
            network = torch.compile(digits.backbone, dynamic=False)
            for way in (lambda: network(x, t, labels), ours_compiled):
                for _ in range(3):
                    way()
            return ratio(ours_compiled, lambda: network(x, t, labels))

        def ours_compiled() -> object:
            return dialect.forward(digits, x, t, labels, THETA, **dialect.compiled())

        note("forward, digits, batch 64, both compiled", compiled)
        note("multiply-add, canvases, budget 0.55", lambda: multiply_add(dialect))
        small = adadiff.build("cifar10_uvit_small", exits=dialect.ExitConfig())
        for B in (1, 8):
            x, t = torch.randn(B, 3, 32, 32), torch.linspace(1, 999, B)
            ours, plain = (
                lambda x=x, t=t: dialect.forward(small, x, t, None, THETA),
                lambda x=x, t=t: small.backbone(x, t),
            )
            note(f"forward, U-ViT-S/2, batch {B}", lambda o=ours, p=plain: ratio(o, p))
        for B in (8, 64):
            note(f"no-op launches, batch {B}", lambda B=B: noop(dialect, small.config, B))
    return found


def multiply_add(dialect: object) -> dict[str, float]:
    """Seconds for each multiply-add in our forward pass with exits, relative to the compiled plain network."""
    import adadiff

    model, plain = adadiff.load("canvases"), adadiff.load("canvases_plain")
    B = 256
    x, t = torch.randn(B, 1, 16, 16), torch.linspace(1, 999, B)[torch.randperm(B)]
    labels = torch.arange(B) % 20
    network = torch.compile(plain.backbone, dynamic=False)

    def in_batches() -> None:
        for part in range(0, B, 64):
            network(*(v[part : part + 64] for v in (x, t, labels)))

    result = dialect.budget(model, x, t, labels, 0.55)
    share = result.macs / result.macs_full
    found = ratio(lambda: dialect.budget(model, x, t, labels, 0.55), in_batches, PAIRS // 4)
    return {name: value / share if name in ("ratio", "p20", "p80") else value for name, value in found.items()}


def noop(dialect: object, config: object, B: int) -> dict[str, float]:
    """Host microseconds for each block of a tiny network, whose matrix products take almost no time."""
    from adadiff import Model

    seconds = {}
    with dialect.noop_launches():
        for depth in (12, 2):
            network = dataclasses.replace(config.network, image_size=2, patch=1, dim=16, heads=2, depth=depth)
            model = Model(dataclasses.replace(config, network=network, exits=dialect.shared_head())).eval()
            x, t = torch.randn(B, *model.backbone.sample_shape), torch.linspace(1, 999, B)
            calls = {
                name: lambda m=model, x=x, t=t, way=way: dialect.forward(m, x, t, None, THETA, **way)
                for name, way in dialect.ways_of_the_device().items()
            }
            calls["plain"] = lambda m=model, x=x, t=t: m.backbone(x, t)
            if hasattr(dialect, "ticks"):
                calls["tick"] = dialect.ticks(model, B, THETA)
            for _ in range(20):
                for call in calls.values():
                    call()
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(ROWS):
                for name, call in calls.items():
                    for _ in range(ROW):
                        started = time.perf_counter()
                        call()
                        taken[name].append(time.perf_counter() - started)
            seconds[depth] = {name: float(np.median(values)) for name, values in taken.items()}
    blocks = {name: (seconds[12][name] - seconds[2][name]) * 1e5 for name in seconds[2]}
    found = {f"{name}_us": value for name, value in blocks.items()} | {"ratio": blocks["ours"] / blocks["plain"]}
    for name in ("captured", "tick"):  # their time besides that of the blocks
        if name in blocks:
            found[f"{name}_beside_us"] = seconds[2][name] * 1e6 - 3 * blocks[name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dialect", nargs="?", choices=("current", "base"), default="current")
    parser.add_argument("--tree", type=Path, default=ROOT, help="where that commit's packages are")
    parser.add_argument("--only", action="append", default=[], help="part of a name; may be repeated")
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if not chosen.here:
        more = [word for part in chosen.only for word in ("--only", part)]
        more += ["--out", str(chosen.out.resolve())] if chosen.out else []
        python(chosen.tree.resolve(), "host.py", "--here", chosen.dialect, *more)
        return
    found = measure(importlib.import_module(chosen.dialect), set(chosen.only))
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
