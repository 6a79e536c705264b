"""See what each sample did at each step, why, and run the same exits again.

    python examples/decisions.py

A sample exits after the first block whose uncertainty lies below its threshold. The report has the exit layers of all
samples; with `record_scores=True` it has the uncertainties, too.

Takes 4 s of CPU time and prints:

    blocks run at each step, from noise to image:
      label  1: [5, 5, 5, 3, 4, 4, 4, 4, 4, 5, 5, 6, 6, 6, 6, 6, 6, 8, 13, 13]
      label  8: [5, 5, 4, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 8, 13, 13]
      label 11: [13, 5, 5, 4, 5, 5, 5, 6, 6, 6, 6, 8, 8, 8, 8, 8, 8, 13, 13, 13]
      label 18: [13, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 8, 8, 8, 8, 8, 9, 13, 13, 13]
    uncertainty of label 11 at step 16 after block 2: 0.88, 3: 0.85, 4: 0.82, 5: 0.78, 6: 0.74, 8: 0.64
    replayed: the same exits True, the same images True
"""

import torch

import adadiff


def main() -> None:
    model = adadiff.load("canvases")
    labels = [1, 8, 11, 18]
    settings = {"class_labels": labels, "steps": 20}
    images, report = adadiff.sample(model, 4, policy="exit:budget=0.55", record_scores=True, **settings)
    layers = report.exit_layer[:, :, 0]  # [steps, n]; the last index: conditional, unconditional half
    print("blocks run at each step, from noise to image:")
    for i, label in enumerate(labels):
        print(f"  label {label:2}: {layers[:, i].tolist()}")
    step, sample = 15, 2
    scores = report.scores[step, sample, 0]  # [L], NaN where no block asked
    asked = [f"{block}: {score:.2f}" for block, score in enumerate(scores.tolist(), 1) if score == score]
    print(f"uncertainty of label {labels[sample]} at step {step + 1} after block {', '.join(asked)}")

    again, repeated = adadiff.sample(model, 4, policy=adadiff.Replay.from_report(report), **settings)
    print(f"replayed: the same exits {torch.equal(repeated.exit_layer, report.exit_layer)}, ", end="")
    print(f"the same images {torch.allclose(again, images, atol=1e-4)}")


if __name__ == "__main__":
    main()
