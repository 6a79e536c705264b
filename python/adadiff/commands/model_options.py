"""Options of the commands that show, calibrate or convert models, or make data: inspect, calibrate, calibrate-reuse,
convert, data."""

from pathlib import Path

from ..calibration.calibrating import AIMS
from ..checkpoint import DTYPES
from ..conversion import convert as conversion
from . import calibrate, calibrate_reuse, convert, data, inspect
from .options import (
    Commands,
    add_batch,
    add_calibration_samples,
    add_command,
    add_count,
    add_device,
    add_features,
    add_force,
    add_model,
    add_prompts,
)
from .values import shares


def add_inspect(commands: Commands) -> None:
    command = add_command(commands, "inspect", inspect.inspect)
    add_model(
        command, "; for a file or folder that `adadiff convert` reads, shows what its tensors tell before converting"
    )
    command.add_argument(
        "--all", action="store_true", help="show every setting, and all thresholds of a calibrated model"
    )
    command.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help="plot the thresholds of a calibrated model; needs matplotlib (default: no plot)",
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")
    add_force(command)


def add_calibrate(commands: Commands) -> None:
    command = add_command(commands, "calibrate", calibrate.calibrate)
    add_model(command)

    goal = command.add_argument_group("what to calibrate for")
    goal.add_argument(
        "--budget",
        type=shares,
        required=True,
        metavar="SHARE,...",
        help="share of the full network's multiply-adds to spend, above 0 and at most 1; or several, as in 0.4,0.55 "
        "(required)",
    )
    goal.add_argument(
        "--aim",
        choices=AIMS,
        default=AIMS[0],
        help="what to keep: faithful, each image as the full network draws it; distribution, the quality of all images "
        f"together (their Fréchet distance), while single images may change (default: {AIMS[0]})",
    )
    add_features(
        goal,
        "features of the image in which the error of an exit is measured",
        "digits, canvases or letters for models that draw these, else the error of the predicted noise",
    )
    goal.add_argument(
        "--refit",
        action="store_true",
        help="first refit the uncertainty estimation modules in closed form, so that the uncertainty predicts "
        "differences in exit error between samples of the same timestep",
    )

    samples = command.add_argument_group("samples to calibrate on")
    add_count(
        samples, 256, "number of samples on which thresholds are chosen, at least 8; as many others measure the result"
    )
    add_prompts(samples)
    add_calibration_samples(samples)

    output = command.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="safetensors file for the calibrated model (required)"
    )
    output.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help="also plot uncertainties against the errors of exiting; needs matplotlib (default: no plot)",
    )
    output.add_argument(
        "--data",
        help="also plot, in --picture, uncertainties against errors relative to the true noise, on held-out images of "
        "this data set, named as for `adadiff train --data` (default: none)",
    )
    add_force(output)

    execution = command.add_argument_group("execution")
    add_batch(execution)
    add_device(execution)


def add_calibrate_reuse(commands: Commands) -> None:
    command = add_command(commands, "calibrate-reuse", calibrate_reuse.calibrate_reuse)
    add_model(command)

    samples = command.add_argument_group("samples to learn from")
    add_count(
        samples,
        1024,
        "number of samples from which errors are learned, at least 32; a quarter as many measure the result",
    )
    add_prompts(samples)
    add_calibration_samples(samples)

    output = command.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="file of JSON for the estimates (required)"
    )
    add_force(output)

    execution = command.add_argument_group("execution")
    add_batch(execution)
    add_device(execution)


def add_convert(commands: Commands) -> None:
    command = add_command(commands, "convert", convert.convert)
    command.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="checkpoint to read: a released file, a training folder of U-ViT, or a folder of diffusers with a "
        "transformer of DiT, PixArt or SD3, or its pipeline",
    )
    command.add_argument("dest", type=Path, metavar="DEST", help="safetensors file to write")
    command.add_argument(
        "--preset",
        metavar="NAME",
        help="source of the settings that the shapes of the tensors do not give, such as the noise schedule: one of "
        "the presets below, or a JSON file (default: the settings of a diffusers folder, else the only preset with "
        "these shapes)",
    )
    command.add_argument(
        "--served-by",
        choices=conversion.SERVERS,
        help="required for a DiT of diffusers, and only for one: compute it as diffusers does or as the DiT "
        "repository does, which differ slightly in the time embedding and the normalization (default: none)",
    )
    command.add_argument(
        "--drop-first-exit",
        action="store_true",
        help="required for DuoDiff networks with exits: drop their exit before block 0, which models of this package "
        "do not have",
    )
    command.add_argument("--dtype", choices=tuple(DTYPES), help="type to store the weights in (default: as in SOURCE)")
    add_force(command)


def add_data(commands: Commands) -> None:
    command = add_command(commands, "data", data.data)
    command.add_argument("name", metavar="NAME", choices=("letters",), help="data set to make: letters")
    command.add_argument("--out", type=Path, metavar="FILE.npz", help="file to write (default: none, for --list)")
    command.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        metavar="FOLDER",
        help="folder under which the packages are unpacked (default: /, where they are installed)",
    )
    command.add_argument(
        "--list",
        action="store_true",
        help="print every family, its package, its licence, and the rule by which it was left out, if it was",
    )
    add_force(command)
