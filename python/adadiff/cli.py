"""The command line.

Exit codes: 0; 2 for unusable input, with a line saying why; 130 after Ctrl-C, with one on what is on disk; 141 where
nobody reads the output any more, as after `| head`.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from . import __version__
from .calibration.calibrating import AIMS, CALIBRATION_SEED
from .checkpoint import DTYPES
from .commands import calibrate, diff, evaluate, info, models, sample, train
from .commands.texts import EXAMPLES, GUIDANCE_HELP, SOLVER_HELP, TRAIN_HELP
from .commands.values import Settings, interval, setting, shares, whole_numbers
from .conversion import convert as conversion
from .forward.options import Runner
from .forward.two_stage import T_SWITCH
from .pipelines.text import CLIP
from .policies.spelling import DEFAULT
from .training.config import CHOICES, TrainConfig, shipped


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, that of sys.argv by default. Returns the exit code (argparse may raise SystemExit)."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print(f"adadiff: interrupted; {str(interrupt) or 'no results are on disk'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        return 141
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"adadiff: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="adadiff", description="Diffusion transformers whose samples exit early.")
    top.add_argument("--version", action="version", version=f"adadiff {__version__}")
    known = top.add_subparsers(required=True, metavar="COMMAND")

    one = _command(known, "sample", sample.sample, "draw samples: pictures, or arrays by the thousand")
    _add_model(one)
    one.add_argument("--out", type=Path, required=True, help="folder for the samples, made if it is missing")
    _add_sampling(one, n=16)
    one.add_argument("--class-labels", type=whole_numbers, help="classes, cycled over the samples (default: none)")
    one.add_argument("--prompt", nargs="+", metavar="TEXT", help="for text models; cycled over the samples")
    one.add_argument("--text-encoder", type=Path, metavar="FOLDER", help=f"of prompts, CLIP (default: {CLIP})")
    one.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="LOW,HIGH",
        help="network's times at which there is guidance; at others no unconditional lane is run (default: all)",
    )
    one.add_argument("--tied", action="store_true", help="both lanes of a guided sample exit together")
    one.add_argument("--shallow-model", metavar="MODEL", help="a shallower model, for the noisy timesteps (DuoDiff)")
    one.add_argument(
        "--t-switch",
        type=float,
        metavar="T",
        help=f"the shallow model's are T and above, in the network's time 0..999 (default: {T_SWITCH:g})",
    )
    one.add_argument(
        "--format",
        choices=("png", "npz"),
        help="png: a picture per sample, by one process; npz: shards of arrays, manifest.json, any number of "
        f"processes; both: grid.png, report.json (default: png up to {sample.PNG_MOST} samples, else npz; npz for "
        "latents)",
    )
    one.add_argument("--decoder", type=Path, help="folder of the AutoencoderKL that makes pictures of latents")
    one.add_argument("--shard", type=int, help=f"samples in a shard of npz (default: {sample.SHARD})")

    _add_train(known)
    _add_calibrate(known)

    _add_evaluate(known)

    one = _command(known, "convert", models.convert, "read a checkpoint of U-ViT, DiT, AdaDiff, DuoDiff or diffusers")
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
    one.add_argument("--dtype", choices=tuple(DTYPES), help="to store weights in (default: as they are)")

    one = _command(known, "inspect", models.inspect, "what a model is, what it costs, how it was trained")
    _add_model(one, "; of files that adadiff convert reads, what can be told")
    one.add_argument("--json", action="store_true", help="print JSON")

    _add_diff(known)
    _command(known, "info", info.info, "versions, devices, and which kernels serve them")
    return top


def _add_train(known: Any) -> None:
    one = _command(known, "train", train.train, "train a model; options override the configuration")
    one.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help=f"a TOML or JSON file with values of the options below, or one that ships: {', '.join(shipped())}",
    )
    one.add_argument(
        "--out", type=Path, help="folder for checkpoints; the run that it holds goes on (default: runs/NAME of CONFIG)"
    )
    one.add_argument(
        "--plain",
        dest="exits",
        action="store_false",
        default=argparse.SUPPRESS,
        help="the same as --no-exits",
    )
    for field in dataclasses.fields(TrainConfig):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.type is dict:
            kind = {"nargs": "+", "type": setting, "action": Settings, "metavar": "KEY=VALUE"}
        elif field.name in CHOICES:
            kind = {"choices": CHOICES[field.name]}
        default = "none" if field.type is dict else field.default
        one.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=f"{TRAIN_HELP[field.name]} (default: {default if default != '' else 'none'})",
            **kind,
        )


def _add_calibrate(known: Any) -> None:
    one = _command(
        known, "calibrate", calibrate.calibrate, "choose when to exit, for shares of the full network's work"
    )
    _add_model(one)
    one.add_argument("--out", type=Path, required=True, help="file for the model with its calibration")
    one.add_argument(
        "--budget", type=shares, required=True, help="share of the multiply-adds, in (0, 1]; several as in 0.4,0.55"
    )
    one.add_argument(
        "--aim",
        choices=AIMS,
        default=AIMS[0],
        help="faithful: the full network's images; distribution: images as good, perhaps others (default: faithful)",
    )
    one.add_argument(
        "--refit",
        action="store_true",
        help="fit the UEMs anew, in closed form, to what exiting costs the samples of one timestep",
    )
    _add_sampling(one, n=256, policy=False, seed=CALIBRATION_SEED)
    _add_features(one, "what errors are seen in")
    one.add_argument("--picture", type=Path, metavar="FILE.png", help="draw uncertainties against true errors")
    one.add_argument(
        "--data", help="show errors to the true noise in it, too, on held-out images of this training data"
    )


def _add_diff(known: Any) -> None:
    one = _command(known, "diff", diff.diff, "draw one sample in two ways, and show where they part")
    _add_model(one)
    one.add_argument(
        "--other",
        nargs="+",
        type=setting,
        action=Settings,
        required=True,
        metavar="KEY=VALUE",
        help=f"what the second way does otherwise: {', '.join(diff.KEYS)}",
    )
    one.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    one.add_argument("--class-label", type=int, help="class of the sample (default: none)")
    one.add_argument("--steps", type=int, default=20, help="solver steps, of both (default: 20)")
    one.add_argument("--solver", default="ddim", help=SOLVER_HELP)
    one.add_argument("--policy", default=DEFAULT, help=f"see `adadiff sample --help` (default: {DEFAULT})")
    one.add_argument("--guidance-scale", type=float, default=1.0, help=GUIDANCE_HELP)
    one.add_argument("--picture", type=Path, metavar="FILE.png", help="draw what both see coming at every step")
    _add_execution(one)
    _add_device(one)


def _add_features(one: argparse.ArgumentParser, what: str) -> None:
    one.add_argument(
        "--features",
        help=f"{what}: digits, canvases, inception:FILE (weights of pytorch-fid) or the file of a TorchScript module, "
        "images float32 [N, C, H, W] in [-1, 1] to [N, F] (default: the model's own, of digits and canvases)",
    )


def _add_evaluate(known: Any) -> None:
    one = _command(
        known, "evaluate", evaluate.evaluate, "quality of a model's samples, early exit or not, or of images"
    )
    one.add_argument(
        "model",
        metavar="MODEL|IMAGES",
        help="a name that ships with the package, a file, or images that are drawn already: a folder of pictures or "
        "shards, or a .npz file with arr_0",
    )
    one.add_argument(
        "--reference",
        type=Path,
        help="real images, as above, or a .npz file with mu and sigma, as of U-ViT, pytorch-fid or guided-diffusion "
        "(default: the held-out digits or canvases)",
    )
    _add_features(one, "what distances are between")
    one.add_argument(
        "--class-labels", type=whole_numbers, help="classes, cycled over the samples (default: all in turn)"
    )
    _add_sampling(one, n=1000, many_policies=True)
    one.add_argument("--decoder", type=Path, help="folder of the AutoencoderKL that makes pictures of latents")
    one.add_argument("--resamples", type=int, default=200, help="draws for an interval (default: 200)")
    one.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    of_models = ("n", "steps", "solver", "policy", "seed", "batch", "guidance_scale", "decoder")
    of_models += ("device", "dtype", "batch_invariant", "runner")
    one.set_defaults(sampling={name: one.get_default(name) for name in of_models})


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


def _add_model(one: argparse.ArgumentParser, more: str = "") -> None:
    one.add_argument("model", metavar="MODEL", help=f'a name that ships with the package ("digits") or a file{more}')


def _add_sampling(
    one: argparse.ArgumentParser, n: int, policy: bool = True, seed: int = 0, many_policies: bool = False
) -> None:
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
    if policy:
        one.add_argument(
            "--policy",
            action="append" if many_policies else "store",
            default=None if many_policies else DEFAULT,
            help="which blocks a sample runs: full, exit:U (until its uncertainty is below U), exit:patience=U, "
            f"exit:depth=K, or exit:budget=SHARE of a calibrated model (default: {DEFAULT})"
            + ("; may be given several times" if many_policies else ""),
        )
        _add_execution(one)
    one.add_argument("--guidance-scale", type=float, default=1.0, help=GUIDANCE_HELP)
    one.add_argument("--seed", type=int, default=seed, help=f"sample i has seed SEED + i (default: {seed})")
    one.add_argument("--batch", type=int, default=64, help="samples at a time (default: 64)")
    _add_device(one)


def _add_execution(one: argparse.ArgumentParser) -> None:
    one.add_argument("--batch-invariant", action="store_true", help="the same bits whatever BATCH and SHARD; slower")
    one.add_argument(
        "--runner",
        choices=get_args(Runner),
        default="eager",
        help="of blocks: compiled goes through torch.compile, which takes a while first (default: eager)",
    )


def _add_device(one: argparse.ArgumentParser) -> None:
    one.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU, if there is one)")
    one.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: as they are stored)")
