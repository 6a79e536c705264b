"""What several commands need."""

import argparse
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..forward.options import ExecutionOptions
from ..model import Model
from ..output.pictures import CHANNELS
from ..pipelines import latents


def load_model(options: argparse.Namespace, name_or_file: str | None = None) -> Model:
    """The model of a command, or another one, as --device and --dtype ask for it."""
    return checkpoint.load(name_or_file or options.model, device_of(options), options.dtype)


def device_of(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_writable(path: Path) -> None:
    """ValueError for a file that could not be written at the end."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}")


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


def show(values: dict[str, Any], prefix: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            show(value, f"{prefix}{name}.")
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value)) + (", cycled over the samples" if len(value) > 1 else "")
        print(f"{prefix + name:25} {'none' if value in (None, {}) else value}")


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Rows with the same keys, which are the head; columns without content are left out."""
    head = [key for key in rows[0] if any(row[key] for row in rows)]
    lines = [head, *([row[key] for key in head] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        print("  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip())
    print()


def decoder(options: argparse.Namespace, model: Model) -> Callable[[Tensor], Tensor] | None:
    """What makes images of samples, where --decoder asks for it."""
    if options.decoder is None:
        return None
    shape, scale = model.backbone.sample_shape, model.config.latent_scale
    if scale is None:
        if shape[0] in CHANNELS:
            raise ValueError("this model makes images, not latents; leave --decoder out")
        raise ValueError("the model's configuration has no latent_scale; convert it with --preset and one that has")
    autoencoder = latents.load_autoencoder(options.decoder)
    latents.decode(torch.zeros(0, *shape), autoencoder, scale)  # for its checks
    return lambda samples: latents.decode(samples, autoencoder, scale)
