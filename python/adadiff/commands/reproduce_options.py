"""Options of adadiff reproduce."""

from functools import partial
from pathlib import Path

from . import reproduce
from .options import Commands, add_batch, add_command, add_decoder, add_device, add_features, add_policy


def add_reproduce(commands: Commands, run: reproduce.Run) -> None:
    """run: executes one adadiff command line, given as its arguments."""
    command = add_command(commands, "reproduce", partial(reproduce.reproduce, run=run))
    command.add_argument(
        "preset",
        nargs="?",
        metavar="PRESET",
        help="network to reproduce; without one, the table is shown (default: none)",
    )
    inputs = command.add_argument_group("input")
    inputs.add_argument(
        "--weights",
        type=Path,
        metavar="SOURCE",
        help="released weights of the preset, as `adadiff convert` reads them; required with a preset (default: none)",
    )
    inputs.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="statistics of real images, the file that the table names; required with a preset (default: none)",
    )
    add_features(inputs, "features in which the distance is measured, required with a preset", "none")
    add_decoder(inputs)

    run_group = command.add_argument_group("sampling")
    run_group.add_argument("-n", "--n", type=int, metavar="N", help="number of samples (default: as many as published)")
    add_policy(run_group)
    add_batch(run_group)
    add_device(run_group)

    output = command.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for model, samples and result; parts that it holds already are kept; required with a preset "
        "(default: none)",
    )
