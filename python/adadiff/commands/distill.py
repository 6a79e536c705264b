"""adadiff distill."""

import argparse
import dataclasses
from pathlib import Path

from tqdm import tqdm

from .. import checkpoint
from ..data import sources
from ..model import Model
from ..sampling.cascade_file import CascadeSettings, write_cascade
from ..sampling.oracle import Oracle
from ..training.distilling import DistillConfig, Distilling
from ..writing import check_outputs, check_space, replace_file
from .shared import device_of, digest, policy_of, with_progress
from .terminal import say, show, with_bars


def distill(options: argparse.Namespace) -> None:
    out = options.out
    state = out.with_name(f"{out.name}.state")
    check_outputs(options.force, out, inputs=[options.model])
    config = DistillConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(DistillConfig)})
    model = checkpoint.load(options.model, device_of(options), "float32")
    data = sources.load(options.data)
    identity = {"model": options.model, "model_sha256": digest(options.model), "data": options.data}
    distilling = Distilling(model, data, config, state, identity, options.force)
    check_space(out, 3 * sum(value.nbytes for value in model.parameters()))
    show({"model": options.model, "data": options.data, **dataclasses.asdict(config), "out": out})
    if len(distilling.left) < config.halvings:
        say(f"{state} holds a student of {2 * distilling.left[0] if distilling.left else config.steps} steps; going on")
    try:
        student, oracle, settings = _run(distilling, config)
    except (KeyboardInterrupt, OSError) as error:
        raise with_progress(error, _kept(distilling, state)) from None
    notes = distilling.notes
    replace_file(out, lambda path: write_cascade(path, student, oracle, settings, notes), force=options.force)
    state.unlink(missing_ok=True)
    say(f"the oracle finds the real image in {distilling.held_out_auc:.1%} of held-out pairs of a real and a drawn one")
    say(f"wrote {out}; sample {options.model} with --policy {policy_of('cascade', out)}")


def _run(distilling: Distilling, config: DistillConfig) -> tuple[Model, Oracle, CascadeSettings]:
    total = config.updates * len(distilling.left)
    with tqdm(total=total, unit="update", dynamic_ncols=True, disable=not with_bars()) as bar:

        def on_update(stage: str, update: int, loss: float) -> None:
            bar.set_description(stage, refresh=False)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()

        return distilling.run(on_update)


def _kept(distilling: Distilling, state: Path) -> str:
    if len(distilling.left) == distilling.config.halvings:
        return "nothing is saved before the first halving is done"
    return f"the student of the last finished halving is in {state}; the same command goes on from there"
