"""Draw the noisy steps with a shallower network (DuoDiff), alone and together with early exit.

    python examples/shallow_network.py

`canvases_shallow` has 3 blocks and was trained on its own. It takes the place of the model at times of `t_switch` and
above. In one batch samples stand at different times, so both networks run, each for its own samples.

Takes 7 s of CPU time and prints:

    full network          100% of the work, 94 of 100 canvases are as asked
    shallow from 700 on    73% of the work, 94 of 100 canvases are as asked
    and early exit below   47% of the work, 92 of 100 canvases are as asked
"""

import torch

import adadiff
from adadiff.metrics.canvases import follow_rules


def main() -> None:
    model, shallow = adadiff.load("canvases"), adadiff.load("canvases_shallow")
    labels = [i % 20 for i in range(100)]
    settings = {"class_labels": labels, "steps": 20}
    both = {"shallow_model": shallow, "t_switch": 700}
    ways = {
        "full network": {"policy": "full"},
        "shallow from 700 on": {"policy": "full", **both},
        "and early exit below": {"policy": "exit:budget=0.55", **both},
    }
    for name, way in ways.items():
        images, report = adadiff.sample(model, 100, **settings, **way)
        right = int(follow_rules(images, torch.tensor(labels)).sum())
        print(f"{name:21} {report.macs / report.macs_full:4.0%} of the work, {right} of 100 canvases are as asked")


if __name__ == "__main__":
    main()
