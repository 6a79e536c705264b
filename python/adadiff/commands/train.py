"""adadiff train."""

import argparse
import dataclasses
import os
from pathlib import Path

from ..output.filling import Process
from ..output.locking import only_launch
from ..training.config import TrainConfig, load_config
from ..training.trainer import Trainer
from .shared import with_progress
from .terminal import say, show, with_bars


def train(options: argparse.Namespace) -> None:
    config = train_config(options)
    out = options.out or Path("runs") / Path(options.config or config.preset).stem
    process = Process.of(os.environ)
    with only_launch(out, process.rank, process.world):
        if process.rank == 0:
            show({**dataclasses.asdict(config), "out": out})
        trainer = Trainer(config, out, options.force)
        if trainer.step and process.rank == 0:
            say(f"{out} holds step {trainer.step} of {config.steps}; going on from there")
        try:
            file = trainer.run(progress=with_bars())
        except (KeyboardInterrupt, OSError) as error:
            # the saved step, not the current one: nothing is saved in the middle of an update
            saved = f"step {trainer.folder.saved} of {config.steps} is in {out}"
            raise with_progress(error, f"{saved}; the same command goes on from there") from None
        if process.rank == 0:
            say(f"wrote {file}")


def train_config(options: argparse.Namespace) -> TrainConfig:
    """Values of CONFIG, if given, overridden by those of the command line. ValueError for invalid values."""
    names = (field.name for field in dataclasses.fields(TrainConfig))
    return load_config(options.config, {name: getattr(options, name) for name in names if hasattr(options, name)})
