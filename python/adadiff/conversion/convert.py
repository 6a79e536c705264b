"""Conversion of other projects' checkpoints. Settings that tensor shapes do not give come from a preset that fits them.

foreign.py reads the files; layouts.py translates the names of tensors.
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
SERVED = ("diffusers", "pixart-diffusers", "mmdit-diffusers")  # layouts of folders with configuration files
POSITION = f"{BACKBONE}pos_embed"
SPARE = 2**20  # a file that lacks more weights than this is refused without naming each


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion."""

    source: Path
    part: str | None
    layout: str
    preset: str | None  # source of settings that shapes do not give; None: the source has them
    served_by: str | None
    config: ModelConfig
    parameters: int
    dropped: str | None = None  # tensors that our models have no place for, if drop_first_exit allowed it
    assumed: str | None = None  # an assumption that the source does not confirm


@torch.inference_mode(False)  # whatever mode the caller is in
def convert(
    source: str | Path,
    dest: str | Path,
    preset: str | None = None,
    served_by: str | None = None,
    dtype: torch.dtype | str | None = None,
    drop_first_exit: bool = False,
) -> Conversion:
    """Converts `source` (a file or folder that foreign.py lists, or a file of an earlier version of this package) to
    `dest`, which `adadiff.load` opens.

    preset: a preset's name, or a JSON file with a configuration as in the headers of our files. It gives the settings
    that shapes do not (heads, schedule, time), and must agree with the shapes and with the settings that a training
    file holds. Not needed if the source has them, as diffusers folders do, or if only one preset has these shapes.
    served_by: "diffusers" or "dit", required for a diffusers folder of a DiT: whose time embedding and norm epsilon to
    run the weights with. diffusers uses its own for every DiT, even for those that facebookresearch trained with
    others.
    dtype: of the stored weights: float32, bfloat16 or float16, or its name; None: as in `source`.
    drop_first_exit: required for DuoDiff networks with exits: drops their exit before block 0, which our models lack.

    Raises ValueError for a source that cannot be read safely, tensors that do not fit (it names them), weights that are
    not finite, and a `dest` that exists.
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
        raise ValueError(
            f"{source} is of an earlier version of this package and holds all settings; leave preset and served_by out"
        )
    tensors, metadata = upgraded(source)
    if "config" not in metadata:
        raise ValueError(f"{source} holds tensors of an earlier version but no model; convert models")
    config, _ = described(metadata, source)
    tensors = matched(shapes(config), tensors, str(source))
    check_weights(tensors, str(source))
    write_tensors(dest, cast(tensors, dtype, str(source)), metadata)
    return Conversion(source, None, "earlier version", None, None, config, sum(v.numel() for v in tensors.values()))


def recognise(source: Path) -> tuple[Source, str, dict[str, ModelConfig]]:
    """The content of `source`, its layout, and its possible configurations by preset: all presets with these shapes, or
    "" for a diffusers folder that fits none, whose schedule only its scheduler gives. Raises ValueError where `convert`
    would, except for an ambiguous preset."""
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
    """The tensors of `Model(config)` from those of a layout. Raises ValueError, which names all that do not fit."""
    wanted, keys = shapes(config), Keys(tensors)
    weights, held = sum(shape.numel() for shape in wanted.values()), total_bytes(tensors)
    if weights > held + SPARE:  # checked before allocating; each weight takes at least two bytes
        raise ValueError(f"{source} does not fit this model: it holds {held:,} bytes, for {weights:,} weights")
    ours = LAYOUTS[layout](keys, wanted)
    keys.finish(source)
    if layout == "pixart-diffusers":
        network = typed(PixArtConfig, config.network)
        ours[POSITION] = position_embedding(network.dim, network.side, network.interpolation)[None]
    return ours


def from_transformer(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> DiT:
    """The `DiT` for a diffusers `DiTTransformer2DModel`, computed as diffusers does. state, config: its state dict and
    configuration. Raises ValueError if they are of another network."""
    found = Source(Path("transformer"), state, network=config, scheduler=LINEAR)
    ours, _ = _served(found, None, "diffusers")  # only the network is used, so any schedule will do
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
    """Presets that agree with a file's shapes and settings; and why others with these shapes do not."""
    why = {name: _refusals(found, layout, PRESETS[name]) for name in _fitting(layout, found.tensors)}
    refused = [f"preset {name}: {reason}" for name, reason in why.items() if reason]
    return [name for name, reason in why.items() if not reason], "; nor of ".join(refused)


def _refusals(found: Source, layout: str, config: ModelConfig) -> str:
    """Why a file cannot be of `config`, apart from shapes; empty if it can."""
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
    """Presets whose network has the same tensors, by name and shape, as the network in a state dict."""
    prefix = "uvit." if layout == "duodiff" else ""
    theirs = {
        BACKBONE + key.removeprefix(prefix): value.shape
        for key, value in tensors.items()
        if key.startswith(prefix) and not key.startswith("lte_classifer.") and key != NO_CAPTION
    }
    queries = [key for key in theirs if key.endswith(".attn.qkv.weight") and "context_block" not in key]
    position, blocks = theirs.get(POSITION), len(queries)
    larger = (POSITION,) if layout == "mmdit" else ()  # its grid of positions is larger than that of the patches
    return [
        name
        for name, config in PRESETS.items()
        # cheap checks first: building every preset to compare shapes would take seconds
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
    guided = None if served_by == "diffusers" else config.guided_channels  # diffusers guides all channels
    return replace(config, network=network, exits=None, guided_channels=guided), preset


def _differences(theirs: DiTConfig, ours: object) -> str:
    if not isinstance(ours, DiTConfig):
        return "it is a DiT"
    pairs = ((field.name, getattr(theirs, field.name), getattr(ours, field.name)) for field in fields(DiTConfig))
    return ", ".join(f"{name} is {a}, not {b}" for name, a, b in pairs if a != b)
