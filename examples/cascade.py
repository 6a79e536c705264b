"""Draw with a student of four steps, and let the model redraw only what an oracle finds poor.

    python examples/cascade.py

`adadiff distill` makes a file with student and oracle; `digits_cascade` ships. A sample changes network in flight, in a
batch whose other samples may do anything else.

Takes 8 s of CPU time and prints:

    full                                              20.0 steps,  0 redrawn, read as asked: 195 of 200
    cascade:digits_cascade,share=0                     4.0 steps,  0 redrawn, read as asked: 195 of 200
    cascade:digits_cascade,share=0.3,mode=regenerate   9.7 steps, 57 redrawn, read as asked: 195 of 200
"""

import adadiff
from adadiff.metrics.features import digits_network


def main() -> None:
    model, classifier = adadiff.load("digits"), digits_network()
    labels = [i % 10 for i in range(200)]
    for policy in ("full", "cascade:digits_cascade,share=0", "cascade:digits_cascade,share=0.3,mode=regenerate"):
        images, report = adadiff.sample(model, 200, steps=20, policy=policy, class_labels=labels)
        right = sum(a == b for a, b in zip(classifier(images).argmax(1).tolist(), labels, strict=True))
        went_on = 0 if report.went_on is None else int(report.went_on.sum())
        print(f"{policy:49} {report.steps.double().mean():4.1f} steps, {went_on:2} redrawn, ", end="")
        print(f"read as asked: {right} of 200")


if __name__ == "__main__":
    main()
