"""Add exits to a finished DiT without changing its weights, calibrate them, and draw with a budget.

    python examples/frozen_exits.py

Here the finished network is a tiny DiT that is trained first. For a published one, convert it and use your own data:
`adadiff convert`, `adadiff train --recipe frozen --init FILE` with the options that docs/guides/frozen-dit.md explains,
and `adadiff calibrate FILE --refit`.

Takes 57 s of CPU time and prints (shares and blocks differ a little from machine to machine):

    the network's weights are as before: True
    budget 60%: 60% of the work, squared error 0.007
    budget 80%: 80% of the work, squared error 0.001
    ten digits: 2.7 of 6 blocks a step
"""

import tempfile
from pathlib import Path

import torch

import adadiff
from adadiff.calibration.calibrating import Calibrating
from adadiff.config import PRESETS, ModelConfig
from adadiff.models.dit import DiTConfig
from adadiff.training.config import TrainConfig
from adadiff.training.trainer import Trainer

NETWORK = DiTConfig(image_size=8, channels=1, patch=2, dim=48, depth=6, heads=3, num_classes=11, learned_variance=False)
PRESETS["tiny_dit"] = ModelConfig(NETWORK, "linear", null_label=10)


def main(steps: int = 600, n: int = 128) -> None:
    """steps: updates of each training; n: samples that calibrate."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        network = TrainConfig("tiny_dit", "digits", exits=False, steps=steps, warmup=50)
        finished = Trainer(network, plain).run(progress=False)
        # a transformer block as head of each layer: small next to a DiT, and worth it
        exits = TrainConfig(
            "tiny_dit", "digits", recipe="frozen", init=str(finished), loss="relative", steps=steps, lr=1e-3, warmup=50,
            exit_options={"head": "block"},
        )  # fmt: skip
        model = adadiff.load(Trainer(exits, Path(folder) / "exits").run(progress=False))
        before, after = adadiff.load(finished).backbone.state_dict(), model.backbone.state_dict()
    print(f"the network's weights are as before: {all(torch.equal(before[key], after[key]) for key in before)}")

    calibrating = Calibrating(model, [0.6, 0.8], n=n, steps=20, refit=True)
    calibration = calibrating.run()
    for budget in calibration.budgets:
        found = budget.adaptive  # on samples that its thresholds were not chosen on
        print(f"budget {budget.share:.0%}: {found.share:.0%} of the work, squared error {found.error:.3f}")
    labels = list(range(10))
    _, report = adadiff.sample(calibrating.model, 10, steps=20, policy="exit:budget=0.6", class_labels=labels)
    print(f"ten digits: {report.mean_exit_layer:.1f} of {report.num_layers} blocks a step")


if __name__ == "__main__":
    main()
