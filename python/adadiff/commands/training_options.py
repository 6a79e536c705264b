"""Options of the commands that train or search: train-steps, search, train, distill."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..calibration.calibrating import AIMS
from ..calibration.step_training import SEED as STEPS_SEED
from ..policies.cascade import MODES
from ..training.config import CHOICES, TrainConfig, shipped
from ..training.distilling import DistillConfig
from . import distill, search, train, train_steps
from .options import (
    Commands,
    Options,
    add_batch,
    add_calibration_samples,
    add_command,
    add_count,
    add_device,
    add_features,
    add_force,
    add_guidance,
    add_model,
    add_prompts,
    add_seed,
    add_solver,
)
from .texts import TRAIN_GROUPS
from .values import Settings, setting, shares, whole_numbers


def add_train_steps(commands: Commands) -> None:
    command = add_command(commands, "train-steps", train_steps.train_steps)
    add_model(command)

    goal = command.add_argument_group("what to choose")
    goal.add_argument(
        "--candidates",
        type=whole_numbers,
        default=[2, 3, 5, 8, 10, 15, 20],
        metavar="N,...",
        help="rising numbers of steps, 1 to 1000, among which the selector chooses (default: 2,3,5,8,10,15,20)",
    )
    goal.add_argument(
        "--bar",
        type=float,
        default=0.05,
        help="an image is good enough up to this root mean squared difference from the image of the largest candidate; "
        "pixels lie in [-1, 1] (default: 0.05)",
    )
    goal.add_argument(
        "--penalty",
        type=float,
        default=1.0,
        help="cost of an image above the bar, relative to that of the largest candidate's steps; a larger penalty "
        "leaves fewer images above (default: 1)",
    )

    samples = command.add_argument_group("samples to learn from")
    add_count(
        samples,
        400,
        "number of noises to draw with every candidate, at least 8 and one for each class or prompt; half as many "
        "others measure the result",
    )
    add_prompts(samples, "; of five or more, every fifth only measures")
    add_seed(samples, STEPS_SEED, ", far from the seeds of other commands")
    add_solver(samples)
    add_guidance(samples)

    output = command.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="safetensors file for the model with its selector (required)",
    )
    add_force(output)

    execution = command.add_argument_group("execution")
    add_batch(execution)
    add_device(execution)


def add_search(commands: Commands) -> None:
    command = add_command(commands, "search", search.search)
    add_model(command)

    goal = command.add_argument_group("what to search for")
    goal.add_argument(
        "--weight",
        type=float,
        required=True,
        metavar="W",
        help="weight of the work, at least 0: the search minimizes quality + W * share, where share is that of the "
        "whole network's multiply-adds (required)",
    )
    goal.add_argument(
        "--aim",
        choices=AIMS,
        default=AIMS[1],
        help="quality to minimize: distribution, the Fréchet distance of all images to real ones; "
        f"faithful, the mean squared difference to the whole network's images (default: {AIMS[1]})",
    )
    add_features(goal, "features of images, for distribution", "digits, canvases or letters for models that draw these")
    goal.add_argument(
        "--reference",
        metavar="PATH",
        help="real images or their statistics, for distribution, as for `adadiff evaluate` (default: held-out images "
        "of digits, canvases or letters)",
    )

    effort = command.add_argument_group("how long to search")
    for name, default, text in (
        ("bins", 10, "intervals of timesteps, 1 to 1000, each with one width"),
        ("population", 16, "schedules in a generation, more than the model has widths"),
        ("generations", 10, "generations of schedules, the first included"),
    ):
        effort.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")

    samples = command.add_argument_group("samples drawn with each schedule")
    add_count(samples, 512, "number of samples, at least 2; as many others measure the result")
    add_calibration_samples(samples)

    output = command.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="file of JSON for the schedule (required)"
    )
    add_force(output)

    execution = command.add_argument_group("execution")
    add_batch(execution)
    add_device(execution)


def add_train(commands: Commands) -> None:
    command = add_command(commands, "train", train.train)
    command.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help=f"configuration: one in the package ({', '.join(shipped())}), or a TOML or JSON file with values for the "
        "options below (default: none, that is, the defaults below)",
    )
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for title, texts in TRAIN_GROUPS.items():
        group = command.add_argument_group(title)
        if title == "output":
            group.add_argument(
                "--out",
                type=Path,
                metavar="FOLDER",
                help="folder of the run; if it holds the same run already, training resumes (default: runs/NAME, "
                "after CONFIG or the preset)",
            )
            add_force(group, "begin anew, even if FOLDER holds another run or files with names of a run's files")
        for name, text in texts.items():
            _add_train_option(group, fields[name], text)
            if name == "exits":
                group.add_argument(
                    "--plain",
                    dest="exits",
                    action="store_false",
                    default=argparse.SUPPRESS,
                    help="the same as --no-exits",
                )


def _add_train_option(group: Options, field: dataclasses.Field[Any], text: str) -> None:
    option, default = "--" + field.name.replace("_", "-"), field.default
    kind: dict[str, Any] = {"type": field.type, "metavar": "N" if field.type is int else field.name.upper()}
    if field.type is bool:
        kind = {"action": argparse.BooleanOptionalAction}
        default = option if default else f"--no-{option[2:]}"
    elif field.type is list:
        kind, default = {"type": shares, "metavar": "SHARE,..."}, "none"
    elif field.type is dict:
        kind = {"nargs": "+", "type": setting, "action": Settings, "metavar": "KEY=VALUE"}
        default = "none"
    elif field.name in CHOICES:
        kind = {"choices": CHOICES[field.name]}
    shown = f"{text} (default: {'none' if default == '' else default})"
    group.add_argument(option, dest=field.name, default=argparse.SUPPRESS, help=shown, **kind)


def add_distill(commands: Commands) -> None:
    command = add_command(commands, "distill", distill.distill)
    add_model(command)

    student = command.add_argument_group("the student")
    student.add_argument(
        "--data",
        required=True,
        help="training images named as for `adadiff train --data`; the oracle learns what is real from them (required)",
    )
    texts = {
        "steps": "steps of the student's DDIM",
        "halvings": "how often the steps are halved; the first teacher takes steps x 2^halvings",
        "updates": "optimizer updates of each halving",
        "batch": "images of one update",
        "lr": "learning rate at the start of each halving, from where it falls to 0",
        "label_drop": "share of the labels that are replaced by the null class",
        "seed": "seed of weights, batches and noise",
    }
    _add_distill_options(student, texts)

    texts = {
        "oracle_updates": "optimizer updates of the oracle",
        "samples": "images of the student that the oracle learns from; as many others give the quantiles of its scores",
    }
    _add_distill_options(command.add_argument_group("the oracle"), texts)

    texts = {
        "share": "share of the student's images that go on to the model: 0, 1, or from 0.01 to 0.99",
        "mode": "refine adds noise to these images and denoises them; regenerate draws them anew",
        "sigma": "noise that refine adds: alpha_bar = 1 - sigma",
    }
    _add_distill_options(command.add_argument_group("defaults of --policy cascade:FILE"), texts)

    output = command.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write (required)")
    output.add_argument(
        "--device", help="device to compute on, such as cpu, cuda or cuda:1 (default: cuda if there is a GPU, else cpu)"
    )
    add_force(output)


def _add_distill_options(group: Options, texts: dict[str, str]) -> None:
    fields = {field.name: field for field in dataclasses.fields(DistillConfig)}
    for name, text in texts.items():
        field, kind = fields[name], dict[str, Any]()
        if name == "mode":
            kind = {"choices": MODES}
        else:
            kind = {"type": field.type, "metavar": "N" if field.type is int else "X"}
        option = "--" + name.replace("_", "-")
        group.add_argument(option, default=field.default, help=f"{text} (default: {field.default})", **kind)
