"""What several commands need."""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..forward.narrow import width_choice
from ..forward.options import ExecutionOptions
from ..model import Model
from ..output.pictures import CHANNELS
from ..pipelines import latents
from ..policies.exits import Depth
from ..policies.parts import Parts
from ..policies.spelling import parts_from
from ..policies.step_selector import AUTO

MOST_BATCH, MOST_SHARD, MOST_RESAMPLES = 2**16, 10**5, 10**4


def load_model(options: argparse.Namespace, name_or_file: str | None = None) -> Model:
    """The model of a command, or another one, as --device and --dtype ask for it."""
    return checkpoint.load(name_or_file or options.model, device_of(options), options.dtype)


def device_of(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_limits(options: argparse.Namespace, n: int) -> None:
    """ValueError for counts beyond their limits, `n` for samples: before anything of their size is made."""
    for name, most in {"n": n, "batch": MOST_BATCH, "shard": MOST_SHARD, "resamples": MOST_RESAMPLES}.items():
        value = getattr(options, name, None)
        if value is not None and value > most:
            raise ValueError(f"{name} must be at most {most:,}, got {value:,}")


def check_policy(model: Model, policy: str) -> Parts:
    """What it spells. ValueError for text that is no policy, for a depth that the network does not have: it would leave
    nothing out; and for widths that it was not trained at."""
    parts = parts_from(policy, model.calibration)
    if parts.width is not None:
        width_choice(model, parts.width)
    found = parts.exit
    if isinstance(found, Depth) and found.threshold > model.num_layers:
        raise ValueError(f"policy {policy!r}: this network has {model.num_layers} blocks; give a smaller depth")
    return parts


def file_of(features: str | None) -> str | None:
    """The file that --features names, if it names one."""
    return None if features is None else features.removeprefix("inception:")


def with_progress(error: BaseException, progress: str) -> BaseException:
    """What to raise for Ctrl-C, or for a disk that is full: it says what is done. Any other error as it is."""
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(progress)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return OSError(f"{error}; {progress}")
    return error


def execution_of(options: argparse.Namespace) -> ExecutionOptions:
    return ExecutionOptions(batch_invariant=options.batch_invariant, runner=options.runner)


def resolved(options: argparse.Namespace) -> dict[str, Any]:
    """What samples are drawn from, and how."""
    return {
        "model": options.model,
        "model_sha256": digest(options.model),
        "n": options.n,
        "steps": options.steps,
        "solver": options.solver,
        "policy": options.policy,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "batch": options.batch,
        "device": device_of(options),
        "dtype": options.dtype,
        "batch_invariant": options.batch_invariant,
        "runner": options.runner,
    }


def digest(name_or_file: str) -> str:
    """Of a checkpoint."""
    with checkpoint.find(name_or_file).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cycled(name: str, values: list[int], n: int, slots: Sequence[int]) -> list[int]:
    if n and len(values) > n:
        raise ValueError(f"{len(values)} {name} for {n} samples; give at most one each")
    return [values[slot % len(values)] for slot in slots]


def steps_of(options: argparse.Namespace, n: int, slots: Sequence[int]) -> list[int] | str:
    """Those of the samples in `slots` of n, or "auto"."""
    return AUTO if options.steps == [AUTO] else cycled("steps", options.steps, n, slots)


def decoder(options: argparse.Namespace, model: Model) -> Callable[[Tensor], Tensor] | None:
    """What makes images of samples, where --decoder asks for it."""
    if options.decoder is None:
        return None
    shape, scale, shift = model.backbone.sample_shape, model.config.latent_scale, model.config.latent_shift
    if scale is None:
        if shape[0] in CHANNELS:
            raise ValueError("this model makes images, not latents; leave --decoder out")
        raise ValueError("the model's configuration has no latent_scale; convert it with --preset and one that has")
    autoencoder = latents.load_autoencoder(options.decoder)
    latents.decode(torch.zeros(0, *shape, dtype=torch.float32, device="cpu"), autoencoder, scale, shift)  # its checks
    return lambda samples: latents.decode(samples, autoencoder, scale, shift)
