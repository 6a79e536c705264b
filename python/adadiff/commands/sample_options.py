"""Options of the commands that draw samples: sample, evaluate, diff."""

from pathlib import Path

from ..forward.two_stage import T_SWITCH
from ..pipelines.text import CLIP
from ..policies.spelling import DEFAULT
from . import diff, evaluate, sample
from .options import (
    Commands,
    add_batch,
    add_command,
    add_count,
    add_decoder,
    add_device,
    add_execution,
    add_features,
    add_force,
    add_guidance,
    add_model,
    add_policy,
    add_seed,
    add_solver,
    add_steps,
)
from .texts import AUTO_HELP, POLICY_TABLE
from .values import Settings, interval, setting, steps, whole_numbers


def add_sample(commands: Commands) -> None:
    command = add_command(commands, "sample", sample.sample)
    add_model(command)

    samples = command.add_argument_group("what to draw")
    add_count(
        samples, 16, "number of samples; under torchrun write -n, because torchrun takes --n for one of its own options"
    )
    samples.add_argument(
        "--class-labels",
        type=whole_numbers,
        metavar="LABEL,...",
        help="class of each sample; with fewer labels than samples they repeat (default: no class)",
    )
    samples.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="prompts for a text-to-image model, which requires them; with fewer prompts than samples they repeat "
        "(default: none)",
    )
    samples.add_argument(
        "--text-encoder",
        type=Path,
        metavar="FOLDER",
        help=f"text encoder of CLIP for the prompts, a folder or a name on the Hugging Face hub (default: {CLIP})",
    )
    add_seed(samples)

    sampling = command.add_argument_group("how to draw it")
    add_steps(sampling)
    add_solver(sampling)
    add_guidance(sampling)
    sampling.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="LOW,HIGH",
        help="timesteps with guidance, between 0 (least noise) and 1000 (most noise); at the others only the "
        "conditional half of each sample is computed, which is faster; needs --guidance-scale (default: all "
        "timesteps)",
    )

    exits = command.add_argument_group("early exit", POLICY_TABLE)
    add_policy(exits)
    exits.add_argument(
        "--tied",
        action="store_true",
        help="with guidance, let the conditional and the unconditional half of a sample exit at the same block, by the "
        "larger of their uncertainties",
    )
    exits.add_argument(
        "--shallow-model",
        metavar="MODEL",
        help="shallower model that replaces MODEL at noisy timesteps, as in DuoDiff (default: none)",
    )
    exits.add_argument(
        "--t-switch",
        type=float,
        metavar="T",
        help="timestep, between 0 (least noise) and 1000 (most noise): the shallow model runs at T and above; needs "
        f"--shallow-model (default: {T_SWITCH:g})",
    )

    output = command.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder for the samples, created if it is missing (required)",
    )
    output.add_argument(
        "--format",
        choices=("png", "npz"),
        help="png: one picture for each sample, written by a single process; npz: arrays of many samples each, written "
        f"by any number of processes (default: png for up to {sample.PNG_MOST} images; npz for more, and for latents)",
    )
    output.add_argument("--shard", type=int, metavar="N", help=f"samples in each npz file (default: {sample.SHARD})")
    output.add_argument(
        "--parquet",
        type=Path,
        metavar="FOLDER",
        help="also write each npz file as a Parquet file with one row for each sample; needs pyarrow (default: none)",
    )
    add_decoder(output)
    add_force(output, "replace samples of other settings, and files with the names of samples, that FOLDER holds")

    machines = command.add_argument_group("many machines (extra `ray`)")
    machines.add_argument(
        "--ray",
        action="store_true",
        help="draw the samples with workers of a Ray cluster: the one that RAY_ADDRESS names, else one that runs on "
        "this machine, else a new one on this machine alone; samples are the same, bit for bit, as without --ray",
    )
    machines.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="workers, each with its own copy of the model and, for --device cuda, a GPU (default: as many as fit in "
        "the cluster)",
    )
    machines.add_argument(
        "--actor-cpus", type=int, metavar="N", help="number of CPUs and threads of each worker (default: 1)"
    )

    execution = command.add_argument_group("execution")
    add_batch(execution)
    add_device(execution)
    add_execution(execution)


