"""Serve requests of different steps, policies and priorities from one engine.

    python examples/engine_requests.py

Requests join and leave the running batch at any step. Each has its own settings, and its image is that of
`adadiff.sample` with the same settings.

Takes 7 s of CPU time and prints:

    full                  10 steps, 13.00 blocks, as when drawn alone: True
    exit:budget=0.55      20 steps,  5.55 blocks, as when drawn alone: True
    exit:budget=0.8       20 steps, 11.40 blocks, as when drawn alone: True
    cache:threshold=0.1   50 steps,  7.24 blocks, as when drawn alone: True
    exit:depth=8          15 steps,  8.00 blocks, as when drawn alone: True
    urgent: [1, 16, 16], told of 5 steps
    finished 6, cancelled 1
"""

import torch

import adadiff

REQUESTS = (
    {"seed": 1, "class_labels": 3, "steps": 10, "policy": "full"},
    {"seed": 2, "class_labels": 7, "steps": 20, "policy": "exit:budget=0.55"},
    {"seed": 3, "class_labels": 13, "steps": 20, "policy": "exit:budget=0.8", "guidance_scale": 2.0},
    {"seed": 4, "class_labels": 17, "steps": 50, "policy": "cache:threshold=0.1"},
    {"seed": 5, "class_labels": 18, "steps": 15, "policy": "exit:depth=8", "solver": "dpm++2m"},
)
EXACT = adadiff.ExecutionOptions(batch_invariant=True)  # so that images are compared bit for bit


def main() -> None:
    model, seen = adadiff.load("canvases"), []
    with adadiff.Engine(model, capacity=8, execution=EXACT) as engine:
        handles = [engine.submit(**request) for request in REQUESTS]
        urgent = engine.submit(seed=6, class_labels=1, steps=5, priority=10, deadline=60, on_step=seen.append)
        dropped = engine.submit(seed=7, class_labels=2, steps=1000)
        dropped.cancel()
        for request, handle in zip(REQUESTS, handles, strict=True):
            image, report = handle.result(), handle.report
            alone, _ = adadiff.sample(model, 1, execution=EXACT, **request)
            same = torch.equal(image, alone[0])
            print(f"{request['policy']:20} {request['steps']:3} steps, {report.mean_exit_layer:5.2f} blocks", end="")
            print(f", as when drawn alone: {same}")
        print(f"urgent: {list(urgent.result().shape)}, told of {len(seen)} steps")
    print(f"finished {engine.report.finished}, cancelled {engine.report.cancelled}")


if __name__ == "__main__":
    main()
