"""Quality of the digits: every method draws the same samples (same noises, same labels)."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from adadiff.checkpoint import write_tensors
from adadiff.metrics.quality import evaluate_samples, frechet_ratio
from benchmarks.rows import Rows, say
from benchmarks.suites.drawing import (
    STEPS,
    Artist,
    Drawn,
    Method,
    fingerprint,
    kept_images,
    load,
    policy_of,
    seeds_and_labels,
)

SUITE = "digits"


def measure(
    rows: Rows, model: str, plain: str, thresholds: Sequence[str], fewer: Sequence[int], *,
    samples: int, runs: int, processes: int, steps: int = STEPS,
) -> None:  # fmt: skip
    """Writes a row for each method and run, unless the file has it."""
    with Artist.of(processes) as artist:
        for run in range(runs):
            say(f"digits: quality of {samples} samples, run {run + 1} of {runs}")
            Run(rows, artist, model, plain, samples, run, steps).measure(thresholds, fewer)


class Run:
    """One set of seeds, drawn by every method. Images of the reference methods are kept on disk."""

    def __init__(self, rows: Rows, artist: Artist, model: str, plain: str, samples: int, run: int, steps: int = STEPS):
        self._rows, self._artist = rows, artist
        self.full = Method("full", model, steps=steps)
        self.plain = Method("plain, equal budget", plain, steps=steps)
        self._seeds, self._labels = seeds_and_labels(run, samples)
        self._run = run

    def measure(self, thresholds: Sequence[str], fewer: Sequence[int]) -> None:
        methods = [self.full, self.plain]
        methods += [dataclasses.replace(self.full, name="fewer steps", steps=steps, setting=steps) for steps in fewer]
        for method in methods:
            self.row(method)
        for threshold in thresholds:
            early = dataclasses.replace(self.full, name="early exit", policy=policy_of(threshold), setting=threshold)
            mean = self.row(early)["mean_exit_layer"]
            self.row(dataclasses.replace(early, name="fixed depth", policy=f"exit:depth={mean:.4f}"))

    def row(self, method: Method) -> dict[str, object]:
        parameters = {
            "setting": method.setting,
            "steps": method.steps,
            "samples": len(self._seeds),
            "run": self._run,
            # checkpoints on which the images and their comparisons depend
            "checkpoints": [fingerprint(self.full.model), fingerprint(self.plain.model)],
        }
        found = self._rows.find(SUITE, "quality", method.name, parameters)
        if found is not None:
            return found
        if method in (self.full, self.plain):
            drawn = Drawn(self.reference(method))
        else:
            drawn = self._artist.draw(method, self._seeds, self._labels)
        full, plain = self.reference(self.full), self.reference(self.plain)
        if method.name == "early exit":
            self._keep_for_pictures(method, drawn, full)
        quality = evaluate_samples(
            drawn.images, self._labels, paired=None if method in (self.full, self.plain) else full
        )
        ratios = {
            f"frechet_over_{name}": dataclasses.asdict(frechet_ratio(drawn.images, images))
            for name, images, itself in (("full", full, self.full), ("plain", plain, self.plain))
            if method != itself
        }
        return self._rows.write(
            SUITE,
            "quality",
            method.name,
            parameters,
            dtype="float32",
            policy=method.policy,
            **finite(dataclasses.asdict(quality)),
            **ratios,
            **depth(drawn, load(method.model).num_layers),
        )

    def reference(self, method: Method) -> Tensor:
        """Images of the full or the plain network."""
        folder = self._rows.folder / "cache"
        return kept_images(folder, self._artist, method, self._seeds, self._labels, self._run)

    def _keep_for_pictures(self, method: Method, drawn: Drawn, full: Tensor, number: int = 40) -> None:
        tensors = {
            "full": full[:number],
            "early": drawn.images[:number],
            "labels": self._labels[:number],
            "exit_layer": drawn.exit_layer[:, :number],
        }
        if self._run == 0:
            write_tensors(self._rows.folder / "cache" / f"early-exit-{method.setting}.safetensors", tensors, {})


def depth(drawn: Drawn, num_layers: int) -> dict[str, object]:
    """Mean exit layer, shares of the full network's blocks and multiply-adds, and histograms of exits by step."""
    if drawn.exit_layer is None:
        return {"mean_exit_layer": float(num_layers), "blocks_share": 1.0, "macs_share": 1.0}
    mean = float(drawn.exit_layer[drawn.exit_layer > 0].double().mean())  # 0: a step that a sample did not take
    histogram = [torch.bincount(step.long(), minlength=num_layers + 1)[1:].tolist() for step in drawn.exit_layer]
    return {
        "mean_exit_layer": mean,
        "blocks_share": mean / num_layers,
        "macs_share": drawn.macs[0] / drawn.macs[1],
        "exit_histogram": histogram,  # [steps][layers] samples
    }


def finite(values: dict[str, object]) -> dict[str, object]:
    """Values for JSON, which has no infinity: the PSNR of equal images is written as "inf"."""
    return {key: str(value) if value in (float("inf"), float("-inf")) else value for key, value in values.items()}
