"""Let a step selector choose how many steps a sample takes.

    python examples/auto_steps.py

`digits_prototypes` draws digits as people write them (labels 0 to 9) and mean digits (labels 10 to 19), which need
fewer steps. Its selector reads the label (AdaDiff-Zhang, arXiv 2311.14768); `adadiff train-steps` trains such a one.

Takes 6 s of CPU time and prints:

    written digits: [15, 20, 20, 20, 20, 20, 20, 20, 20, 20]
    mean digits:    [5, 5, 5, 5, 6, 5, 8, 4, 5, 5]
    chosen steps       difference from 50 steps 0.036
    12 steps for all   difference from 50 steps 0.042
"""

import adadiff


def main() -> None:
    model = adadiff.load("digits_prototypes")
    labels = list(range(20))
    exact, _ = adadiff.sample(model, 20, steps=50, class_labels=labels)
    images, report = adadiff.sample(model, 20, steps="auto", class_labels=labels)
    steps = report.steps.tolist()
    print(f"written digits: {steps[:10]}")
    print(f"mean digits:    {steps[10:]}")
    mean = round(sum(steps) / 20)
    same, _ = adadiff.sample(model, 20, steps=mean, class_labels=labels)
    for name, found in (("chosen steps", images), (f"{mean} steps for all", same)):
        error = float((found - exact).square().mean().sqrt())
        print(f"{name:18} difference from 50 steps {error:.3f}")


if __name__ == "__main__":
    main()
