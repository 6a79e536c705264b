"""Does a sample depend on its batch-mates? For caches that decide for each sample and for the whole batch: the share of
samples whose images change when they are drawn with other batch-mates."""

import torch

from benchmarks.baselines.sweeps import Networks, Sweep
from benchmarks.rows import Rows, say
from benchmarks.suites.drawing import Method, draw, fingerprint, seeds_and_labels

SUITE, KIND = "quality", "mates"
BATCHES = (2, 8, 32)
SAMPLES, STEPS = 256, 20
CHANGED = 1e-3  # change of a pixel in [-1, 1]; rounding in other batches is a hundred times smaller


def measure(rows: Rows, data: str, networks: Networks, sweep: Sweep, classes: int) -> None:
    """Writes a row for each policy and batch size, unless the file has it."""
    policies = {
        f"{name}, {change:g}": policy.format(change)
        for change in sweep.changes
        for name, policy in (("cache, by sample", "cache:threshold={:g}"), ("cache, whole batch", "cache:batch={:g}"))
    }
    say(f"{data}: do images depend on their batch-mates?")
    for name, policy in policies.items():
        for batch in BATCHES:
            parameters = {
                "data": data, "steps": STEPS, "batch": batch, "samples": SAMPLES,
                "checkpoints": [fingerprint(networks.full)],
            }  # fmt: skip
            if rows.find(SUITE, KIND, name, parameters) is None:
                method = Method(name, networks.full, policy=policy, steps=STEPS, batch=batch)
                rows.write(SUITE, KIND, name, parameters, dtype="float32", policy=policy, **changed(method, classes))


def changed(method: Method, classes: int, samples: int = SAMPLES) -> dict[str, float]:
    """Draws the samples in two orders, so that each has other batch-mates, and compares."""
    seeds, labels = seeds_and_labels(0, samples, classes)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    first, second = draw(method, seeds, labels), draw(method, seeds[order], labels[order])
    images = torch.empty_like(second.images)
    images[order] = second.images
    furthest = (images - first.images).abs().flatten(1).amax(1)
    differs = furthest > CHANGED
    return {
        "changed": float(differs.double().mean()),
        "furthest": float(furthest.max()),
        "pixels": float((images - first.images)[differs].abs().mean()) if bool(differs.any()) else 0.0,
        "macs_share": first.macs[0] / first.macs[1],
    }
