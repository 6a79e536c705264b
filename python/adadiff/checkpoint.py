"""Models on disk: one safetensors file, with the whole configuration in its header."""

import errno
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import resources
from pathlib import Path
from reprlib import repr as shortly
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor, nn

from .config import ModelConfig
from .model import Model, shapes
from .policies.calibrated import Calibration
from .policies.step_selector import SelectorConfig, StepSelector, new_scores
from .weights import apart, cast, check_weights, plain_names
from .writing import replace_file

M = TypeVar("M", bound=nn.Module)

FORMAT_VERSION = 2
MOST_TENSORS = 2**16  # tensors in a file; a network has some hundreds
HINT = "truncated, or not written by adadiff: adadiff convert reads other formats"
SELECTOR = "step_selector."  # prefix of the names of a step selector's tensors
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Writes the file atomically, see writing.py. Values of metadata are written as JSON. Raises OSError if it cannot
    be written, ValueError for tensors without values."""
    header = {key: json.dumps(value) for key, value in {"format_version": FORMAT_VERSION, **metadata}.items()}
    for key, value in tensors.items():
        if value.is_meta:
            raise ValueError(f"cannot write {path}: {key} has no values, it is on the device 'meta'")
    tensors = apart(tensors)

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; save_file makes files readable by the owner only
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:  # such as a full disk
            code = re.search(r"(?:os error |code: )(\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number) if code else str(error)) from error
        temporary.chmod(mode)

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, write)


@contextmanager
def opened(path: Path, hint: str = "truncated, or damaged") -> Iterator[Any]:
    """Opens a safetensors file, with tensors on the CPU. Raises ValueError, naming the file, if it does not exist or is
    damaged."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    path.open("rb").close()  # raises PermissionError, where safe_open would report a missing file
    try:
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            if (count := len(file.keys())) > MOST_TENSORS:
                raise ValueError(f"{path} holds {count:,} tensors; at most {MOST_TENSORS:,} are read")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({hint}): {error}") from error


def read_header(file: Any, path: Path) -> dict[str, Any]:
    """The metadata of an opened file, parsed from JSON. Raises ValueError if it is not JSON."""
    try:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({HINT}): {error}") from error


def read_all(file: Any) -> dict[str, Tensor]:
    """All tensors of an opened file."""
    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file. Raises ValueError for a file that is truncated, not safetensors, or of another
    format version."""
    with opened(path, HINT) as file:
        metadata = _current(read_header(file, path), path)
        return read_all(file), metadata


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and values."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
    return value


def _current(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    """metadata without its format version. Raises ValueError for another version."""
    version = metadata.pop("format_version", None)
    if version != FORMAT_VERSION:
        advice = ""
        if version is None:
            advice = "; adadiff convert reads other formats"
        elif version == 1 and "config" in metadata:  # a model
            advice = f"; adadiff convert {path} NEW.safetensors"
        raise ValueError(f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}{advice}")
    return metadata


class Keys:
    """A state dict whose tensors are taken one by one. Problems are collected, and reported together by `finish`."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)
        self.problems: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def take(self, key: str, shape: Sequence[int]) -> Tensor:
        """The tensor; if it is missing or has another shape, zeros of `shape` and a problem."""
        value = self._tensors.pop(key, None)
        if value is None:
            self.problems.append(f"missing {key}")
        elif value.shape != torch.Size(shape):
            self.problems.append(f"{key} is {tuple(value.shape)}, expected {tuple(shape)}")
        else:
            return value
        return torch.zeros((), device="cpu").expand(tuple(shape))

    def take_any(self, key: str) -> Tensor | None:
        """The tensor, of any shape; None and a problem if it is missing."""
        if key not in self._tensors:
            self.problems.append(f"missing {key}")
        return self._tensors.pop(key, None)

    def ignore(self, key: str) -> None:
        """Drops a key that may exist and is not used."""
        self._tensors.pop(key, None)

    def finish(self, source: str) -> None:
        """Raises ValueError for missing, mis-shaped and (not taken) unexpected keys; names the first eight problems."""
        problems = self.problems + [f"unexpected {key}" for key in self._tensors]
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"{source} does not fit this model: {'; '.join(problems[:8])}{more}")


