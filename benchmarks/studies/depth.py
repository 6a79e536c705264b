"""What determines the exit layer of samples: the timestep, the class, the typeface, or the individual sample?

python -m benchmarks.studies.depth MODEL [--budget 0.55] [--letters FILE] [-n 512] [--out DIR]

MODEL has exits and a calibration. The study prints, draws (depth.png) and writes as rows:
drawn    samples with the policy exit:budget=B: mean depth by timestep and by class; shares of the depth's variance
         between timesteps and, within timesteps, between classes
real     noised letters of held-out typefaces (--letters), one pass each: the same, and between typefaces
bounds   error of exits against their work, on recorded runs of the full network: the best table by timestep alone, the
         best thresholds for each sample (both chosen on other samples), and an oracle that knows every sample's error
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import adadiff
from adadiff.calibration.calibrating import CALIBRATION_SEED, default_features, work_of
from adadiff.calibration.recording import Recording, record
from adadiff.calibration.stopping import Work, adaptive_table, cheapest, exit_layers, static_table, total
from adadiff.data.letters import family_of, load_letters
from adadiff.sampling.sample_batch import SampleBatch
from benchmarks.report.depth_picture import picture
from benchmarks.rows import Row, Rows, say
from benchmarks.suites.drawing import fingerprint, seeds_and_labels

SUITE = "depth"
STEPS = 20  # of DDIM
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the work for the bounds
BATCH = 64
SHOWN = 128  # images in the picture, at least two of every class
REAL = 4  # real letters for each drawn sample
NOISE_SEED = 7  # of the noise added to real letters


@dataclass(frozen=True)
class Variance:
    """Shares of the depths' variance: between timesteps; within timesteps, between groups; and `rest`."""

    timestep: float
    groups: Mapping[str, float]

    @property
    def rest(self) -> float:
        return 1.0 - self.timestep - sum(self.groups.values())


def variance(depth: Tensor, groups: Mapping[str, Tensor]) -> Variance:
    """depth: [S, n]; groups: name -> int64 [n]. A share is omega squared (Hays, Statistics, 1963), that is, corrected
    for what small groups explain by chance, so it may be slightly negative. Overlapping groupings are counted
    separately."""
    depth = depth.double()
    mean = depth.mean(1, keepdim=True)
    whole = float((depth - depth.mean()).square().sum())
    if whole == 0:
        return Variance(0.0, dict.fromkeys(groups, 0.0))
    between = depth.shape[1] * float((mean - depth.mean()).square().sum())
    return Variance(between / whole, {name: _between(depth - mean, group) / whole for name, group in groups.items()})


def _between(depth: Tensor, group: Tensor) -> float:
    """Sum of squares that groups explain beyond chance, over all rows. depth: [S, n], with mean 0 in every row."""
    _, index = group.unique(return_inverse=True)
    counts = torch.bincount(index).double()
    if len(counts) < 2 or len(counts) == len(group):
        return 0.0
    sums = torch.zeros(len(depth), len(counts), dtype=torch.float64).index_add_(1, index, depth)
    explained = (sums.square() / counts).sum(1)
    left = depth.square().sum(1) - explained
    chance = (len(counts) - 1) * left / (len(group) - len(counts))
    return float((explained - chance).sum())


