"""Files and folders of others' weights, and the only place where a pickle is opened.

U-ViT (baofff/U-ViT): a released state dict, a folder `<step>.ckpt` of its training, or the folder of all these.
AdaDiff (Tangshengku/AdaDiff): the same, with UEMs. DuoDiff (razvanmatisan/duodiff): files of its training.
DiT (facebookresearch/DiT): a released state dict, or a file of its training, of which the average ("ema") is taken.
diffusers: the folder of a `DiTTransformer2DModel`, or that of its pipeline.
"""

import argparse
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WRAPPERS = ("ema", "model_state_dict")  # of training files: DiT's average, DuoDiff's weights
WEIGHTS = "diffusion_pytorch_model"  # of diffusers, without its ending


@dataclass(frozen=True)
class Source:
    """What was found: the file that holds the weights, its tensors, the part of it that they are (None: all); for
    diffusers the configurations of network, scheduler and autoencoder."""

    file: Path
    tensors: Mapping[str, Tensor]
    part: str | None = None
    network: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    autoencoder: Mapping[str, Any] | None = None


def read(source: Path) -> Source:
    """Raises ValueError where there are no weights that can be read without running anything."""
    if source.is_dir():
        found = _read_folder(source)
    elif source.is_file():
        found = _read_file(source)
    else:
        raise ValueError(f"no such file or folder: {source}")
    for key, value in found.tensors.items():
        if not value.is_floating_point():
            raise ValueError(f"{key} in {found.file} is {value.dtype}; weights are floating point")
    return found


def _read_folder(folder: Path) -> Source:
    if (folder / "model_index.json").is_file():
        found = _read_folder(folder / "transformer")
        beside = {
            "scheduler": folder / "scheduler" / "scheduler_config.json",
            "autoencoder": folder / "vae" / "config.json",
        }
        return replace(found, **{name: read_json(file) for name, file in beside.items() if file.is_file()})
    if (folder / "config.json").is_file():
        network = read_json(folder / "config.json")
        kind = network.get("_class_name")
        if kind == "AdaDiffTransformer":
            raise ValueError(f"{folder} is of a pipeline of ours already; AdaDiffPipeline.from_pretrained opens it")
        if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):  # its name of old
            raise ValueError(f"{folder} holds a {kind} of diffusers; DiTTransformer2DModel is read")
        return replace(_read_parts(folder), network=network)
    if (folder / "nnet_ema.pth").is_file():
        return _read_file(folder / "nnet_ema.pth")
    steps = {int(path.stem): path for path in folder.glob("*.ckpt") if path.stem.isdecimal()}
    if steps:  # as U-ViT itself goes on training
        return _read_folder(steps[max(steps)])
    raise ValueError(
        f"{folder} holds no nnet_ema.pth or <step>.ckpt (U-ViT's training), config.json or model_index.json (diffusers)"
    )


def _read_parts(folder: Path) -> Source:
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        parts = [_read_file(folder / name) for name in sorted(set(read_json(index)["weight_map"].values()))]
        return Source(index, {key: value for part in parts for key, value in part.tensors.items()})
    for file in (folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"):
        if file.is_file():
            return _read_file(file)
    raise ValueError(f"{folder} holds no {WEIGHTS}.safetensors or .bin")


def _read_file(file: Path) -> Source:
    if file.suffix == ".safetensors" or _begins_as_safetensors(file):
        try:
            with safe_open(file, framework="pt") as opened:
                if "format_version" in (opened.metadata() or {}):
                    raise ValueError(f"{file} is a checkpoint of ours already")
                return Source(file, {key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file (truncated, or damaged): {error}") from error
    values = _unpickle(file)
    for part in WRAPPERS:
        if isinstance(values, Mapping) and isinstance(values.get(part), Mapping):
            return Source(file, dict(_tensors(values[part], file)), part)
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} holds a {type(values).__name__}, not a state dict")
    return Source(file, dict(_tensors(values, file)))


def _begins_as_safetensors(file: Path) -> bool:
    """Whatever its name says: eight bytes of a length, then JSON, which no pickle or archive begins with."""
    with file.open("rb") as opened:
        return opened.read(9)[8:] == b"{"


def _tensors(values: Mapping[str, object], file: Path) -> Iterator[tuple[str, Tensor]]:
    for key, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} in {file} is a {type(value).__name__}; a state dict holds tensors only")
        yield key, value


def _unpickle(file: Path) -> object:
    """Tensors, plain values and the arguments of a command line; nothing else is built and nothing run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler say
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds a {refused[1]}, and only tensors are read" if refused else "truncated, or another format"
        raise ValueError(f"{file} is not a readable PyTorch file: {why}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError for what is not a JSON object."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return values
