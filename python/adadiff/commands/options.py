"""Options that several commands share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from ..calibration.calibrating import CALIBRATION_SEED
from ..checkpoint import DTYPES
from ..forward.options import Runner
from ..pipelines.text import CLIP
from ..policies.spelling import DEFAULT
from .formatting import HelpFormatter
from .pages import PAGES
from .texts import AUTO_HELP, FEATURES_HELP, GUIDANCE_HELP, SOLVER_HELP
from .values import steps, whole_numbers

Commands = Any  # what `ArgumentParser.add_subparsers` returns, whose type is private
Options = argparse._ActionsContainer  # a parser, or a group of its options

MODELS = (
    "canvases, canvases_plain, canvases_shallow, digits, digits_plain, digits_prototypes, digits_slim, letters, "
    "letters_base, letters_plain or letters_shallow"
)


class Once(argparse.Action):
    """An option that may be given once: argparse would silently drop the first of two values."""

    def __call__(
        self, parser: argparse.ArgumentParser, options: argparse.Namespace, value: Any, name: Any = None
    ) -> None:
        if getattr(options, f"_{self.dest}_given", False):
            parser.error(f"{name} is given twice; this command takes one")
        setattr(options, f"_{self.dest}_given", True)
        setattr(options, self.dest, value)


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    """Adds the parser of command `name`, with its help page; `run` is called with the parsed options."""
    page = PAGES[name]
    command = commands.add_parser(
        name,
        help=page.summary,
        usage=f"%(prog)s {page.usage}".strip(),
        description=page.description,
        epilog=f"examples:\n{page.examples}\n\n{page.notes}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def add_model(options: Options, more: str = "") -> None:
    options.add_argument(
        "model",
        metavar="MODEL",
        help=f"name of a model in the package ({MODELS}), or a file that `adadiff train`, `calibrate` or `convert` "
        f"wrote{more}",
    )


def add_count(options: Options, n: int, what: str) -> None:
    options.add_argument(
        "-n",
        "--n",
        type=int,
        default=n,
        metavar="N",
        help=f"{what} (default: {n})",
    )


def add_seed(options: Options, seed: int = 0, note: str = "") -> None:
    options.add_argument(
        "--seed",
        type=int,
        default=seed,
        metavar="N",
        help=f"seed of the first sample, at least 0; sample i has the seed N + i (default: {seed}{note})",
    )


def add_steps(options: Options, several: bool = True) -> None:
    """several: whether samples may take different numbers of steps."""
    more = f"; with several numbers, as in 20,30, the samples take turns; {AUTO_HELP}" if several else ""
    options.add_argument(
        "--steps",
        type=steps if several else whole_numbers,
        default=[50],
        metavar="N,...|auto" if several else "N",
        help=f"evaluations of the network for each sample, 1 to 1000{more} (default: 50)",
    )


def add_solver(options: Options) -> None:
    options.add_argument("--solver", default="ddim", help=SOLVER_HELP)


def add_guidance(options: Options) -> None:
    options.add_argument("--guidance-scale", type=float, default=1.0, metavar="SCALE", help=GUIDANCE_HELP)


def add_prompts(options: Options, more: str = "") -> None:
    options.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=f"prompts for a text-to-image model, which requires them: a text file, one prompt a line{more} (default: "
        "none)",
    )
    options.add_argument(
        "--text-encoder",
        type=Path,
        metavar="FOLDER",
        help=f"text encoder of CLIP for the prompts, a folder or a name on the Hugging Face hub (default: {CLIP})",
    )


def add_calibration_samples(options: Options) -> None:
    """Seed, steps, solver and guidance of samples that a command learns from."""
    add_seed(options, CALIBRATION_SEED, ", far from the seeds of other commands")
    add_steps(options, several=False)
    add_solver(options)
    add_guidance(options)


def add_policy(options: Options) -> None:
    options.add_argument(
        "--policy", action=Once, default=DEFAULT, help=f"one of the policies above (default: {DEFAULT})"
    )


def add_decoder(options: Options) -> None:
    options.add_argument(
        "--decoder",
        type=Path,
        metavar="FOLDER",
        help="for models that draw latents: folder of the diffusers AutoencoderKL that decodes them to pictures "
        "(default: none)",
    )


def add_force(options: Options, what: str = "replace files that exist") -> None:
    options.add_argument("--force", action="store_true", help=what)


def add_features(options: Options, purpose: str, default: str) -> None:
    options.add_argument("--features", help=f"{purpose}: {FEATURES_HELP} (default: {default})")


def add_batch(options: Options) -> None:
    options.add_argument(
        "--batch", type=int, default=64, metavar="N", help="largest number of samples computed at once (default: 64)"
    )


def add_device(options: Options) -> None:
    options.add_argument(
        "--device", help="device to compute on, such as cpu, cuda or cuda:1 (default: cuda if there is a GPU, else cpu)"
    )
    options.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="data type that the weights are converted to (default: as they are stored)",
    )


def add_execution(options: Options) -> None:
    options.add_argument(
        "--runner",
        choices=get_args(Runner),
        default="eager",
        help="how blocks are run: eager, operation by operation; compiled, by torch.compile, which takes seconds to "
        "minutes at the beginning; or, on a GPU, captured, as CUDA graphs (default: eager)",
    )
    options.add_argument(
        "--batch-invariant",
        action="store_true",
        help="make each sample the same, bit for bit, in a batch of any size; slower, and only with --runner eager",
    )
