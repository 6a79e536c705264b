"""adadiff calibrate."""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..calibration.calibrating import Calibrating
from ..calibration.recording import noised_errors
from ..calibration.reliability import matplotlib_figure, reliability_picture
from ..data import sources
from ..metrics.extractors import features_from
from ..model import Model
from ..writing import check_outputs, check_space, replace_file
from .prompts import texts_of
from .shared import check_limits, drawn_as, file_of, going_on, kept_runs, load_model
from .terminal import say, show, show_lines, with_bars

HEADER = 2**16  # bytes, for names and the configuration
MOST_SAMPLES = 10**5  # recorded in memory
TIMES = 10  # timesteps in the picture at which real images are noised


def calibrate(options: argparse.Namespace) -> None:
    check_outputs(options.force, options.picture, inputs=[options.model])  # --out may replace it
    check_outputs(options.force, options.out, options.picture, inputs=[file_of(options.features)])
    check_limits(options, MOST_SAMPLES)
    if options.picture is not None:
        matplotlib_figure()  # a missing matplotlib shows before the calibration
    model = load_model(options)
    notes = checkpoint.read_tensors(checkpoint.find(options.model))[1].get("notes", {})
    if len(options.steps) != 1:
        raise ValueError(f"a calibration is for one number of steps, got {len(options.steps)}")
    real = None if options.data is None else _held_out(model, options)
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
        features.dims(tuple(model.backbone.sample_shape))  # raises where the shape does not fit
    texts = texts_of(options, model)
    calibrating = Calibrating(model, options.budget, features=features, **settings, **texts)
    kept = kept_runs(options, texts, budget=options.budget, features=options.features, **settings)
    check_space(options.out, _bytes(model, options))
    shown = {"features": options.features or "the model's own, if known"}
    show({"model": options.model, "budget": options.budget, **settings, **shown, "out": options.out})
    with going_on(kept):
        calibration = calibrating.run(progress=with_bars(), kept=kept)
    model = calibrating.model
    try:
        _save(model, options, notes)
        if options.picture is not None:
            t = calibrating.recording.t
            t = t[torch.linspace(0, len(t) - 1, min(TIMES, len(t)), dtype=torch.float32, device="cpu").round().long()]
            noised = None if real is None else (t, *noised_errors(model, *real, t.tolist(), options.seed))
            picture = partial(reliability_picture, calibrating.recording, noised=noised)
            replace_file(options.picture, picture, force=options.force)
    finally:  # print the numbers even if the disk is full
        show_lines(f"\n{calibration}\n")
    kept.drop()
    if options.picture is not None:
        say(f"wrote {options.picture}")
    how = drawn_as(calibration.steps, calibration.solver, calibration.guidance_scale, model.config.classes)
    say(f"wrote {options.out}; sample it with {how} --policy exit:budget={calibration.budgets[0].share:g}")


def _save(model: Model, options: argparse.Namespace, notes: dict[str, Any]) -> None:
    """Writes --out. If that fails, e.g. on a full disk, saves the model in a temporary folder, because calibration may
    have taken hours, and raises OSError with the name of that file."""
    try:
        replace_file(options.out, lambda temporary: checkpoint.save(model, temporary, notes), force=options.force)
    except (OSError, ValueError) as error:
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="adadiff-")) / options.out.name
            checkpoint.save(model, elsewhere, notes)
        except OSError as second:
            raise OSError(f"{error}; nor was there room for the model elsewhere: {second}") from error
        raise OSError(f"{error}; the calibrated model is in {elsewhere}") from error


def _bytes(model: Model, options: argparse.Namespace) -> int:
    """Estimated size of --out in bytes: the weights, and about 24 characters for each threshold."""
    numbers = len(options.budget) * options.steps[0] * model.num_layers
    return sum(value.nbytes for value in model.parameters()) + 24 * numbers + HEADER


def _held_out(model: Model, options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Test images of --data, float32 [n, C, H, W], and their labels (None without classes), for --picture."""
    if options.picture is None:
        raise ValueError("--data is for the picture; give --picture FILE.png, too")
    data, classes = sources.load(options.data, "test"), model.config.classes
    if data.shape != model.backbone.sample_shape or (classes and not 1 <= data.classes <= classes):
        raise ValueError(
            f"data {options.data!r} is {data.shape} in {data.classes} classes, but the model draws "
            f"{model.backbone.sample_shape} in {classes}"
        )
    images, labels = data.batch(torch.arange(min(options.n, len(data)), device="cpu"))
    return images, labels if classes else None
