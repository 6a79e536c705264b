"""adadiff train-steps."""

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..calibration.step_training import StepTraining
from ..reading import read_text
from ..writing import check_outputs, check_space, replace_file
from .prompts import texts_of
from .shared import check_limits, digest, load_model, with_progress
from .step_choices import show_choices
from .terminal import say, show, with_bars

HEADER = 2**16  # bytes, for names and the configuration
MOST_SAMPLES = 10**5


def train_steps(options: argparse.Namespace) -> None:
    partial = options.out.with_name(f"{options.out.name}.errors.safetensors")
    check_outputs(options.force, options.out, inputs=[options.prompts])
    check_outputs(True, partial, inputs=[options.model, options.out, options.prompts])
    check_limits(options, MOST_SAMPLES)
    model = load_model(options)
    notes = checkpoint.read_tensors(checkpoint.find(options.model))[1].get("notes", {})
    settings = {
        "candidates": options.candidates,
        "bar": options.bar,
        "penalty": options.penalty,
        "n": options.n,
        "solver": options.solver,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "batch": options.batch,
    }
    training = StepTraining(model, **settings, **texts_of(options, model))
    weights = sum(value.nbytes for value in model.parameters())
    check_space(options.out, weights + HEADER + 8 * options.n * len(options.candidates))
    asked = {key: value for key, value in settings.items() if key not in ("bar", "penalty", "batch")}
    asked |= {"model_sha256": digest(options.model), "dtype": options.dtype}
    asked |= {"prompts": None if options.prompts is None else read_text(options.prompts)}
    errors = _recorded(partial, asked, options.force)
    show({"model": options.model, **settings, "out": options.out})
    if errors is not None:
        say(f"{partial} holds errors of {len(errors)} of {options.n} noises; going on from there")

    def keep(done: Tensor) -> None:
        nonlocal errors
        checkpoint.write_tensors(partial, {"errors": done}, {"settings": asked})
        errors = done

    try:
        selector = training.run(with_bars(), errors, keep)
    except (KeyboardInterrupt, OSError) as error:
        saved = f"errors of {0 if errors is None else len(errors)} of {options.n} noises are in {partial}"
        raise with_progress(error, f"{saved}; the same command goes on from there") from None
    model = copy.copy(model)  # shares the parameters
    model.step_selector = selector
    replace_file(options.out, lambda temporary: checkpoint.save(model, temporary, notes), force=options.force)
    partial.unlink(missing_ok=True)
    show_choices(selector.config, selector.steps_of_classes)
    say(f"wrote {options.out}; sample it with --steps auto")


def _recorded(partial: Path, asked: Mapping[str, Any], force: bool) -> Tensor | None:
    """Errors that an earlier run with the same settings saved, float64 [n, candidates], or None. ValueError for a file
    of other settings, unless `force` discards it."""
    if not partial.exists():
        return None
    try:
        tensors, metadata = checkpoint.read_tensors(partial)
        if metadata.get("settings") != asked or set(tensors) != {"errors"} or tensors["errors"].ndim != 2:
            raise ValueError(f"{partial} holds errors of other settings")
    except ValueError as error:
        if force:
            return None
        raise ValueError(f"{error}; remove the file, or give --force to begin anew") from None
    return tensors["errors"].double()
