"""Checkpoints of others become ours. What their shapes do not tell is taken from a preset, which must fit them.

Which files there are says foreign.py; whose names mean what, layouts.py.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from typing import cast as typed

import torch
from torch import Size, Tensor

from ..checkpoint import Keys, built, described, dtype_from, matched, write_tensors
from ..config import PRESETS, ModelConfig
from ..model import Model, shapes
from ..models.dit import EPS, DiT, DiTConfig, position_embedding
from ..models.patches import PatchConfig
from ..models.pixart import PixArtConfig
from ..uem import DUODIFF, OFFICIAL, ExitConfig
from ..weights import cast, check_weights, total_bytes
from . import served_mmdit, served_pixart
from .earlier import is_earlier, upgraded
from .foreign import Source, read, read_object
from .layouts import BACKBONE, FIRST_EXIT, LAYOUTS, NO_CAPTION, layout_of
from .served import LINEAR, served_network, served_scale, served_schedule
from .settings import assumed, contradictions, other_kind

EXITS: Mapping[str, ExitConfig] = {"official": OFFICIAL, "duodiff": DUODIFF}
SERVERS = ("diffusers", "dit")
SERVED = ("diffusers", "pixart-diffusers", "mmdit-diffusers")  # layouts of folders that say all of themselves
POSITION = f"{BACKBONE}pos_embed"
SPARE = 2**20  # weights that a configuration may have and a file lacks, before they are named one by one


@dataclass(frozen=True)
class Conversion:
    """What was read, and what was made of it."""

    source: Path
    part: str | None
    layout: str
    preset: str | None  # that tells what shapes do not; None: the source did
    served_by: str | None
    config: ModelConfig
    parameters: int
    dropped: str | None = None  # what has no place in our models and was left out, where that was asked for
    assumed: str | None = None  # what the source does not say of itself


@torch.inference_mode(False)  # whatever mode the caller is in
def convert(
    source: str | Path,
    dest: str | Path,
    preset: str | None = None,
    served_by: str | None = None,
    dtype: torch.dtype | str | None = None,
    drop_first_exit: bool = False,
) -> Conversion:
    """Reads `source` (foreign.py says what may be one, or a file of an earlier version of this package) and writes
    `dest`, which `adadiff.load` opens.

    preset: the name of one, or a JSON file with a configuration as in our own files' headers. It says what cannot be
    seen from shapes (heads, schedule, time) and must agree with all that can, and with the settings that a training
    file has beside its weights. It may be left out where the source says it, as diffusers' folders do, or where only
    one preset has these shapes.
    served_by: "diffusers" or "dit", needed for a diffusers folder: which sinusoid of time and epsilon the weights are
    to be run with. diffusers runs every DiT with its own, also those that facebookresearch trained with others.
    dtype: that weights are stored in: float32, bfloat16 or float16, or its name; None: as they are.
    drop_first_exit: DuoDiff's networks can exit before block 0, with a probe and a head for which our models have no
    place. Without this, they are refused.
    Raises ValueError for what cannot be read safely or does not fit, naming the keys, for weights that are not finite,
    and where `dest` exists.
    """
    source, dest, dtype = Path(source), Path(dest), dtype_from(dtype)
    if dest.exists():
        raise ValueError(f"{dest} exists; name a file that does not")
    if source.is_file() and is_earlier(source):
        if drop_first_exit:
            raise ValueError(f"{source} is of this package, not DuoDiff's; leave drop_first_exit out")
        return _upgrade(source, dest, preset, served_by, dtype)
    found = read(source)
    with torch.device("cpu"):
        return _convert(found, dest, preset, served_by, dtype, drop_first_exit)


def _convert(
    found: Source,
    dest: Path,
    preset: str | None,
    served_by: str | None,
    dtype: torch.dtype | None,
    drop_first_exit: bool,
) -> Conversion:
    layout = _layout(found)
    if layout in SERVED:
        if found.network is None:
            raise ValueError(f"{found.file} is diffusers' weights alone; give the folder that holds its config.json")
        config, preset = _served(found, preset, served_by)
    elif served_by is not None:
        raise ValueError(f"served_by is for folders of diffusers; {found.file} is not from there")
    else:
        config, preset = _configured(found, layout, preset)
        layout = "sit" if isinstance(config.network, DiTConfig) and config.network.sit_time else layout
    try:
        tensors = translate(layout, found.tensors, config, str(found.file))
    except ValueError as error:
        fitting = _fitting(layout, found.tensors) if layout not in SERVED else []
        if preset in fitting or not fitting:
            raise
        raise ValueError(f"{error}; its shapes are those of {' and '.join(fitting)}") from None
    if drop_first_exit != (layout == "duodiff"):
        if drop_first_exit:
            raise ValueError(
                f"{found.file} has no exit before block 0, as DuoDiff's networks have; none can be dropped"
            )
        raise ValueError(
            f"{found.file} has an exit before block 0, which our models lack: its {FIRST_EXIT} would be lost; convert "
            "it without them by --drop-first-exit (drop_first_exit=True)"
        )
    check_weights(tensors, str(found.file))
    tensors = cast(tensors, dtype, str(found.file))
    dropped = f"the exit before block 0: {FIRST_EXIT}" if drop_first_exit else None
    with found.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    notes = {"converted_from": found.file.name, "part": found.part, "sha256": digest, "layout": layout}
    notes |= {"preset": preset and Path(preset).name, "served_by": served_by}
    notes |= {} if dropped is None else {"dropped": dropped}
    write_tensors(dest, tensors, {"config": config.to_dict(), "notes": notes})
    parameters = sum(value.numel() for value in tensors.values())
    taken_for = assumed(layout, found.settings, config)
    return Conversion(found.file, found.part, layout, preset, served_by, config, parameters, dropped, taken_for)


def _upgrade(
    source: Path, dest: Path, preset: str | None, served_by: str | None, dtype: torch.dtype | None
) -> Conversion:
    if preset is not None or served_by is not None:
        raise ValueError(f"{source} is of an earlier version of this package and says all itself; leave the rest out")
    tensors, metadata = upgraded(source)
    if "config" not in metadata:
        raise ValueError(f"{source} holds tensors of an earlier version but no model; convert models")
    config, _ = described(metadata, source)
    tensors = matched(shapes(config), tensors, str(source))
    check_weights(tensors, str(source))
    write_tensors(dest, cast(tensors, dtype, str(source)), metadata)
    return Conversion(source, None, "earlier version", None, None, config, sum(v.numel() for v in tensors.values()))


def recognise(source: Path) -> tuple[Source, str, dict[str, ModelConfig]]:
    """What lies at `source`, its layout, and what it may be: by the name of each preset that has its shapes, or "" for
    a folder of diffusers that no preset is like, whose schedule only its `scheduler` tells. Raises ValueError where
    `convert` would, presets aside."""
    found = read(source)
    layout = _layout(found)
    if found.network is not None:
        served_by = "diffusers" if layout == "diffusers" else None
        config, preset = _served(replace(found, scheduler=found.scheduler or LINEAR), None, served_by)
        return found, layout, {preset or "": config}
    names, refused = _candidates(found, layout)
    if not names and refused:
        raise ValueError(f"{found.file} cannot be of {refused}")
    return found, layout, {name: replace(PRESETS[name], exits=EXITS.get(layout)) for name in names}


def translate(layout: str, tensors: Mapping[str, Tensor], config: ModelConfig, source: str) -> dict[str, Tensor]:
    """The tensors of `Model(config)` from those of a layout. Raises ValueError that names all that do not fit."""
    wanted, keys = shapes(config), Keys(tensors)
    weights, held = sum(shape.numel() for shape in wanted.values()), total_bytes(tensors)
    if weights > held + SPARE:  # before any is allocated; each takes two bytes or more
        raise ValueError(f"{source} does not fit this model: it holds {held:,} bytes, for {weights:,} weights")
    ours = LAYOUTS[layout](keys, wanted)
    keys.finish(source)
    if layout == "pixart-diffusers":
        network = typed(PixArtConfig, config.network)
        ours[POSITION] = position_embedding(network.dim, network.side, network.interpolation)[None]
    return ours


def from_transformer(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> DiT:
    """The DiT that a `DiTTransformer2DModel` of diffusers is, run as diffusers runs it: its state dict and its
    configuration. Raises ValueError where they are not those of one."""
    found = Source(Path("transformer"), state, network=config, scheduler=LINEAR)
    ours, _ = _served(found, None, "diffusers")  # of which only the network is asked for
    with torch.device("cpu"):
        tensors = translate("diffusers", state, ours, "the transformer")
    return built(lambda: Model(ours), tensors, "the transformer").backbone.eval()


def _configured(found: Source, layout: str, preset: str | None) -> tuple[ModelConfig, str]:
    if preset is None:
        names, refused = _candidates(found, layout)
        if len(names) != 1:
            if not names and refused:
                raise ValueError(f"{found.file} cannot be of {refused}")
            others = f"{' and '.join(names)} have" if names else "no preset has"
            raise ValueError(f"{others} the shapes of {found.file}; name the preset, or a JSON file of its kind")
        preset = names[0]
    config = replace(_named(preset), exits=EXITS.get(layout))
    if why := _refusals(found, layout, config):
        raise ValueError(f"{found.file} is not of preset {preset}: {why}")
    return config, preset


def _candidates(found: Source, layout: str) -> tuple[list[str], str]:
    """Presets that have the shapes of a file and agree with what it says of itself; and why others do not."""
    why = {name: _refusals(found, layout, PRESETS[name]) for name in _fitting(layout, found.tensors)}
    refused = [f"preset {name}: {reason}" for name, reason in why.items() if reason]
    return [name for name, reason in why.items() if not reason], "; nor of ".join(refused)


def _refusals(found: Source, layout: str, config: ModelConfig) -> str:
    """Why a file is not of `config`, shapes aside; empty where it may be."""
    reasons = [other_kind(layout, config), *contradictions(found.settings, config)]
    return "; ".join(reason for reason in reasons if reason)


def _named(preset: str) -> ModelConfig:
    if preset in PRESETS:
        return PRESETS[preset]
    if not preset.endswith(".json"):
        raise ValueError(f"unknown preset {preset!r}, known: {', '.join(PRESETS)}; or name a JSON file")
    values = read_object(Path(preset))
    try:
        return ModelConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"cannot use {preset}: {error}") from None


def _fitting(layout: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Presets whose network has the tensors, by name and shape, of the network in a state dict."""
    prefix = "uvit." if layout == "duodiff" else ""
    theirs = {
        BACKBONE + key.removeprefix(prefix): value.shape
        for key, value in tensors.items()
        if key.startswith(prefix) and not key.startswith("lte_classifer.") and key != NO_CAPTION
    }
    queries = [key for key in theirs if key.endswith(".attn.qkv.weight") and "context_block" not in key]
    position, blocks = theirs.get(POSITION), len(queries)
    larger = (POSITION,) if layout == "mmdit" else ()  # whose grid of positions is not that of the patches
    return [
        name
        for name, config in PRESETS.items()
        # cheap to know of each; to build them all, only to compare, would take seconds
        if (larger or (1, typed(PatchConfig, config.network).positions, config.network.dim) == position)
        and config.network.blocks == blocks
        and _without(larger, shapes(replace(config, exits=None))) == _without(larger, theirs)
    ]


