"""Checkpoints of others become ours. What their shapes do not tell is taken from a preset, which must fit them.

Which files there are says foreign.py; whose names mean what, layouts.py.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from ..checkpoint import Keys, dtype_from, load_strictly, write_tensors
from ..config import PRESETS, ModelConfig
from ..model import Model
from ..models.dit import EPS, DiT, DiTConfig
from ..policies.calibrated import Calibration
from ..uem import DUODIFF, OFFICIAL, ExitConfig
from .earlier import is_earlier, upgraded
from .foreign import Source, read, read_json
from .layouts import BACKBONE, LAYOUTS, layout_of

EXITS: Mapping[str, ExitConfig] = {"official": OFFICIAL, "duodiff": DUODIFF}
SERVERS = ("diffusers", "dit")


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


def convert(
    source: str | Path,
    dest: str | Path,
    preset: str | None = None,
    served_by: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Conversion:
    """Reads `source` (foreign.py says what may be one, or a file of an earlier version of this package) and writes
    `dest`, which `adadiff.load` opens.

    preset: the name of one, or a JSON file with a configuration as in our own files' headers. It says what cannot be
    seen from shapes (heads, schedule, time) and must agree with all that can. It may be left out where the source says
    it, as diffusers' folders do, or where only one preset has these shapes.
    served_by: "diffusers" or "dit", needed for a diffusers folder: which sinusoid of time and epsilon the weights are
    to be run with. diffusers runs every DiT with its own, also those that facebookresearch trained with others.
    dtype: that weights are stored in: float32, bfloat16 or float16, or its name; None: as they are.
    Raises ValueError for what cannot be read safely or does not fit, naming the keys, and where `dest` exists.
    """
    source, dest, dtype = Path(source), Path(dest), dtype_from(dtype)
    if dest.exists():
        raise ValueError(f"{dest} exists; name a file that does not")
    if source.is_file() and is_earlier(source):
        return _upgrade(source, dest, preset, served_by, dtype)
    found = read(source)
    layout = "diffusers" if found.network is not None else layout_of(found.tensors)
    if layout == "diffusers":
        if found.network is None:
            raise ValueError(f"{found.file} is diffusers' weights alone; give the folder that holds its config.json")
        config, preset = _served(found, preset, served_by)
    elif served_by is not None:
        raise ValueError(f"served_by is for folders of diffusers; {found.file} is not from there")
    else:
        config, preset = _configured(found, layout, preset)
    try:
        tensors = translate(layout, found.tensors, config, str(found.file))
    except ValueError as error:
        fitting = _fitting(layout, found.tensors) if layout != "diffusers" else []
        if preset in fitting or not fitting:
            raise
        raise ValueError(f"{error}; its shapes are those of {' and '.join(fitting)}") from None
    with found.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    notes = {"converted_from": found.file.name, "part": found.part, "sha256": digest, "layout": layout}
    notes |= {"preset": preset and Path(preset).name, "served_by": served_by}
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    write_tensors(dest, tensors, {"config": config.to_dict(), "notes": notes})
    parameters = sum(value.numel() for value in tensors.values())
    return Conversion(found.file, found.part, layout, preset, served_by, config, parameters)


def _upgrade(
    source: Path, dest: Path, preset: str | None, served_by: str | None, dtype: torch.dtype | None
) -> Conversion:
    if preset is not None or served_by is not None:
        raise ValueError(f"{source} is of an earlier version of this package and says all itself; leave the rest out")
    tensors, metadata = upgraded(source)
    if "config" not in metadata:
        raise ValueError(f"{source} holds tensors of an earlier version but no model; convert models")
    config = ModelConfig.from_dict(metadata["config"])
    load_strictly(Model(config), tensors, str(source))
    if "calibration" in metadata:
        Calibration.from_dict(metadata["calibration"])  # for its checks
    write_tensors(dest, {key: value.to(dtype) for key, value in tensors.items()}, metadata)
    return Conversion(source, None, "earlier version", None, None, config, sum(v.numel() for v in tensors.values()))


def recognise(source: Path) -> tuple[Source, str, dict[str, ModelConfig]]:
    """What lies at `source`, its layout, and what it may be: by the name of each preset that has its shapes, or "" for
    a folder of diffusers that no preset is like, whose schedule only its `scheduler` tells. Raises ValueError where
    `convert` would, presets aside."""
    found = read(source)
    if found.network is not None:
        config, preset = _served(replace(found, scheduler=found.scheduler or LINEAR), None, "diffusers")
        return found, "diffusers", {preset or "": config}
    layout = layout_of(found.tensors)
    names = _fitting(layout, found.tensors)
    return found, layout, {name: replace(PRESETS[name], exits=EXITS.get(layout)) for name in names}


def translate(layout: str, tensors: Mapping[str, Tensor], config: ModelConfig, source: str) -> dict[str, Tensor]:
    """The tensors of `Model(config)` from those of a layout. Raises ValueError that names all that do not fit."""
    keys = Keys(tensors)
    ours = LAYOUTS[layout](keys, shapes(config))
    keys.finish(source)
    return ours


def from_transformer(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> DiT:
    """The DiT that a `DiTTransformer2DModel` of diffusers is, run as diffusers runs it: its state dict and its
    configuration. Raises ValueError where they are not those of one."""
    found = Source(Path("transformer"), state, network=config, scheduler=LINEAR)
    ours, _ = _served(found, None, "diffusers")  # of which only the network is asked for
    model = Model(ours)
    load_strictly(model, translate("diffusers", state, ours, "the transformer"), "the transformer")
    return model.backbone.eval()


@cache
def shapes(config: ModelConfig) -> Mapping[str, Size]:
    """Of the tensors in a `Model(config)`, by name."""
    with torch.device("meta"):
        return {key: value.shape for key, value in Model(config).state_dict().items()}


def _configured(found: Source, layout: str, preset: str | None) -> tuple[ModelConfig, str]:
    if preset is None:
        fitting = _fitting(layout, found.tensors)
        if len(fitting) != 1:
            others = f"{' and '.join(fitting)} have" if fitting else "no preset has"
            raise ValueError(f"{others} the shapes of {found.file}; name the preset, or a JSON file of its kind")
        preset = fitting[0]
    return replace(_named(preset), exits=EXITS.get(layout)), preset


def _named(preset: str) -> ModelConfig:
    if preset in PRESETS:
        return PRESETS[preset]
    if not preset.endswith(".json"):
        raise ValueError(f"unknown preset {preset!r}, known: {', '.join(PRESETS)}; or name a JSON file")
    return ModelConfig.from_dict(read_json(Path(preset)))


def _fitting(layout: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Presets whose network has the tensors, by name and shape, of the network in a state dict."""
    prefix = "uvit." if layout == "duodiff" else ""
    theirs = {
        BACKBONE + key.removeprefix(prefix): value.shape
        for key, value in tensors.items()
        if key.startswith(prefix) and not key.startswith("lte_classifer.")
    }
    position, blocks = theirs.get(f"{BACKBONE}pos_embed"), sum(key.endswith(".attn.qkv.weight") for key in theirs)
    return [
        name
        for name, config in PRESETS.items()
        # cheap to know of each; to build them all, only to compare, would take seconds
        if ((1, config.network.tokens, config.network.dim), config.network.blocks) == (position, blocks)
        and shapes(replace(config, exits=None)) == theirs
    ]


