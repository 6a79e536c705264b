"""Does depth matter for the canvases, and do samples need different depths? Two small trainings, and exits.

python -m benchmarks.studies.pilots [--out DIR] [--steps N] [--data SPEC] [--set KEY=VALUE ...]
python -m benchmarks.studies.pilots --picture FILE.png

Trains the full network and one of three blocks in the same way, then exits on the frozen full network; draws samples of
each and measures their accuracy. After a kill, the same command continues. One thread.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adadiff
from adadiff.calibration.calibrating import CALIBRATION_SEED, work_of
from adadiff.calibration.recording import measure_weights, record
from adadiff.commands.values import setting
from adadiff.data.canvases import CLASSES, DIGITS, Canvases
from adadiff.data.sources import SOURCES, CanvasesSource
from adadiff.metrics.canvases import canvas_features, follow_rules
from adadiff.metrics.frechet import FeatureStatistics
from adadiff.metrics.quality import evaluate_samples
from adadiff.output.pictures import make_grid, to_pixels, write_json, write_png
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.training.config import TrainConfig, load_config
from adadiff.training.trainer import Trainer

SAMPLES, SAMPLE_STEPS = 800, 20  # forty of each class
REFERENCE = 5000  # held-out canvases
RECORDED = 140


def train(config: TrainConfig, folder: Path) -> tuple[Path, float]:
    """Returns the model's file and the seconds of its updates."""
    trainer = Trainer(config, folder)
    file = trainer.run()
    return file, trainer.seconds


def judge(file: Path, data: Canvases) -> dict[str, Any]:
    """Rule accuracy with the standard error of a share, and Fréchet distance to held-out canvases."""
    labels = torch.arange(SAMPLES) % CLASSES
    images, _ = adadiff.sample(adadiff.load(file), SAMPLES, steps=SAMPLE_STEPS, class_labels=labels)
    real, _ = data.draw(REFERENCE, "test", labels=torch.arange(REFERENCE) % CLASSES)
    reference = FeatureStatistics.of(canvas_features(real))
    quality = evaluate_samples(images, reference=reference, extractor=canvas_features)
    return {**accuracies(images, labels), "frechet": [quality.frechet, quality.frechet_low, quality.frechet_high]}


def accuracies(images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    right = follow_rules(images, labels).double()
    groups = {"easy": labels < DIGITS, "hard": labels >= DIGITS}
    shares = {name: (float(right[group].mean()), int(group.sum())) for name, group in groups.items()}
    return {name: [p, (p * (1 - p) / n) ** 0.5] for name, (p, n) in shares.items()}


def ceiling(data: Canvases) -> dict[str, list[float]]:
    """Accuracy on real canvases, the upper bound for any network."""
    labels = torch.arange(REFERENCE) % CLASSES
    return accuracies(*data.draw(REFERENCE, "test", labels=labels))


def needs(file: Path) -> dict[str, Any]:
    """Number of blocks that samples need, and how much of its variance the timestep explains.

    The need of a sample at a step is the number of blocks after which its error, weighted by its effect on the image,
    stays below a common level. The level is chosen such that half of the blocks are needed on average.
    """
    model = adadiff.load(file)
    labels = torch.arange(RECORDED) % CLASSES
    samples = SampleBatch.of(model, RECORDED, steps=SAMPLE_STEPS, class_labels=labels, seed=CALIBRATION_SEED)
    recording = record(model, samples, RECORDED)
    weights = measure_weights(
        model, samples, recording, lambda a, b: float((a - b).double().square().mean()), batch=RECORDED
    )
    error = recording.relative.double() * weights[:, None, None]  # [S, K, n]
    levels = error.flatten().sort().values
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if float(depth_needed(error, levels[middle]).mean()) > model.num_layers / 2:
            low = middle + 1
        else:
            high = middle
    need = depth_needed(error, levels[low])  # [S, n]
    total = need.var(unbiased=False)
    return {
        "mean_depth": float(need.mean()),
        "explained_by_timestep": float(need.mean(1).var(unbiased=False) / total),
        "explained_by_timestep_and_class": float(1 - residual(need, labels) / total),
        "deviation_within_timestep": need.std(1).tolist(),
        "mean_by_timestep": need.mean(1).tolist(),
        "easy": float(need[:, labels < DIGITS].mean()),
        "hard": float(need[:, labels >= DIGITS].mean()),
        "timesteps": recording.t.tolist(),
        "work_of_first_block": float(work_of(model).exiting[0]) / work_of(model).full,
    }


def depth_needed(error: Tensor, level: Tensor) -> Tensor:
    """error: [S, K, n]. Number of blocks after which the error stays below the level, float64 [S, n], 1..K + 1."""
    above = (error > level).flip(1).int().cumsum(1).flip(1) > 0  # at this layer or a later one
    return above.double().sum(1) + 1


def residual(need: Tensor, labels: Tensor) -> Tensor:
    """Variance after subtracting the mean of each timestep and class."""
    left = need.clone()
    for label in labels.unique():
        members = labels == label
        left[:, members] -= need[:, members].mean(1, keepdim=True)
    return left.square().mean()


def examples(path: Path, side: int) -> None:
    """Writes a picture: one row of easy canvases, and three rows of hard ones."""
    labels = torch.cat([torch.arange(DIGITS), torch.arange(DIGITS, CLASSES).repeat(3)])
    images, _ = Canvases(side).draw(len(labels), labels=labels)
    write_png(path, make_grid([to_pixels(image) for image in images]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/pilots"), help="folder for the runs")
    parser.add_argument("--steps", type=int, default=6000, help="updates of each network")
    parser.add_argument("--shallow-steps", type=int, help="updates of the shallow one (default: as many)")
    parser.add_argument("--data", default="canvases", help="as in canvases:side=2,hard=0.75")
    parser.add_argument("--set", type=setting, nargs="+", default=[], metavar="KEY=VALUE", help="of both networks")
    parser.add_argument("--picture", type=Path, help="only draw examples of the data there")
    options = parser.parse_args()
    source = SOURCES.read(options.data)
    if not isinstance(source, CanvasesSource):
        parser.error(f"pilots are for canvases, got {options.data!r}")
    data = source.canvases
    if options.picture is not None:
        examples(options.picture, data.side)
        return
    torch.set_num_threads(1)
    network = {"image_size": data.shape[1], **dict(options.set)}
    common = {"data": options.data, "steps": options.steps, "sample_every": 0, "network": network}
    full = load_config("canvases_plain", common)
    shallow = replace(full, network={**network, "depth": 2}, steps=options.shallow_steps or options.steps)
    results: dict[str, Any] = {"ceiling": ceiling(data)}
    files = {}
    for title, config in (("full", full), ("shallow", shallow)):
        files[title], seconds = train(config, options.out / title)
        results[title] = {"seconds": seconds, "steps": config.steps, **judge(files[title], data)}
    frozen = load_config("canvases_frozen", {**common, "init": str(files["full"]), "steps": max(1, options.steps // 5)})
    file, seconds = train(frozen, options.out / "frozen")
    results["needs"] = {"seconds": seconds, **needs(file)}
    write_json(options.out / "pilots.json", {"data": options.data, "network": network, **results})
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
