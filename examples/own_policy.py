"""Write a policy of your own, and name it on the command line or in Python.

    python examples/own_policy.py

An `ExitPolicy` is asked after each block which rows exit. Thresholds come with the context, since one policy serves
samples with different ones. A policy in an importable module is named as `module:Class:setting=value`:

    PYTHONPATH=examples adadiff sample digits --out out --policy own_policy:NoisyStepsFirst:factor=2

Takes 7 s of CPU time and prints:

    exit:0.08                                             9.35 blocks, squared error 0.0025
    own_policy:NoisyStepsFirst                            8.80 blocks, squared error 0.0045
    own_policy:NoisyStepsFirst:factor=1.5,threshold=0.1   8.38 blocks, squared error 0.0043
    thresholds 0.05 to 0.15: 8.81 blocks for the lowest, 7.04 highest
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import adadiff
from adadiff import ExitContext, ExitPolicy


@dataclass(frozen=True)
class NoisyStepsFirst(ExitPolicy):
    """Exit where u < threshold, or u < factor * threshold at times of `since` and above, where there is most noise."""

    threshold: float = 0.08
    factor: float = 2.0
    since: float = 700.0

    def exit_mask(self, u: Tensor, layer: int, context: ExitContext) -> Tensor:
        """u, context.t, context.threshold: [n] rows that still run. Returns bool [n]."""
        return u < torch.where(context.t >= self.since, self.factor, 1.0) * context.threshold


def main() -> None:
    model = adadiff.load("digits")
    settings = {"class_labels": [i % 10 for i in range(60)], "steps": 20}
    full, _ = adadiff.sample(model, 60, policy="full", **settings)
    for policy in ("exit:0.08", "own_policy:NoisyStepsFirst", "own_policy:NoisyStepsFirst:factor=1.5,threshold=0.1"):
        images, report = adadiff.sample(model, 60, policy=policy, **settings)
        error = float((images - full).square().mean())
        print(f"{policy:52} {report.mean_exit_layer:5.2f} blocks, squared error {error:.4f}")
    thresholds = torch.linspace(0.05, 0.15, 60)  # one for each sample
    _, report = adadiff.sample(model, 60, policy=NoisyStepsFirst(), thresholds=thresholds, **settings)
    depth = report.exit_layer[:, :, 0].double().mean(0)
    print(f"thresholds 0.05 to 0.15: {depth[:20].mean():.2f} blocks for the lowest, {depth[-20:].mean():.2f} highest")


if __name__ == "__main__":
    main()