REQUIRED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "linear": LINEAR,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


def _served(found: Source, preset: str | None, served_by: str | None) -> tuple[ModelConfig, str | None]:
    """The configuration of a diffusers folder."""
    if served_by not in SERVERS:
        raise ValueError(
            "say how a DiT of diffusers is to be run: served_by 'diffusers' (sinusoid of shift 1, its norm_eps) or "
            "'dit' (shift 0, 1e-6, as facebookresearch/DiT trains); their outputs differ"
        )
    theirs = found.network
    for name, value in REQUIRED.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{name} must be {value!r} in the config.json beside {found.file}, got {theirs.get(name)!r}"
            )
    sizes = ("sample_size", "in_channels", "patch_size", "attention_head_dim", "num_attention_heads", "num_layers")
    needed = [name for name in (*sizes, "num_embeds_ada_norm", "norm_eps") if theirs.get(name) is None]
    if needed:
        raise ValueError(f"the config.json beside {found.file} lacks {', '.join(needed)}")
    size, channels, patch, width, heads, depth = (theirs[name] for name in sizes)
    outputs = theirs.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"out_channels must be {channels} or {2 * channels}, got {outputs}")
    network = DiTConfig(
        size,
        channels,
        patch,
        width * heads,
        depth,
        heads,
        num_classes=theirs["num_embeds_ada_norm"] + 1,
        learned_variance=outputs != channels,
        frequency_shift=1 if served_by == "diffusers" else 0,
        mlp_norm_eps=float(theirs["norm_eps"]) if served_by == "diffusers" else EPS,
    )
    released = replace(network, frequency_shift=0, mlp_norm_eps=EPS)
    if preset is None:
        preset = next((name for name, config in PRESETS.items() if config.network == released), None)
    named = None if preset is None else _named(preset)
    if named is not None and named.network not in (network, released):
        raise ValueError(f"{found.file} is not of preset {preset}: {_differences(released, named.network)}")
    schedule = None if found.scheduler is None else _schedule(found.scheduler)
    if named is None and schedule is None:
        raise ValueError(
            f"neither a preset nor a scheduler beside {found.file} tells the schedule; name a preset, or a JSON file"
        )
    if named is not None and schedule not in (None, named.schedule):
        raise ValueError(f"the scheduler's schedule is {schedule}, that of preset {preset} {named.schedule}")
    scale = None if found.autoencoder is None else found.autoencoder.get("scaling_factor")
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


def _schedule(scheduler: Mapping[str, Any]) -> str:
    wanted = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "trained_betas": None}
    for name, value in wanted.items():
        if scheduler.get(name, value) != value:
            raise ValueError(f"{name} of the scheduler must be {value!r}, got {scheduler[name]!r}")
    for schedule, settings in SCHEDULES.items():
        if all(scheduler.get(name) == value for name, value in settings.items()):
            return schedule
    given = {name: scheduler.get(name) for name in ("beta_schedule", "beta_start", "beta_end")}
    raise ValueError(f"the scheduler's {given} is no schedule of ours: {SCHEDULES}")
