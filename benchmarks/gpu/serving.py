"""Serving with mixed timesteps: ticks of saturated servers of U-ViT-L/2, random weights, bfloat16.

Samples exit after block 2 in the noisy half of their steps and run every block in the other; their current steps are
spread evenly. Compares ours, by every strategy of counting rows, with continuous batching of the plain network, eager
and compiled.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from adadiff import Engine
from benchmarks.baselines import servers
from benchmarks.baselines.servers import DepthTable, Plain, Saturated, plain_network
from benchmarks.gpu.network import plain, random_model, strategies
from benchmarks.gpu.session import Session, Task
from benchmarks.suites.network import run_block

SUITE = "gpu-serving"
BRAIN = torch.bfloat16
STEPS, TICKS = 50, 20
PRESET, CAPACITY = "imagenet256_uvit_large", 64


def tasks(session: Session) -> Iterator[Task]:
    given = {"preset": PRESET, "capacity": 4 if session.dry else CAPACITY}
    yield Task("throughput", given, partial(measure, session, given))


def measure(session: Session, parameters: dict[str, object]) -> None:
    B = parameters["capacity"]
    model = random_model(session, parameters["preset"])
    block = session.compile(run_block, dynamic=False)

    def compiled(*inputs: Tensor) -> Tensor:
        return plain(model.backbone, block, inputs)

    shape, label = model.backbone.sample_shape, {"class_labels": 1} if model.config.network.num_classes else {}
    policy = DepthTable(servers.two_phase(model.num_layers))
    plains = {servers.PLAIN: None, f"{servers.PLAIN}, compiled": compiled}
    calls = {
        name: Saturated(Plain(model, B, plain_network(B, network)), shape, B, STEPS, **label)
        for name, network in plains.items()
    }
    for strategy, execution in strategies(session).items():
        engine = Engine(model, B, threaded=False, execution=execution)
        calls[f"{servers.OURS}, {strategy}"] = Saturated(engine, shape, B, STEPS, policy=policy, **label)
    with torch.inference_mode():
        for call in calls.values():  # warm-up: compiles, captures graphs, and times blocks
            for _ in range(1 if session.dry else 8):
                call()
    measured = session.compare(calls, repeats=TICKS, turn=0.0)
    fastest = min(plains, key=measured.median)
    results = {
        name: {
            "images_per_second": B / measured.median(name) / STEPS,
            "speedup": measured.ratio(fastest, name).median,
            "fastest_plain": fastest,
        }
        for name in calls
    }
    session.write(SUITE, "throughput", parameters, measured, results, BRAIN)
