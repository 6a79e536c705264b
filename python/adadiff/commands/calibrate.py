"""adadiff calibrate."""

import argparse

import torch

from .. import checkpoint
from ..calibration.calibrating import Calibrating
from ..calibration.recording import noised_errors
from ..calibration.reliability import matplotlib_figure, reliability_picture
from ..data import sources
from ..metrics.extractors import features_from
from ..model import Model
from .shared import check_writable, load_model, show

TIMES = 10  # of a picture, at which noise is put on real images


def calibrate(options: argparse.Namespace) -> None:
    model = load_model(options)
    if len(options.steps) != 1:
        raise ValueError(f"a calibration is for one number of steps, got {len(options.steps)}")
    real = None if options.data is None else _held_out(model, options)
    if options.picture is not None:
        matplotlib_figure()  # else it would be missed at the end
    for path in filter(None, (options.out, options.picture)):
        check_writable(path)
    settings = {
        "aim": options.aim,
        "n": options.n,
        "steps": options.steps[0],
        "solver": options.solver,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "batch": options.batch,
        "refit": options.refit,
    }
    features = None if options.features is None else features_from(options.features)
    if features is not None:
        features.dims(tuple(model.backbone.sample_shape))  # for its checks
    calibrating = Calibrating(model, options.budget, features=features, **settings)  # and its
    shown = {"features": options.features or "the model's own, if known"}
    show({"model": options.model, "budget": options.budget, **settings, **shown, "out": options.out})
    calibration = calibrating.run(progress=True)
    model = calibrating.model
    notes = checkpoint.read_tensors(checkpoint.find(options.model))[1].get("notes", {})
    checkpoint.save(model, options.out, notes)
    print(f"\n{calibration}\n")
    if options.picture is not None:
        t = calibrating.recording.t
        t = t[torch.linspace(0, len(t) - 1, min(TIMES, len(t))).round().long()]
        noised = None if real is None else (t, *noised_errors(model, *real, t.tolist(), options.seed))
        reliability_picture(calibrating.recording, options.picture, noised)
        print(f"wrote {options.picture}")
    print(f"wrote {options.out}; sample it with --policy exit:budget={calibration.budgets[0].share:g}")


def _held_out(model: Model, options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and labels that no training saw, for the picture of a calibration."""
    if options.picture is None:
        raise ValueError("--data is for the picture; give --picture FILE.png, too")
    data, classes = sources.load(options.data, "test"), model.config.classes
    if data.shape != model.backbone.sample_shape or (classes and not 1 <= data.classes <= classes):
        raise ValueError(
            f"data {options.data!r} is {data.shape} in {data.classes} classes, but the model draws "
            f"{model.backbone.sample_shape} in {classes}"
        )
    images, labels = data.batch(torch.arange(min(options.n, len(data))))
    return images, labels if classes else None