def add_evaluate(commands: Commands) -> None:
    command = add_command(commands, "evaluate", evaluate.evaluate)
    command.add_argument(
        "model",
        metavar="MODEL|IMAGES",
        help="model to draw samples from: its name in the package or its file; or images: a folder of pictures, a "
        "folder that `adadiff sample` wrote, or a .npz file with an array arr_0",
    )

    metrics = command.add_argument_group("what to measure")
    metrics.add_argument(
        "--reference",
        type=Path,
        metavar="PATH",
        help="real images to compare with, in one of the forms of IMAGES, or a .npz file with the statistics mu and "
        "sigma of their features, as U-ViT, pytorch-fid and guided-diffusion publish them (default: held-out images "
        "of digits, canvases or letters)",
    )
    add_features(
        metrics,
        "features of images between which distances are measured, required for IMAGES",
        "digits, canvases or letters for models that draw these, else none",
    )
    metrics.add_argument(
        "--class-labels",
        type=whole_numbers,
        metavar="LABEL,...",
        help="class of each sample or image; with fewer labels than samples they repeat (default: for a model all "
        "classes in turn, for images the labels stored with them, if any)",
    )
    metrics.add_argument(
        "--resamples",
        type=int,
        default=200,
        metavar="N",
        help="bootstrap resamples for the intervals of distances, at least 2 (default: 200)",
    )
    metrics.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all numbers to this file (default: none)"
    )
    add_force(metrics)

    exits = command.add_argument_group("early exit (for a model)", POLICY_TABLE)
    exits.add_argument(
        "--policy",
        action="append",
        help="one of the policies above; repeat the option to compare several; the full network is always included "
        f"(default: {DEFAULT})",
    )

    sampling = command.add_argument_group("how to draw the samples (for a model)")
    add_count(sampling, 1000, "number of samples, at least 2; distances need thousands")
    add_seed(sampling)
    add_steps(sampling)
    add_solver(sampling)
    add_guidance(sampling)
    add_decoder(sampling)

    execution = command.add_argument_group("execution (for a model)")
    add_batch(execution)
    add_device(execution)
    add_execution(execution)
    of_models = ("n", "steps", "solver", "policy", "seed", "batch", "guidance_scale", "decoder")
    of_models += ("device", "dtype", "batch_invariant", "runner")
    command.set_defaults(sampling={name: command.get_default(name) for name in of_models})


def add_diff(commands: Commands) -> None:
    command = add_command(commands, "diff", diff.diff)
    add_model(command)

    comparison = command.add_argument_group("what to compare")
    comparison.add_argument(
        "--other",
        nargs="+",
        type=setting,
        action=Settings,
        required=True,
        metavar="KEY=VALUE",
        help=f"changes for the second way, as in policy=exit:0.1 seed=3; keys: {', '.join(diff.KEYS)} (required)",
    )
    comparison.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help=f"also save the images predicted at up to {diff.MOST} of the steps: those of the first way, those of the "
        "second, and their difference (default: no picture)",
    )
    add_force(comparison)

    sampling = command.add_argument_group("how to draw the sample")
    sampling.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the sample's noise, at least 0 (default: 0)"
    )
    sampling.add_argument("--class-label", type=int, metavar="LABEL", help="class of the sample (default: no class)")
    sampling.add_argument(
        "--steps",
        type=steps,
        default=[20],
        metavar="N|auto",
        help=f"evaluations of the network, 1 to 1000, the same for both ways; {AUTO_HELP} (default: 20)",
    )
    add_solver(sampling)
    add_guidance(sampling)

    add_policy(command.add_argument_group("early exit", POLICY_TABLE))
    execution = command.add_argument_group("execution")
    add_device(execution)
    add_execution(execution)
