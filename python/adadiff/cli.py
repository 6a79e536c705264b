"""The command line.

Exit codes: 0; 2 for unusable input, with a line saying why; 130 after Ctrl-C, with one on what is on disk.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, commands, conversion
from .training import TrainConfig

EXAMPLES = {
    "sample": """examples:
  adadiff sample digits --out samples --n 40 --labels 0,1,2,3,4,5,6,7,8,9 --rule threshold:0.135,first=3
  adadiff sample digits --out samples --rule full --steps 20,50 --solver dpm++2m --guidance 1.5
  torchrun --nproc_per_node 2 -m adadiff sample digits --out many -n 50000
after Ctrl-C, or a kill, the same command draws what is missing; `adadiff.shards.read` reads shards. Shards are
the same bits on any number of processes, if each has as many threads: torchrun sets OMP_NUM_THREADS=1 unless you do""",
    "train": """examples:
  adadiff train --out runs/digits
  adadiff train --out runs/plain --plain
  adadiff train runs/digits/config.json --out runs/longer --steps 20000
after Ctrl-C the same command goes on where it stopped""",
    "evaluate": """examples:
  adadiff evaluate digits
  adadiff evaluate runs/digits/model.safetensors --n 5000 --steps 20 --rule depth:8 --json quality.json""",
    "convert": """examples:
  adadiff convert imagenet256_uvit_huge.pth uvit_huge.safetensors --preset imagenet256_uvit_huge
  adadiff convert 75000.ckpt adadiff_cifar10.safetensors --preset cifar10_uvit_small
  adadiff convert DiT-XL-2-256x256.pt dit_xl.safetensors
  adadiff convert DiT-XL-2-256 dit_xl.safetensors --served-by dit
no weights are run and nothing but tensors is read from a pickle""",
    "inspect": """examples:
  adadiff inspect digits
  adadiff inspect runs/digits/model.safetensors --json""",
}

SOLVER_HELP = (
    "ddim, ddim:ETA, ddpm, dpm++2m, dpm-fast, dpm++fast or euler-maruyama; where a solver can choose its timesteps, "
    "as in ddpm:spacing=respaced (default: ddim)"
)
TRAIN_HELP = {
    "preset": "the network, and the data it is trained on",
    "exits": "train the network together with its exits, or alone",
    "steps": "optimizer updates",
    "batch": "images per update",
    "lr": "learning rate after the warm-up; from there a cosine to zero",
    "warmup": "updates until the learning rate is reached",
    "weight_decay": "AdamW's",
    "ema": "decay of the averaged weights, which are the result",
    "uem_weight": "lambda, the weight of the uncertainty loss",
    "ual_weight": "beta, the weight of the uncertainty-aware layer loss",
    "label_drop": "share of labels replaced by the null class",
    "seed": "of the weights, batches and noises",
    "save_every": "updates between checkpoints",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, that of sys.argv by default. Returns the exit code (argparse may raise SystemExit)."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt as interrupt:
        print(f"adadiff: interrupted; {str(interrupt) or 'no results are on disk'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"adadiff: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="adadiff", description="Diffusion transformers whose samples leave early.")
    top.add_argument("--version", action="version", version=f"adadiff {__version__}")
    known = top.add_subparsers(required=True, metavar="COMMAND")

    one = _command(known, "sample", commands.sample, "draw samples: pictures, or arrays by the thousand")
    _add_model(one)
    one.add_argument("--out", type=Path, required=True, help="folder for the samples, made if it is missing")
    _add_sampling(one, n=16)
    one.add_argument("--labels", type=whole_numbers, help="classes, cycled over the samples (default: none)")
    one.add_argument("--guidance", type=float, default=0.0, help="classifier-free scale (default: 0, none)")
    one.add_argument("--tied", action="store_true", help="both lanes of a guided sample leave together")
    one.add_argument("--batch-invariant", action="store_true", help="the same bits whatever BATCH and SHARD; slower")
    one.add_argument(
        "--format",
        choices=("png", "npz"),
        help="png: a picture per sample, by one process; npz: shards of arrays, manifest.json, any number of "
        f"processes; both: grid.png, report.json (default: png up to {commands.PNG_MOST} samples, else npz; npz for "
        "latents)",
    )
    one.add_argument("--decoder", type=Path, help="folder of the AutoencoderKL that makes pictures of latents")
    one.add_argument("--shard", type=int, help=f"samples in a shard of npz (default: {commands.SHARD})")

    one = _command(known, "train", commands.train, "train a model; options override the file")
    one.add_argument("config", nargs="?", type=Path, metavar="CONFIG.json", help="values of the options below")
    one.add_argument("--out", type=Path, required=True, help="folder for checkpoints; the run that it holds goes on")
    one.add_argument(
        "--plain",
        dest="exits",
        action="store_false",
        default=argparse.SUPPRESS,
        help="the same as --no-exits",
    )
    for field in dataclasses.fields(TrainConfig):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        one.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=f"{TRAIN_HELP[field.name]} (default: {field.default})",
            **kind,
        )

    one = _command(known, "evaluate", commands.evaluate, "quality and speed on the digits, early exit or not")
    _add_model(one)
    _add_sampling(one, n=1000)
    one.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")

    one = _command(known, "convert", commands.convert, "read a checkpoint of U-ViT, DiT, AdaDiff, DuoDiff or diffusers")
    one.add_argument(
        "source", type=Path, metavar="SOURCE", help="a released file, or a folder of training or diffusers"
    )
    one.add_argument("dest", type=Path, metavar="DEST", help="the safetensors file to write")
    one.add_argument(
        "--preset",
        help="tells what shapes do not, and is checked: a name, or a JSON file with the configuration (default: the "
        "only preset of these shapes)",
    )
    one.add_argument(
        "--served-by",
        choices=conversion.SERVERS,
        help="for diffusers, whose sinusoid and epsilon are not those that DiT was trained with: which to run with",
    )

    one = _command(known, "inspect", commands.inspect, "what a model is, what it costs, how it was trained")
    _add_model(one)
    one.add_argument("--json", action="store_true", help="print JSON")
    return top


def whole_numbers(text: str) -> list[int]:
    """The list behind "20,30"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes whole numbers separated by commas, got {text!r}") from None


def _command(known: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    one = known.add_parser(
        name,
        help=text,
        description=text,
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one.set_defaults(run=run)
    return one


def _add_model(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", metavar="MODEL", help='a name that ships with the package ("digits") or a file')


def _add_sampling(one: argparse.ArgumentParser, n: int) -> None:
    one.add_argument(
        "-n",
        "--n",
        type=int,
        default=n,
        help=f"samples (default: {n}); -n is for torchrun, which takes --n for its own",
    )
    one.add_argument(
        "--steps",
        type=whole_numbers,
        default=[50],
        help="solver steps; several, as in 20,30, are cycled over the samples (default: 50)",
    )
    one.add_argument("--solver", default="ddim", help=SOLVER_HELP)
    one.add_argument(
        "--rule",
        help="who leaves: full, threshold:U, patience:U or depth:K "
        f"(default: {commands.DEFAULT_RULE}, or full where the model has no exits)",
    )
    one.add_argument("--seed", type=int, default=0, help="sample i has seed SEED + i (default: 0)")
    one.add_argument("--batch", type=int, default=64, help="samples at a time (default: 64)")