def drawn(model: adadiff.Model, budget: float, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [n, C, H, W], labels [n], and the exit layer of every step [S, n]."""
    seeds, labels = seeds_and_labels(0, n, model.config.classes)
    images, report = adadiff.sample(
        model, n, steps=STEPS, seed=seeds, class_labels=labels, policy=f"exit:budget={budget:g}", batch=BATCH
    )
    return images, labels, report.exit_layer[..., 0]


@torch.inference_mode()
def real(model: adadiff.Model, budget: float, images: Tensor, labels: Tensor) -> Tensor:
    """Exit layers [S, n] of noised images [n, C, H, W] at every timestep of the calibration."""
    t = torch.tensor(model.calibration.t, dtype=torch.float64)
    signal = model.schedule.log_alpha_bar(t).exp()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    depths = []
    for time, alpha_bar in zip(t, signal, strict=True):
        x = (alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise).float()
        parts = zip(x.split(BATCH), labels.split(BATCH), strict=True)
        found = [
            adadiff.forward(model, part, torch.full((len(part),), float(time)), label, policy=f"exit:budget={budget:g}")
            for part, label in parts
        ]
        depths.append(torch.cat([output.exit_layer for output in found]))
    return torch.stack(depths).long()


def bounds(model: adadiff.Model, n: int) -> dict[str, list[tuple[float, float]]]:
    """(share of the work, error) at SHARES, for each way of choosing depths."""
    chosen_on, other = (recorded(model, n, CALIBRATION_SEED + first) for first in (0, n))
    work = work_of(model)
    found: dict[str, list[tuple[float, float]]] = {"timestep alone": [], "by sample": [], "oracle": []}
    for share in SHARES:
        table = static_table(chosen_on.error, work, share, above=False)
        found["timestep alone"].append(_spent(table[:, None].expand(-1, n), other, work))
        theta = adaptive_table(chosen_on.u, chosen_on.error, work, share)
        asked = theta.amax(0) > 0
        found["by sample"].append(_spent(exit_layers(other.u, theta), other, work, asked))
        found["oracle"].append(_spent(oracle(other.error, work, share), other, work))
    return found


def oracle(error: Tensor, work: Work, share: float) -> Tensor:
    """Exit layers [S, n] with the least error for this share of the work. error: [S, K, n]."""
    padded = torch.cat([error.double(), torch.zeros_like(error[:, :1]).double()], 1)

    def spend(price: float) -> tuple[float, Tensor]:
        layer = (padded + price * work.exiting[:, None]).argmin(1) + 1
        return float(work.exiting[layer - 1].mean()) / work.full, layer

    return cheapest(spend, share, error, work)


def _spent(layer: Tensor, seen: Recording, work: Work, asked: Tensor | None = None) -> tuple[float, float]:
    error, share = total(layer, seen.error, work, asked)
    return share, error


def recorded(model: adadiff.Model, n: int, seed: int) -> Recording:
    classes = model.config.classes
    labels = [i % classes for i in range(n)] if classes else None
    samples = SampleBatch.of(model, n, steps=STEPS, seed=seed, class_labels=labels)
    return record(model, samples, BATCH, default_features(model))


def error_over(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], share: float) -> float:
    """Ratio of the errors of two curves at this share of the work, with the logarithm of the error interpolated
    linearly."""
    at = [np.exp(np.interp(share, [w for w, _ in curve], np.log([e for _, e in curve]))) for curve in (one, other)]
    return float(at[0] / at[1])


def table(rows: Mapping[str, Row]) -> str:
    """Tables in Markdown."""
    lines = ["| depth of | between timesteps | of classes | of typefaces | rest |", "| --- |" + " ---: |" * 4]
    for name in ("drawn", "real"):
        if row := rows.get(name):
            shares = (row["timestep"], row["groups"].get("class"), row["groups"].get("typeface"), row["rest"])
            lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.0%}" for v in shares) + " |")
    curves = rows["bounds"]["curves"]
    lines += ["", "| work | by sample over timestep alone | oracle over timestep alone |", "| ---: " * 3 + "|"]
    for share in SHARES[1:-1]:
        ratios = [error_over(curves[name], curves["timestep alone"], share) for name in ("by sample", "oracle")]
        lines.append(f"| {share:.0%} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def measure(rows: Rows, name: str, budget: float, n: int, letters: Path | None) -> tuple[dict[str, Row], Tensor]:
    """Rows by kind, which are measured unless the file has them; and images of the first samples, for the picture."""
    model = adadiff.load(name)
    if model.calibration is None:
        raise ValueError(f"{name} has no calibration; `adadiff calibrate` makes one")
    parameters = {"checkpoint": fingerprint(name), "budget": budget, "n": n, "steps": STEPS}
    kinds = ["drawn", "bounds"] if letters is None else ["drawn", "real", "bounds"]
    found = {kind: row for kind in kinds if (row := rows.find(SUITE, kind, name, parameters))}
    say(f"{n} samples" if "drawn" not in found else f"{SHOWN} samples, for the picture")
    images, labels, depth = drawn(model, budget, n if "drawn" not in found else min(n, SHOWN))

    def keep(kind: str, layers: Tensor, groups: Mapping[str, Tensor]) -> None:
        parts = variance(layers, groups)
        by_group = {name: _means(layers, group) for name, group in groups.items()}
        found[kind] = rows.write(
            SUITE, kind, name, parameters, dtype="float32", timestep=parts.timestep, groups=dict(parts.groups),
            rest=parts.rest, num_layers=model.num_layers, by_timestep=layers.double().mean(1).tolist(),
            low=layers.double().quantile(0.1, 1).tolist(), high=layers.double().quantile(0.9, 1).tolist(),
            by_group=by_group,
        )  # fmt: skip

    if "drawn" not in found:
        keep("drawn", depth.long(), {"class": labels})
    if letters is not None and "real" not in found:
        say("real letters of held-out typefaces")
        data, family = load_letters(letters, "test"), family_of(letters, "test")
        some = torch.linspace(0, len(data) - 1, min(REAL * n, len(data))).long()  # of all typefaces
        glyphs, classes = data.batch(some)
        keep("real", real(model, budget, glyphs, classes), {"class": classes, "typeface": family[some]})
    if "bounds" not in found:
        say(f"bounds, 2 x {n} samples recorded")
        curves = bounds(model, n)
        found["bounds"] = rows.write(SUITE, "bounds", name, parameters, dtype="float32", curves=curves)
    return found, images


def _means(depth: Tensor, group: Tensor) -> dict[str, float]:
    return {str(int(value)): float(depth[:, group == value].double().mean()) for value in group.unique()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name that ships, or a file")
    parser.add_argument("--budget", type=float, default=0.55)
    parser.add_argument("--letters", type=Path, help="the file that `adadiff data letters` writes")
    parser.add_argument("-n", type=int, default=512, help="samples of each part")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/depth"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found, images = measure(Rows(options.out), options.model, options.budget, options.n, options.letters)
    picture(found, images).savefig(options.out / "depth.png", dpi=150)
    print(table(found))


if __name__ == "__main__":
    main()
