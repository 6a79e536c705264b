"""Helpers that several commands share."""

import argparse
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, checkpoint
from ..calibration.kept_runs import KeptRuns
from ..forward.options import ExecutionOptions
from ..model import Model
from ..output.asked import check_policy as check_policy
from ..output.asked import cycled as cycled
from ..output.asked import device_of as device_of
from ..output.asked import digest as digest
from ..output.asked import resolved as resolved
from ..output.pictures import CHANNELS
from ..pipelines import latents
from ..policies.joining import quoted
from ..policies.step_selector import AUTO
from .terminal import printable, say

MOST_BATCH, MOST_SHARD, MOST_RESAMPLES = 2**16, 10**5, 10**4


def load_model(options: argparse.Namespace, name_or_file: str | None = None) -> Model:
    """The command's model, or `name_or_file`, on --device and in --dtype."""
    return checkpoint.load(name_or_file or options.model, device_of(options), options.dtype)


def check_limits(options: argparse.Namespace, n: int) -> None:
    """ValueError for counts above their limits (`n`: limit of samples), before memory is allocated for them."""
    for name, most in {"n": n, "batch": MOST_BATCH, "shard": MOST_SHARD, "resamples": MOST_RESAMPLES}.items():
        value = getattr(options, name, None)
        if value is not None and value > most:
            raise ValueError(f"{name} must be at most {most:,}, got {value:,}")


def file_of(features: str | None) -> str | None:
    """The file that --features names, if it names one."""
    return None if features is None else features.removeprefix("inception:")


def kept_runs(options: argparse.Namespace, texts: Mapping[str, Tensor], **settings: object) -> KeptRuns:
    """Keeps the runs of a calibration in a folder beside --out, until that is written. texts: of `texts_of`."""
    identity = {
        "adadiff": __version__,
        "torch": torch.__version__,
        "model_sha256": digest(options.model),
        "device": str(device_of(options)),
        "dtype": options.dtype,
        "prompts": checkpoint.checksum(texts),
    }
    return KeptRuns(options.out.with_name(f"{options.out.name}.runs"), {**identity, **settings}, options.force)


@contextmanager
def going_on(kept: KeptRuns) -> Iterator[None]:
    """Says first how many runs are kept already; adds to Ctrl-C and OSError where they are."""
    if kept.count:
        say(f"{kept.folder} holds {kept.count} runs; going on")
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        where = f"{kept.folder} keeps {kept.count} runs; the same command goes on from there"
        raise (with_progress(error, where) if kept.count else error) from None


def with_progress(error: BaseException, progress: str) -> BaseException:
    """The exception to raise for `error`: Ctrl-C and OSError (a full disk) get `progress` added, others stay as they
    are."""
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(progress)
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return OSError(f"{error}; {progress}")
    return error


def execution_of(options: argparse.Namespace) -> ExecutionOptions:
    return ExecutionOptions(batch_invariant=options.batch_invariant, runner=options.runner)


def labels_to_try(classes: int | None) -> str:
    """The option of `adadiff sample` for a few classes; empty for a model without classes."""
    return f"--class-labels {','.join(map(str, range(min(classes, 4))))} " if classes else ""


def drawn_as(steps: int, solver: str, guidance_scale: float, classes: int | None) -> str:
    """The options of `adadiff sample` with which a calibration holds, as a shell reads them."""
    guided = f" --guidance-scale {guidance_scale:g}" if guidance_scale != 1 else ""
    return f"{labels_to_try(classes)}--steps {steps} --solver {printable(shlex.quote(solver))}{guided}"


def policy_of(kind: str, file: Path, more: str = "") -> str:
    """The value of --policy that reads `file`, as a shell reads it. more: further settings, from the comma on."""
    return shlex.quote(f"{kind}:{quoted(str(file))}{more}")


def steps_of(options: argparse.Namespace, n: int, slots: Sequence[int]) -> list[int] | str:
    """Numbers of steps of the samples in `slots`, out of n samples, or "auto"."""
    return AUTO if options.steps == [AUTO] else cycled("steps", options.steps, n, slots)


def decoder(options: argparse.Namespace, model: Model) -> Callable[[Tensor], Tensor] | None:
    """Function from latents [n, C, H, W] to images, or None without --decoder. ValueError for a model that draws no
    latents, or whose configuration lacks their scale."""
    if options.decoder is None:
        return None
    shape, scale, shift = model.backbone.sample_shape, model.config.latent_scale, model.config.latent_shift
    if scale is None:
        if shape[0] in CHANNELS:
            raise ValueError("this model makes images, not latents; leave --decoder out")
        raise ValueError("the model's configuration has no latent_scale; convert it again with a --preset that has one")
    autoencoder = latents.load_autoencoder(options.decoder)
    latents.decode(torch.zeros(0, *shape, dtype=torch.float32, device="cpu"), autoencoder, scale, shift)  # checks shape
    return lambda samples: latents.decode(samples, autoencoder, scale, shift)
