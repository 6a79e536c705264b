"""Tiny cascades: a student of three blocks for the teacher of five, and an oracle that knows nothing."""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adadiff.model import Model
from adadiff.sampling.cascade_file import CascadeSettings, write_cascade
from adadiff.sampling.oracle import Oracle, OracleConfig
from adadiff.sampling.sampler import sample
from sampler.tiny import SERVED, scramble

# Prime, so that its steps never fall on those of a teacher of 4 or 5
STUDENT_STEPS = 3
LABELS = [0, 2, 1, 0, 1, 2, 2]


@cache
def student() -> Model:
    config = dataclasses.replace(SERVED, exits=None, network=dataclasses.replace(SERVED.network, depth=2))
    made = Model(config).requires_grad_(False).eval()
    scramble(made.backbone, 0.3, seed=9)
    return made


@cache
def oracle() -> Oracle:
    made = Oracle(OracleConfig(channels=1, image_size=4, classes=3, width=3)).requires_grad_(False).eval()
    scramble(made, 0.5, seed=3)
    return made


@torch.no_grad()
def score(images: Tensor, labels: list[int]) -> Tensor:
    """One image at a time. labels: 3 for none."""
    own = torch.tensor(labels)
    return torch.cat([oracle()(images[i : i + 1], own[i : i + 1]) for i in range(len(images))])


@cache
def quantiles() -> tuple[float, ...]:
    """Of 200 images that no test draws."""
    labels = [i % 3 for i in range(200)]
    images, _ = sample(student(), 200, steps=STUDENT_STEPS, class_labels=labels, seed=10**6)
    return tuple(np.quantile(score(images, labels).double().numpy(), np.arange(1, 100) / 100).tolist())


def settings(**changes: object) -> CascadeSettings:
    given = {"steps": STUDENT_STEPS, "solver": "ddim", "share": 0.5, "mode": "refine", "sigma": 0.5}
    return CascadeSettings(**{**given, "quantiles": quantiles(), **changes})


def written(folder: Path, name: str = "cascade.safetensors", **changes: object) -> str:
    """The name of a file in `folder`."""
    write_cascade(folder / name, student(), oracle(), settings(**changes))
    return str(folder / name)