def matched(shapes: Mapping[str, Size], tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of these names and shapes. Raises ValueError as `Keys.finish` does if `tensors` has any others."""
    keys = Keys(tensors)
    taken = {key: keys.take(key, shape) for key, shape in shapes.items()}
    keys.finish(source)
    return taken


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """load_state_dict that raises ValueError for missing, unexpected and mis-shaped keys, and then changes nothing.

    Keys are those of the uncompiled module.
    """
    state = module.state_dict()
    plain = plain_names(state, "the module")
    taken = matched({key: value.shape for key, value in plain.items()}, tensors, source)
    module.load_state_dict(dict(zip(state, taken.values(), strict=True)), assign=assign)


@torch.inference_mode(False)  # callers in any mode use the weights
def built(
    make: Callable[[], M],
    tensors: Mapping[str, Tensor],
    source: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> M:
    """The module of `make` with copies of these tensors as weights, on their device and in their dtype unless others
    are given. Skips initialisation: no random numbers are drawn, and default device and dtype have no effect. Raises
    ValueError for tensors that do not fit."""
    with torch.device("meta"):
        module = make()
    copies = {key: value.detach().to(device=device, dtype=dtype, copy=True) for key, value in tensors.items()}
    load_strictly(module, copies, source, assign=True)
    return module


def save(
    model: Model,
    path: str | Path,
    notes: Mapping[str, object] | None = None,
    stored: torch.dtype | str | None = None,
) -> None:
    """Writes weights, configuration, calibration and step selector, atomically. notes: stored in the header, such as
    how the model was trained. stored: float16 or bfloat16, for a file of half the size, whose weights are rounded but
    `load`ed in the model's dtype; None: in that dtype.

    model: it or its backbone may be compiled, and wrapped by DistributedDataParallel. Raises ValueError for a model
    that `load` would refuse, OSError if the file cannot be written.
    """
    stored = dtype_from(stored)
    model, what = unwrapped(model), "the model to save"
    tensors = matched(shapes(model.config), plain_names(model.state_dict(), what), what)
    check_weights(tensors, what)
    metadata = {"config": model.config.to_dict(), "notes": dict(notes or {})}
    if stored is not None:
        metadata["dtype"] = str(_common_dtype(tensors)).removeprefix("torch.")
    if model.calibration is not None:
        metadata["calibration"] = model.calibration.to_dict()
    if (selector := model.step_selector) is not None:
        metadata["step_selector"] = selector.config.to_dict()
        tensors |= {SELECTOR + key: value for key, value in selector.tensors().items()}
        check_weights(tensors, what)
    if stored is not None:
        tensors = cast(tensors, stored, what)
    write_tensors(Path(path), tensors, metadata)


def unwrapped(model: Any) -> Model:
    """The model without wrappers of torch.compile and DistributedDataParallel. Raises ValueError for other objects."""
    while not isinstance(model, Model):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if inner is None:
            raise ValueError(f"this takes an adadiff.Model, got {type(model).__name__}")
        model = inner
    return model


def load(name_or_file: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None) -> Model:
    """Opens a model with its exits, in eval mode: by the name of a shipped one ("digits"), or from a file of `save`.

    dtype: float32, bfloat16 or float16, or its name; None: as the model was saved.
    Raises ValueError if there is no such file, device or dtype, if the weights do not fit the configuration in the
    file, and for weights that are not finite floating-point numbers. Sizes are compared before allocating anything.
    """
    device, dtype = device_from(device), dtype_from(dtype)
    path = find(name_or_file)
    with opened(path, HINT) as file:
        metadata = _current(read_header(file, path), path)
        config, calibration = described(metadata, path)
        selector = _selector_config(metadata, config, path)
        stored = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
        matched({**shapes(config), **_selector_shapes(selector)}, plain_names(stored, str(path)), str(path))
        tensors = plain_names(read_all(file), str(path))
    check_weights(tensors, str(path))
    scores = {key.removeprefix(SELECTOR): tensors.pop(key) for key in _selector_shapes(selector)}
    tensors = cast(tensors, dtype or _saved_dtype(metadata, path) or _common_dtype(tensors), str(path))
    model = built(lambda: Model(config), tensors, str(path), device)
    model.calibration = calibration
    if selector is not None:
        model.step_selector = StepSelector(selector, built(lambda: new_scores(selector), scores, str(path)))
    return model.eval()


def described(metadata: Mapping[str, Any], path: Path) -> tuple[ModelConfig, Calibration | None]:
    """Configuration and calibration in a file's metadata. Raises ValueError, naming the file, for invalid values and
    without a configuration."""
    if "cascade" in metadata:
        raise ValueError(f"{path} holds a cascade, not a model; draw samples of one with the policy 'cascade:{path}'")
    if "config" not in metadata:
        raise ValueError(f"{path} holds tensors but no model configuration")
    try:
        config = ModelConfig.from_dict(metadata["config"])
        if not isinstance(metadata.get("notes", {}), dict):
            raise ValueError(f"notes must be a table of values, got {shortly(metadata['notes'])}")
        if "calibration" not in metadata:
            return config, None
        calibration = Calibration.from_dict(metadata["calibration"])
        if calibration.num_layers != config.network.blocks:
            raise ValueError(
                f"it is calibrated for {calibration.num_layers} blocks, its network has {config.network.blocks}"
            )
    except ValueError as error:
        raise ValueError(f"cannot use {path}: {error}") from None
    return config, calibration


def _selector_config(metadata: Mapping[str, Any], config: ModelConfig, path: Path) -> SelectorConfig | None:
    """The configuration of the step selector in a file's metadata, or None. Raises ValueError for an invalid one, and
    for one of another network."""
    if "step_selector" not in metadata:
        return None
    try:
        selector, network = SelectorConfig.from_dict(metadata["step_selector"]), config.network
        reads, takes = (selector.num_classes, selector.context_dim), (0, network.context_dim)
        if not network.context_tokens:
            takes = (config.classes, 0)
        if reads != takes:
            raise ValueError(f"its step selector reads (classes, channels of text) {reads}, its network {takes}")
    except ValueError as error:
        raise ValueError(f"cannot use {path}: {error}") from None
    return selector


def _selector_shapes(selector: SelectorConfig | None) -> dict[str, Size]:
    """The shapes of a step selector's tensors in a file, by name."""
    if selector is None:
        return {}
    with torch.device("meta"):
        return {SELECTOR + key: value.shape for key, value in new_scores(selector).state_dict().items()}


def _saved_dtype(metadata: Mapping[str, Any], path: Path) -> torch.dtype | None:
    """The dtype of a model whose weights are stored in another one. Like weights, it may be float64."""
    name = metadata.get("dtype")
    try:
        return torch.float64 if name == "float64" else dtype_from(name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The common dtype of all tensors, by promotion."""
    return reduce(torch.promote_types, {value.dtype for value in tensors.values()})


def device_from(name: torch.device | str) -> torch.device:
    """The device of this name. Raises ValueError for one that this machine or this PyTorch does not have."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"cannot use device {str(name)!r}: {str(error).splitlines()[0]}") from None


def dtype_from(name: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of this name, None for None. Raises ValueError for a dtype that models do not run in."""
    if name is None or name in DTYPES.values():
        return name
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def find(name_or_file: str | Path) -> Path:
    """The file of a shipped model's name or of a path. Raises ValueError if there is none."""
    folder = resources.files("adadiff").joinpath("checkpoints")
    shipped = {Path(file.name).stem: file for file in folder.iterdir() if file.name.endswith(".safetensors")}
    if str(name_or_file) in shipped:
        return Path(str(shipped[str(name_or_file)]))
    if not Path(name_or_file).is_file():
        raise ValueError(f"no model {str(name_or_file)!r}: neither a file nor one of {', '.join(sorted(shipped))}")
    return Path(name_or_file)
