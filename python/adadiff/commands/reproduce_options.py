"""Options of adadiff reproduce."""

from functools import partial
from pathlib import Path

from . import reproduce
from .options import Commands, add_batch, add_command, add_decoder, add_device, add_features, add_policy


def add_reproduce(commands: Commands, run: reproduce.Run) -> None:
    """run: runs a line of the other commands."""
    command = add_command(commands, "reproduce", partial(reproduce.reproduce, run=run))
    command.add_argument(
        "preset",
        nargs="?",
        metavar="PRESET",
        help="network to reproduce; without one, the table is shown (default: none)",
    )
    given = command.add_argument_group("what it takes")
    given.add_argument(
        "--weights",
        type=Path,
        metavar="SOURCE",
        help="released weights of the preset, as `adadiff convert` reads them; required with a preset (default: none)",
    )
    given.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="statistics of real images, the file that the table names; required with a preset (default: none)",
    )
    add_features(given, "features of the distance", "those of the model's images, where they are known")
    add_decoder(given)

    run_group = command.add_argument_group("how it is run")
    run_group.add_argument("-n", "--n", type=int, metavar="N", help="number of samples (default: as many as published)")
    add_policy(run_group)
    add_batch(run_group)
    add_device(run_group)

    output = command.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for model, samples and result; what is there already is not made again; required with a preset "
        "(default: none)",
    )
