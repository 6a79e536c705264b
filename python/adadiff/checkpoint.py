"""Models on disk: one safetensors file, weights with the whole configuration in its header."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelConfig
from .model import Model
from .policies.calibrated import Calibration

FORMAT_VERSION = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Writes to a temporary name and renames: a reader never sees half a file. Values of metadata become JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    header = {key: json.dumps(value) for key, value in {"format_version": FORMAT_VERSION, **metadata}.items()}
    temporary.touch()
    try:
        mode = temporary.stat().st_mode  # what the umask asks for; save_file writes for the owner alone
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary, metadata=header)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Raises ValueError for a file that is truncated, not safetensors, or of another format version."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = {key: json.loads(value) for key, value in header.items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file (truncated, or of others: adadiff convert reads those): {error}"
        ) from error
    version = metadata.pop("format_version", None)
    if version != FORMAT_VERSION:
        advice = {None: "; adadiff convert reads files of others"}
        if "config" in metadata:  # of a model
            advice[1] = f"; adadiff convert {path} NEW.safetensors"
        raise ValueError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}{advice.get(version, '')}"
        )
    return tensors, metadata


class Keys:
    """A state dict whose tensors are taken one by one. What is wrong is collected, and told at once by `finish`."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)
        self.problems: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def take(self, key: str, shape: Sequence[int]) -> Tensor:
        """The tensor, or, where there is no such one, zeros of that shape."""
        value = self._tensors.pop(key, None)
        if value is None:
            self.problems.append(f"missing {key}")
        elif value.shape != torch.Size(shape):
            self.problems.append(f"{key} is {tuple(value.shape)}, expected {tuple(shape)}")
        else:
            return value
        return torch.zeros(()).expand(*shape)

    def finish(self, source: str) -> None:
        """Raises ValueError that names every missing, mis-shaped and, of what was not taken, unexpected key."""
        problems = self.problems + [f"unexpected {key}" for key in self._tensors]
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"{source} does not fit this model: {'; '.join(problems[:8])}{more}")


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """load_state_dict that names every missing, unexpected or mis-shaped key, and changes nothing where it raises."""
    keys = Keys(tensors)
    taken = {key: keys.take(key, value.shape) for key, value in module.state_dict().items()}
    keys.finish(source)
    module.load_state_dict(taken)


def save(model: Model, path: str | Path, notes: Mapping[str, object] | None = None) -> None:
    """Writes weights, configuration and calibration. `notes` (how it was trained) is kept in the header."""
    metadata = {"config": model.config.to_dict(), "notes": dict(notes or {})}
    if model.calibration is not None:
        metadata["calibration"] = model.calibration.to_dict()
    write_tensors(Path(path), model.state_dict(), metadata)


def load(name_or_file: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None) -> Model:
    """Opens a model with its exits: a name that ships with the package ("digits"), or a file that `save` wrote.

    dtype: float32, bfloat16 or float16, or its name; None: as the weights are stored.
    Raises ValueError where there is no such file, device or dtype, or where the file does not fit the configuration it
    carries.
    """
    device, dtype = device_from(device), dtype_from(dtype)
    path = find(name_or_file)
    tensors, metadata = read_tensors(path)
    if "config" not in metadata:
        raise ValueError(f"{path} holds tensors but no model configuration")
    model = Model(ModelConfig.from_dict(metadata["config"]))
    load_strictly(model, tensors, str(path))
    if "calibration" in metadata:
        model.calibration = Calibration.from_dict(metadata["calibration"])
    return model.to(device, dtype or _stored(tensors)).eval()


def _stored(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The one dtype that holds them all."""
    return reduce(torch.promote_types, {value.dtype for value in tensors.values()})


def device_from(name: torch.device | str) -> torch.device:
    """ValueError for a device that this machine or this PyTorch does not have."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {str(name)!r}: {str(error).splitlines()[0]}") from None


def dtype_from(name: torch.dtype | str | None) -> torch.dtype | None:
    """ValueError for a dtype that models are not run in."""
    if name is None or name in DTYPES.values():
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def find(name_or_file: str | Path) -> Path:
    """The file behind a shipped name or a path."""
    folder = resources.files("adadiff").joinpath("checkpoints")
    shipped = {Path(file.name).stem: file for file in folder.iterdir() if file.name.endswith(".safetensors")}
    if str(name_or_file) in shipped:
        return Path(str(shipped[str(name_or_file)]))
    if not Path(name_or_file).is_file():
        raise ValueError(f"no model {str(name_or_file)!r}: neither a file nor one of {', '.join(sorted(shipped))}")
    return Path(name_or_file)
