"""adadiff diff: draws one sample in two ways and shows where they diverge."""

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..forward.options import ExecutionOptions
from ..model import Model
from ..output.pictures import CHANNELS, make_grid, to_pixels, write_png
from ..sampling.params import SamplingParams
from ..sampling.sample_batch import SampleBatch
from ..sampling.trace import Trace, trace
from ..writing import check_outputs, replace_file
from .shared import check_policy, device_of, execution_of, load_model, steps_of
from .terminal import print_table, say, show

OF_SAMPLES = ("policy", "solver", "guidance_scale", "seed", "class_label")
OF_EXECUTION = ("batch_invariant", "runner")
OF_MODELS = ("model", "device", "dtype")
KEYS = (*OF_MODELS, *OF_SAMPLES, *OF_EXECUTION)
MOST = 10  # pictures in a row


@dataclass(frozen=True)
class Way:
    """One of the two ways to draw the sample."""

    model: Model
    params: SamplingParams
    execution: ExecutionOptions

    def run(self) -> Trace:
        return trace(self.model, self.params, execution=self.execution)


def diff(options: argparse.Namespace) -> None:
    if unknown := [key for key in options.other if key not in KEYS]:
        raise ValueError(f"--other takes no {', '.join(unknown)}; its keys are {', '.join(KEYS)}")
    picture = options.picture
    check_outputs(options.force, picture, inputs=(options.model, str(options.other.get("model", options.model))))
    named = {key: str(value) if key in OF_MODELS else value for key, value in options.other.items()}  # model=3: a file
    other = argparse.Namespace(**{**vars(options), **named})
    ways = _way(options), _way(other)
    shapes = [way.model.backbone.sample_shape for way in ways]
    if shapes[0] != shapes[1]:
        raise ValueError(f"both models must draw samples of one shape, got {shapes[0]} and {shapes[1]}")
    if picture is not None and shapes[0][0] not in CHANNELS:
        raise ValueError("the models draw latents, not images; leave --picture out")
    show(_shown(options), "")
    show({name: value for name, value in _shown(other).items() if name in options.other}, "other.")
    one, two = (way.run() for way in ways)
    if not torch.equal(one.t, two.t):
        raise ValueError("the two ways do not take the same timesteps; choose solvers that do")
    apart = (one.x - two.x).square().flatten(1).mean(1).sqrt()
    at = np.unique(np.linspace(0, len(apart) - 1, min(MOST, len(apart))).round().astype(int))
    try:
        if picture is not None:
            gap = (one.x0 - two.x0).abs() * 2 - 1  # black where they agree
            rows = [run[i] for run in (one.x0, two.x0, gap) for i in at]
            grid = make_grid([to_pixels(image) for image in rows], len(at))
            replace_file(picture, lambda temporary: write_png(temporary, grid), force=options.force)
    finally:  # print the numbers even if the disk is full
        print_table([_row(i, one, two, float(apart[i])) for i in range(len(apart))])
        _tell(one, two, apart.numpy())
    if picture is not None:
        steps = ", ".join(map(str, at + 1))
        say(f"wrote {picture}: images predicted at steps {steps}; the first way's, the other's, difference")


def _way(options: argparse.Namespace) -> Way:
    params = SamplingParams(
        seed=options.seed,
        class_labels=options.class_label,
        steps=steps_of(options, 1, [0]),
        solver=options.solver,
        policy=options.policy,
        guidance_scale=options.guidance_scale,
    )
    model = load_model(options)
    SampleBatch.of(model, 1, params)  # raises for params that do not fit the model
    check_policy(model, options.policy)
    return Way(model, params, execution_of(options))


def _shown(options: argparse.Namespace) -> dict[str, Any]:
    return {key: device_of(options) if key == "device" else getattr(options, key) for key in (*KEYS, "steps")}


def _row(i: int, one: Trace, two: Trace, apart: float) -> dict[str, str]:
    return {
        "step": str(i + 1),
        "t": f"{one.t[i]:.0f}",
        **{f"exit layer{name}": _layers(run, i) for name, run in (("", one), (", other", two))},
        **{f"u there{name}": _score(run, i) for name, run in (("", one), (", other", two))},
        "apart": f"{apart:.2g}",
        "": "" if torch.equal(one.exit_layer[i], two.exit_layer[i]) else "exits differ",
    }


def _layers(run: Trace, i: int) -> str:
    return ", ".join(str(layer) for layer in run.exit_layer[i].tolist() if layer)


def _score(run: Trace, i: int) -> str:
    score = float(run.exit_scores[i])
    return f"{score:.4f}" if score == score else ""


def _tell(one: Trace, two: Trace, apart: np.ndarray) -> None:
    differing = (one.exit_layer != two.exit_layer).any(1).nonzero().flatten().tolist()
    moved = apart.nonzero()[0]
    if not len(moved):
        print("the same bits at every step")
    else:
        print(f"the first bits differ after step {moved[0] + 1}; apart: root mean square of the images' difference")
    if differing:
        print(f"exits differ at {len(differing)} of {len(apart)} steps, first at step {differing[0] + 1}")
