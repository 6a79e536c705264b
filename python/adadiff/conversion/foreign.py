"""Reads other projects' weights. This is the only module that opens pickles of model weights.

U-ViT (baofff/U-ViT): a released state dict, a folder `<step>.ckpt` of its training, or the folder of all these.
AdaDiff (Tangshengku/AdaDiff): the same, with UEMs. DuoDiff (razvanmatisan/duodiff): its training checkpoints.
DiT (facebookresearch/DiT): a released state dict, or a training checkpoint, of which the average ("ema") is taken.
diffusers: the folder of a network of KINDS, or that of its pipeline.
"""

import argparse
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shortly
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import opened, read_all
from ..reading import read_json
from ..weights import check_dtype, plain_names

AVERAGES = ("ema", "model_ema", "ema_state_dict")
WRAPPERS = (*AVERAGES, "model_state_dict", "state_dict", "model")  # keys of training checkpoints; the first is read
PREFIXES = ("module.", "model.", "net.")  # of every name, added by DataParallel, averaged models and Lightning
SETTINGS = ("args", "config", "cfg", "hyper_parameters", "hparams", "model_args", "model_config")  # beside the weights
NESTED = 4  # most levels of wrappers
KINDS = (  # of diffusers; the second is the old name of the first
    *("DiTTransformer2DModel", "Transformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"),
)
WEIGHTS = "diffusion_pytorch_model"  # file name of diffusers, without extension
COMPRESSED = "it is compressed, which torch.save does not do"


@dataclass(frozen=True)
class Source:
    """Weights that were read. file: holds the weights. part: key path of the tensors in it; None: the whole file.
    settings: stored beside the weights. network, scheduler, autoencoder: configurations of a diffusers folder."""

    file: Path
    tensors: Mapping[str, Tensor]
    part: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    autoencoder: Mapping[str, Any] | None = None


def read(source: Path) -> Source:
    """Reads a file or folder. Raises ValueError if it holds no weights that can be read without running code."""
    with torch.device("cpu"):
        if source.is_dir():
            found = _read_folder(source)
        elif source.is_file():
            found = _read_file(source)
        else:
            raise ValueError(f"no such file or folder: {source}")
    tensors = _unprefixed(found.tensors, str(found.file))
    for key, value in tensors.items():
        check_dtype(key, value, str(found.file))
    return replace(found, tensors=tensors)


def _read_folder(folder: Path) -> Source:
    if (folder / "model_index.json").is_file():
        found = _read_transformer(folder / "transformer")
        beside = {
            "scheduler": folder / "scheduler" / "scheduler_config.json",
            "autoencoder": folder / "vae" / "config.json",
        }
        return replace(found, **{name: read_object(file) for name, file in beside.items() if file.is_file()})
    if (folder / "config.json").is_file():
        return _read_transformer(folder)
    steps = {int(path.stem): path for path in folder.glob("*.ckpt") if path.stem.isdecimal()}
    inner = steps[max(steps)] if steps else folder  # the latest, from which U-ViT resumes training
    if (inner / "nnet_ema.pth").is_file():
        return _read_file(inner / "nnet_ema.pth")
    raise ValueError(
        f"{inner} holds no nnet_ema.pth or <step>.ckpt (U-ViT's training), config.json or model_index.json (diffusers)"
    )


def _read_transformer(folder: Path) -> Source:
    network = read_object(folder / "config.json")
    kind = network.get("_class_name")
    if kind == "AdaDiffTransformer":
        raise ValueError(f"{folder} is of a pipeline of ours already; AdaDiffPipeline.from_pretrained opens it")
    if kind not in KINDS:
        raise ValueError(f"{folder} holds a {kind} of diffusers; read are {', '.join(KINDS)}")
    return replace(_read_parts(folder), network=network)


