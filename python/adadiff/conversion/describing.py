"""Description of a checkpoint: one of ours, or another project's that `convert` reads."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint
from ..model import Model
from .convert import recognise


def describe(name_or_file: str | Path) -> dict[str, Any]:
    """Family and settings, parameters, multiply-adds, exits, thresholds and training notes, as values for JSON.

    name_or_file: name of a model in the package, a file that `save` wrote, or a source that `convert` reads. For the
    latter, the description is limited to what shapes and configuration files give; `presets` lists the presets that
    fit, and the first one is described. Raises ValueError for anything else.
    """
    path = Path(name_or_file)
    if path.is_dir() or (path.is_file() and not _is_ours(path)):
        return _foreign(path)
    model, path = checkpoint.load(name_or_file), checkpoint.find(name_or_file)
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        **network(model),
        "calibration": None if model.calibration is None else model.calibration.to_dict(),
        "step_selector": None if model.step_selector is None else model.step_selector.config.to_dict(),
        "steps_of_classes": None if model.step_selector is None else model.step_selector.steps_of_classes,
        "notes": checkpoint.read_tensors(path)[1].get("notes", {}),
    }


def network(model: Model) -> dict[str, Any]:
    """The part of a description that does not depend on the weights' values; they may be on the meta device."""
    backbone, exits = model.backbone, model.exits
    stem, head = backbone.stem_and_head_macs()
    blocks = [(block.skip_from is not None, block.macs(backbone.tokens)) for block in backbone.blocks]
    macs = {
        "full forward pass": stem + sum(cost for _, cost in blocks) + head,
        "stem": stem,
        **{"block with skip" if skip else "block": cost for skip, cost in blocks},
        "head": head,
    }
    if exits is not None:
        macs["score after a block"] = exits.macs(backbone.tokens - exits.num_prefix_tokens)
    return {
        **model.config.to_dict(),
        "prediction_type": model.config.prediction_type,
        "classes": model.config.classes,
        "num_layers": model.num_layers,
        "tokens": backbone.tokens,
        "parameters": {"network": _parameters(backbone), "exits": _parameters(exits)},
        "macs": macs,
    }


def _foreign(path: Path) -> dict[str, Any]:
    found, layout, configs = recognise(path)
    content = {
        "file": str(found.file),
        "file_bytes": found.file.stat().st_size,
        "part": found.part,
        "layout": layout,
        "presets": [name for name in configs if name],
        "tensors": len(found.tensors),
    }
    if not configs:
        return {**content, "parameters": sum(value.numel() for value in found.tensors.values())}
    with torch.device("meta"):
        model = Model(next(iter(configs.values())))
    if found.network is not None and found.scheduler is None and not content["presets"]:
        return {**content, **network(model), "schedule": None}
    # presets with the same shapes may have different schedules
    schedules = {config.schedule: name for name, config in configs.items()}
    several = ", ".join(f"{schedule} ({name})" for schedule, name in schedules.items())
    return {**content, **network(model), "schedule": several if len(schedules) > 1 else model.config.schedule}


def _is_ours(path: Path) -> bool:
    """Whether `save` wrote the file; a damaged .safetensors file counts as ours."""
    try:
        with checkpoint.opened(path) as file:
            return "format_version" in (file.metadata() or {})
    except ValueError:
        return path.suffix == ".safetensors"


def _parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
