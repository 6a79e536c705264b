"""The first figures of the README: images of one call, full, with early exit and with reuse, and the seconds of each.

The full network is timed in a plain loop, eager and compiled; the others through `adadiff.sample`, eager and compiled.
The faster way of each counts. One thread, all samples in one batch, with classifier-free guidance.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import adadiff
from benchmarks.harness import interleave, threads
from benchmarks.rows import Rows, say
from benchmarks.suites.drawing import (
    Method,
    compiled_network,
    in_engine,
    in_plain_loop,
    load,
    sampled,
    seeds_and_labels,
)
from benchmarks.suites.network import compiles

SUITE = "headline"
MODEL, STEPS, GUIDANCE, SAMPLES = "letters", 20, 2.0, 64
ESTIMATES = "letters_reuse"  # of errors, for the same steps and guidance
FULL = Method("full network", MODEL, steps=STEPS, guidance_scale=GUIDANCE)
EARLY = Method("early exit", MODEL, policy="exit:budget=0.55", steps=STEPS, guidance_scale=GUIDANCE)
REUSE = Method("reuse", MODEL, policy=f"estimate:{ESTIMATES},share=0.55", steps=STEPS, guidance_scale=GUIDANCE)
ADAPTIVE = (EARLY, REUSE)


def run(rows: Rows, repeats: int = 9, limit: float = 600.0) -> None:
    policies = " and ".join(method.policy for method in ADAPTIVE)
    say(f"{SUITE}: {SAMPLES} {MODEL}, {STEPS} steps, guidance {GUIDANCE:g}, full, {policies}, one thread")
    with threads(1):
        measure(rows, repeats, limit)


def drawn(method: Method) -> tuple[Tensor, adadiff.Report]:
    """The samples that are timed."""
    return sampled(method, *seeds_and_labels(0, SAMPLES, load(MODEL).config.classes), SAMPLES)


def measure(rows: Rows, repeats: int, limit: float) -> None:
    seeds, labels = seeds_and_labels(0, SAMPLES, load(MODEL).config.classes)
    ways: dict[tuple[str, str], Callable[[], object]] = {
        (FULL.name, "loop"): lambda: in_plain_loop(FULL, seeds, labels, SAMPLES),
        (FULL.name, "compiled loop"): lambda: in_plain_loop(FULL, seeds, labels, SAMPLES, compiled=True),
    }
    for method in ADAPTIVE:
        ways[method.name, "engine"] = partial(in_engine, method, seeds, labels, SAMPLES)
        ways[method.name, "compiled engine"] = partial(in_engine, method, seeds, labels, SAMPLES, "compiled")
    torch.compiler.reset()
    compiled_network.cache_clear()
    if not compiles(*(call for (_, way), call in ways.items() if "compiled" in way)):
        ways = {key: call for key, call in ways.items() if "compiled" not in key[1]}
    measured = interleave(
        {", ".join(key): call for key, call in ways.items()}, repeats, limit=limit, turn=0.05, label=SUITE
    )
    fastest: dict[str, str] = {}
    for name, way in ways:
        taken = measured.median(f"{name}, {way}")
        if name not in fastest or taken < measured.median(f"{name}, {fastest[name]}"):
            fastest[name] = way
    for method in (FULL, *ADAPTIVE):
        title = f"{method.name}, {fastest[method.name]}"
        speedup = measured.ratio(f"{FULL.name}, {fastest[FULL.name]}", title)
        results: dict[str, object] = {}
        if method in ADAPTIVE:
            _, report = drawn(method)
            results = {"mean_exit_layer": report.mean_exit_layer, "macs_share": report.macs / report.macs_full}
        rows.write(
            SUITE,
            "speed",
            method.name,
            {
                "model": MODEL,
                "policy": method.policy,
                "steps": STEPS,
                "guidance_scale": GUIDANCE,
                "samples": SAMPLES,
            },
            dtype="float32",
            **measured.row(title),
            way=fastest[method.name],
            ways={way: measured.median(f"{name}, {way}") for name, way in ways if name == method.name},
            images_per_second=SAMPLES / measured.median(title),
            speedup=speedup.median,
            speedup_spread=[speedup.quantile(0.2), speedup.quantile(0.8)],
            **results,
        )
