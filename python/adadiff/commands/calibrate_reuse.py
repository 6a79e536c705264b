"""adadiff calibrate-reuse."""

import argparse

from ..calibration.reuse_errors import NUMBER, ReuseErrors
from ..policies.estimated_file import estimates_json
from ..writing import check_outputs, check_space, replace_file
from .prompts import texts_of
from .shared import check_limits, drawn_as, going_on, kept_runs, load_model, policy_of
from .terminal import say, show, show_lines, with_bars

MOST_SAMPLES = 10**5
NOTES = 2**16  # bytes of a file without weights


def calibrate_reuse(options: argparse.Namespace) -> None:
    check_outputs(options.force, options.out, inputs=[options.model, options.prompts])
    check_limits(options, MOST_SAMPLES)
    model = load_model(options)
    if len(options.steps) != 1:
        raise ValueError(f"errors are estimated for one number of steps, got {len(options.steps)}")
    settings = {
        "n": options.n,
        "steps": options.steps[0],
        "solver": options.solver,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "batch": options.batch,
    }
    texts = texts_of(options, model)
    errors = ReuseErrors(model, **settings, **texts)
    kept = kept_runs(options, texts, **settings)
    check_space(options.out, NUMBER * options.steps[0] * model.config.network.dim + NOTES)
    show({"model": options.model, **settings, "out": options.out})
    with going_on(kept):
        estimates = errors.run(progress=with_bars(), kept=kept)
    text = estimates_json(estimates)
    try:
        replace_file(options.out, lambda temporary: temporary.write_text(text, encoding="utf-8"), force=options.force)
    finally:  # print the numbers even if the disk is full
        show_lines(f"\n{estimates}\n")
    kept.drop()
    middle = estimates.by_sample[len(estimates.by_sample) // 2].share
    policy = policy_of("estimate", options.out, f",share={middle:.2g}")
    how = drawn_as(options.steps[0], options.solver, options.guidance_scale, model.config.classes)
    say(f"wrote {options.out}; sample with {how} --policy {policy}")
