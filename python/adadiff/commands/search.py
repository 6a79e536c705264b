"""adadiff search."""

import argparse
import json
from typing import Any

from .. import checkpoint
from ..calibration.width_search import Candidate, Found, WidthSearch
from ..forward.narrow import network_of
from ..metrics.judges import judge_of
from ..metrics.yardsticks import Yardstick
from ..model import Model
from ..policies.width_file import width_json
from ..writing import check_outputs, replace_file
from .shared import check_limits, drawn_as, file_of, going_on, kept_runs, load_model, policy_of
from .terminal import say, show, show_lines, with_bars

MOST_SAMPLES = 10**6


def search(options: argparse.Namespace) -> None:
    check_outputs(options.force, options.out, inputs=[options.model, options.reference, file_of(options.features)])
    check_limits(options, MOST_SAMPLES)
    model = load_model(options)
    if len(options.steps) != 1:
        raise ValueError(f"a search is for one number of steps, got {len(options.steps)}")
    settings = {
        "aim": options.aim,
        "weight": options.weight,
        "bins": options.bins,
        "population": options.population,
        "generations": options.generations,
        "n": options.n,
        "steps": options.steps[0],
        "solver": options.solver,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
    }
    yardstick = _yardstick(model, options)
    searching = WidthSearch(model, batch=options.batch, yardstick=yardstick, **settings)
    kept = kept_runs(options, {}, features=options.features, reference=options.reference, **settings)
    show({"model": options.model, **settings, "out": options.out})
    written: list[Candidate] = []

    def better(candidate: Candidate) -> None:
        _write(options, model, settings, candidate, {"searched": candidate.quality}, first=not written)
        written.append(candidate)

    try:
        with going_on(kept):
            found = searching.run(progress=with_bars(), better=better, kept=kept)
    except KeyboardInterrupt as error:
        if not written:
            raise
        best = f"{options.out} holds the best schedule so far, of {written[-1].share:.1%} of the multiply-adds"
        raise KeyboardInterrupt(f"{best}; {error} with --force") from None
    try:
        _write(options, model, settings, found.best, _measured(found), first=False)
    finally:
        show_lines(f"\n{found}\n")
    kept.drop()
    how = drawn_as(options.steps[0], options.solver, options.guidance_scale, model.config.classes)
    policy = policy_of("width", options.out)
    say(f"wrote {options.out}; sample {options.model} with {how} --policy {policy}")


def _yardstick(model: Model, options: argparse.Namespace) -> Yardstick | None:
    if options.aim == "faithful":
        if options.features or options.reference:
            raise ValueError("the aim 'faithful' compares images with the whole network's; it takes no features")
        return None
    shape = tuple(model.backbone.sample_shape)
    return Yardstick.of(shape, judge_of(shape, model.config.classes), options.features, options.reference)


def _measured(found: Found) -> dict[str, Any]:
    """Quality of the schedule and of each constant width, on samples that the search did not draw."""
    uniform = [{"width": c.width.widths[0], "share": c.share, "measured": c.quality} for c in found.uniform]
    return {"searched": found.best.quality, "measured": found.measured.quality, "uniform": uniform}


def _write(
    options: argparse.Namespace,
    model: Model,
    settings: dict[str, Any],
    best: Candidate,
    quality: dict[str, Any],
    first: bool,
) -> None:
    """Writes --out. first: refuse a file that exists by now, unless --force; later calls replace the search's own."""
    network = json.loads(network_of(model.config))
    names = {"model": checkpoint.find(options.model).stem, "features": options.features, "reference": options.reference}
    text = width_json(best.width, network, share=best.share, quality=quality, settings={**names, **settings})
    force = options.force or not first
    replace_file(options.out, lambda temporary: temporary.write_text(text, encoding="utf-8"), force=force)
