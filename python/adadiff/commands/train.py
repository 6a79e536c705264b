"""adadiff train."""

import argparse
import dataclasses
import os
from pathlib import Path

from .. import checkpoint
from ..output.filling import Process
from ..training.config import TrainConfig, load_config
from ..training.run_folder import STATE
from ..training.trainer import Trainer
from .shared import show


def train(options: argparse.Namespace) -> None:
    config = train_config(options)
    out = options.out or Path("runs") / Path(options.config or config.preset).stem
    main = Process.of(os.environ).rank == 0
    if main:
        show({**dataclasses.asdict(config), "out": out})
    trainer = Trainer(config, out)
    if trainer.step and main:
        print(f"{out} holds step {trainer.step} of {config.steps}; going on from there")
    try:
        file = trainer.run()
    except KeyboardInterrupt:
        state = out / STATE  # may lag behind: nothing is saved in the middle of an update
        step = checkpoint.read_tensors(state)[1]["step"] if state.exists() else 0
        there = f"step {step} of {config.steps} is in {out}"
        raise KeyboardInterrupt(f"{there}; the same command goes on from there") from None
    if main:
        print(f"wrote {file}")


def train_config(options: argparse.Namespace) -> TrainConfig:
    """The configuration's values, if there is one, under those of the command line. ValueError for what cannot be."""
    names = (field.name for field in dataclasses.fields(TrainConfig))
    return load_config(options.config, {name: getattr(options, name) for name in names if hasattr(options, name)})
