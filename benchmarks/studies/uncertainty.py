"""Which target should uncertainties have, and how should they depend on time? Compares exits on one frozen network.

python -m benchmarks.studies.uncertainty [--data digits|canvases] [--network FILE] [--out DIR] [--steps N] [-n N]

Every variant trains its exits in the same way (or refits those of another one, like `adadiff calibrate --refit`), is
calibrated for the same budgets, and draws new samples. Prints and writes as rows: how well u ranks the samples of one
timestep by the error of exiting (Spearman correlation with the calibration's error, mean over timesteps and layers);
the share of the exit layer's variance within timesteps; and for each budget the paired error to the full network's
images, divided by that of the best static table of the same recording and work, with its 95 % interval. Below 1,
deciding for each sample pays.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adadiff
from adadiff.calibration.calibrating import Calibrating
from adadiff.calibration.stopping import exit_layers
from adadiff.training.config import load_config
from adadiff.training.trainer import Trainer
from benchmarks.rows import Rows, say

SUITE = "uncertainty"
BUDGETS = (0.4, 0.55, 0.7, 0.9)
STEPS = 20  # of DDIM
# name: loss, time, refit
VARIANTS = {
    "paper's target": ("paper", True, False),
    "relative": ("relative", True, False),
    "relative, blind to time": ("relative", False, False),
    "relative, bias by time": ("relative", "bias", False),
    "relative, fitted anew": ("relative", True, True),
}
NETWORKS = {"digits": "digits_plain", "canvases": "canvases_plain"}


def rank_correlation(u: Tensor, error: Tensor) -> float:
    """u, error: [S, K, n]. Spearman correlation over n, mean over S and K; ties are ranked in arbitrary order."""
    ranks = [value.double().argsort(-1).argsort(-1).double() for value in (u, error)]
    centred = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    product = (centred[0] * centred[1]).sum(-1)
    return float((product / (centred[0].square().sum(-1) * centred[1].square().sum(-1)).sqrt()).mean())


def share_within(layer: Tensor) -> float:
    """layer: [S, n]. Share of the variance within timesteps; 0 without variance."""
    layer = layer.double()
    total = layer.var(unbiased=False)
    return float((layer - layer.mean(1, keepdim=True)).square().mean() / total) if total > 0 else 0.0


def measure(file: Path, n: int, budgets: Sequence[float], refit: bool) -> dict[str, Any]:
    calibrating = Calibrating(adadiff.load(file), budgets, n=n, steps=STEPS, refit=refit)
    calibration, recording = calibrating.run(progress=True), calibrating.recording
    found = []
    for budget in calibration.budgets:
        exits = exit_layers(recording.u, torch.tensor(budget.thresholds))
        measured = {"share": budget.share, "ratio": budget.ratio, "within": share_within(exits)}
        found.append({**measured, "adaptive": asdict(budget.adaptive), "static": asdict(budget.static)})
    return {"rank_correlation": rank_correlation(recording.u, recording.error), "budgets": found}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown, with a line for each variant."""
    shares = [budget["share"] for budget in rows[0]["budgets"]]
    columns = [f"error over static, {share:g} (within)" for share in shares]
    lines = ["| data | exits | rank correlation | " + " | ".join(columns) + " |", "| --- " * (3 + len(shares)) + "|"]
    for row in rows:
        cells = []
        for budget in row["budgets"]:
            ratio = "-" if budget["ratio"] is None else "{:.2f} [{:.2f}, {:.2f}]".format(*budget["ratio"])
            cells.append(f"{ratio} ({budget['within']:.0%})")
        cells = [row["parameters"]["data"], row["variant"], f"{row['rank_correlation']:.2f}", *cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(NETWORKS), default="canvases")
    parser.add_argument("--network", help="the frozen network (default: the plain one that ships)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/uncertainty"), help="runs and rows")
    parser.add_argument("--steps", type=int, default=1000, help="updates of each variant's exits")
    parser.add_argument("-n", type=int, default=512, help="samples to record, and as many others to measure on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    network = options.network or NETWORKS[options.data]
    rows, shown = Rows(options.out), []
    for variant, (loss, time, refit) in VARIANTS.items():
        exits = {"head": "block", "time": time}
        changes = {"init": network, "loss": loss, "steps": options.steps, "exit_options": exits}
        config = load_config(f"{options.data}_frozen", changes)
        parameters = {"data": options.data, "network": network, "training_steps": options.steps, "n": options.n}
        row = rows.find(SUITE, "calibrated", variant, parameters)
        if row is None:
            say(f"{options.data}: {variant}")
            file = Trainer(config, options.out / f"{options.data}-{loss}-{time}".lower()).run()
            measured = measure(file, options.n, BUDGETS, refit)
            row = rows.write(SUITE, "calibrated", variant, parameters, dtype="float32", **measured)
        shown.append(row)
    print(table(shown))


if __name__ == "__main__":
    main()
