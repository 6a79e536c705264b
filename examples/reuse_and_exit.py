"""Join two policies: reuse what hardly changed, exit early where that is certain enough.

    python examples/reuse_and_exit.py

`cache:` compares the first block's output with that of the sample's last full step, and takes the rest of the network
from there if it changed little. `+` joins policies of different kinds. A step that is not reused may still exit early.

Takes 6 s of CPU time and prints:

    policy                                   work  reused  difference
    cache:threshold=0.15                      54%     50%        0.02
    reuse:every=2,level=layer,layers=5-13     68%     50%        0.03
    exit:budget=0.55                          54%      0%        0.06
    cache:threshold=0.15+exit:budget=0.55     36%     50%        0.06
"""

import adadiff

POLICIES = (
    "cache:threshold=0.15",
    "reuse:every=2,level=layer,layers=5-13",
    "exit:budget=0.55",
    "cache:threshold=0.15+exit:budget=0.55",
)


def main() -> None:
    model = adadiff.load("canvases")
    settings = {"class_labels": [i % 20 for i in range(40)], "steps": 20}
    full, _ = adadiff.sample(model, 40, policy="full", **settings)
    print(f"{'policy':39} {'work':>5} {'reused':>7} {'difference':>11}")
    for policy in POLICIES:
        images, report = adadiff.sample(model, 40, policy=policy, **settings)
        error = float((images - full).square().mean().sqrt())
        reused = report.reuses / report.passes
        print(f"{policy:39} {report.macs / report.macs_full:5.0%} {reused:7.0%} {error:11.2f}")


if __name__ == "__main__":
    main()