def _without(names: tuple[str, ...], given: Mapping[str, Size]) -> dict[str, Size]:
    return {name: shape for name, shape in given.items() if name not in names}


def _layout(found: Source) -> str:
    if found.network is None:
        return layout_of(found.tensors)
    kinds = {served_pixart.CLASS: "pixart-diffusers", served_mmdit.CLASS: "mmdit-diffusers"}
    return kinds.get(found.network.get("_class_name"), "diffusers")


def _served(found: Source, preset: str | None, served_by: str | None) -> tuple[ModelConfig, str | None]:
    """The configuration of a diffusers folder."""
    if (layout := _layout(found)) != "diffusers":
        if served_by is not None:
            raise ValueError("served_by is for a DiT; this network is run the same way by its authors and by diffusers")
        beside = found.file, preset, found.scheduler, found.autoencoder
        if layout == "pixart-diffusers":
            return served_pixart.pixart_config(served_pixart.served_pixart(found.network, found.file), *beside)
        return served_mmdit.mmdit_config(served_mmdit.served_mmdit(found.network, found.file), *beside)
    if served_by not in SERVERS:
        raise ValueError(
            "say how a DiT of diffusers is to be run: served_by 'diffusers' (sinusoid of shift 1, its norm_eps) or "
            "'dit' (shift 0, 1e-6, as facebookresearch/DiT trains); their outputs differ"
        )
    network = served_network(found.network, found.file, as_diffusers=served_by == "diffusers")
    released = replace(network, frequency_shift=0, mlp_norm_eps=EPS)
    if preset is None:
        preset = next((name for name, config in PRESETS.items() if config.network == released), None)
    named = None if preset is None else _named(preset)
    if named is not None and named.network not in (network, released):
        raise ValueError(f"{found.file} is not of preset {preset}: {_differences(released, named.network)}")
    schedule = None if found.scheduler is None else served_schedule(found.scheduler)
    if named is None and schedule is None:
        raise ValueError(
            f"neither a preset nor a scheduler beside {found.file} tells the schedule; name a preset, or a JSON file"
        )
    if named is not None and schedule not in (None, named.schedule):
        raise ValueError(f"the scheduler's schedule is {schedule}, that of preset {preset} {named.schedule}")
    scale = None if found.autoencoder is None else served_scale(found.autoencoder)
    if named is not None and scale not in (None, named.latent_scale):
        raise ValueError(f"the autoencoder's scaling_factor is {scale}, that of preset {preset} {named.latent_scale}")
    config = named or ModelConfig(network, schedule, null_label=network.num_classes - 1, latent_scale=scale)
    guided = None if served_by == "diffusers" else config.guided_channels  # its pipeline guides all
    return replace(config, network=network, exits=None, guided_channels=guided), preset


def _differences(theirs: DiTConfig, ours: object) -> str:
    if not isinstance(ours, DiTConfig):
        return "it is a DiT"
    pairs = ((field.name, getattr(theirs, field.name), getattr(ours, field.name)) for field in fields(DiTConfig))
    return ", ".join(f"{name} is {a}, not {b}" for name, a, b in pairs if a != b)