def _read_parts(folder: Path) -> Source:
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        tensors: dict[str, Tensor] = {}
        for name in _part_names(index):
            part = _read_file(folder / name).tensors
            if twice := sorted(tensors.keys() & part.keys()):
                raise ValueError(f"{twice[0]} is in two of the files that {index} names")
            tensors |= part
        return Source(index, tensors)
    for file in (folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"):
        if file.is_file():
            return _read_file(file)
    raise ValueError(f"{folder} holds no {WEIGHTS}.safetensors or .bin")


def _part_names(index: Path) -> list[str]:
    """Names of the weight files that an index lists. ValueError for one that is not in the same folder."""
    names = read_object(index).get("weight_map")
    beside = {path.name for path in index.parent.iterdir() if path.is_file()}
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no table weight_map of tensors and the files that hold them")
    for name in names.values():
        if not isinstance(name, str) or name not in beside:
            raise ValueError(f"{index} names {shortly(name)}, which is no file beside it")
    return sorted(set(names.values()))


def _read_file(file: Path) -> Source:
    if _begins_as_safetensors(file) or file.suffix == ".safetensors":
        with opened(file) as tensors:
            if "format_version" in (tensors.metadata() or {}):
                raise ValueError(f"{file} is a checkpoint of ours already")
            metadata = {key.rpartition(".")[2]: value for key, value in (tensors.metadata() or {}).items()}
            return Source(file, read_all(tensors), settings=_settings(metadata))
    values = _unpickle(file)
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} holds a {type(values).__name__}, not a state dict")
    settings: dict[str, Any] = {}
    parts: list[str] = []
    while True:
        for name in SETTINGS:
            settings |= _settings(values.get(name))
        name = next((name for name in WRAPPERS if isinstance(values.get(name), Mapping)), None)
        if name is None:
            break
        if len(parts) == NESTED:
            raise ValueError(f"{file} holds {'.'.join(parts)} and more; a state dict is expected")
        values, parts = values[name], [*parts, name]
    return Source(file, dict(_tensors(values, file)), ".".join(parts) or None, settings)


def _settings(values: object, nested: int = NESTED) -> dict[str, Any]:
    """Plain values in a mapping or an argparse.Namespace, nested ones included; outer values take precedence."""
    values = vars(values) if isinstance(values, argparse.Namespace) else values
    if not isinstance(values, Mapping) or not nested:
        return {}
    found: dict[str, Any] = {}
    for value in values.values():
        found |= _settings(value, nested - 1)
    return found | {key: value for key, value in values.items() if isinstance(value, str | int | float)}


def _unprefixed(tensors: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """The tensors without the prefixes that wrappers of a network add to their names."""
    made = plain_names(tensors, file)
    if all(key.startswith("module.") or key == "n_averaged" for key in made):  # AveragedModel's counter
        made.pop("n_averaged", None)
    while made and (prefix := next((one for one in PREFIXES if all(key.startswith(one) for key in made)), None)):
        made = {key.removeprefix(prefix): value for key, value in made.items()}
    return made


def _begins_as_safetensors(file: Path) -> bool:
    """Whether the content, whatever the file's name, is safetensors: an 8-byte length, then JSON. No pickle or archive
    begins so."""
    with file.open("rb") as stream:
        return stream.read(9)[8:] == b"{"


def _tensors(values: Mapping[str, object], file: Path) -> Iterator[tuple[str, Tensor]]:
    for key, value in values.items():
        if not isinstance(key, str):
            raise ValueError(f"{shortly(key)} in {file} is a {type(key).__name__}; names of tensors are text")
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} in {file} is a {type(value).__name__}; a state dict holds tensors only")
        yield key, value


def _unpickle(file: Path) -> object:
    """Reads tensors, plain values and argparse.Namespace only; ValueError for anything else."""
    try:
        archive = _is_archive(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # a damaged or foreign file can make the unpickler raise anything
        why = COMPRESSED if str(error) == COMPRESSED else "truncated, or another format"
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            why = f"it holds a {refused[1]}, and only tensors are read"
        raise ValueError(f"{file} is not a readable PyTorch file: {why}") from error


def _is_archive(file: Path) -> bool:
    """Whether the file is a ZIP archive, as torch.save writes since 1.6. Raises ValueError for a compressed one:
    torch.save never compresses, and a few bytes could unpack to gigabytes."""
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\3\4":
            return False
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > size for part in parts):
        raise ValueError(COMPRESSED)
    return True


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for anything else."""
    try:
        values = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"no such file: {file}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return values
