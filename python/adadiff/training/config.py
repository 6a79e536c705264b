"""Configuration of a training: one frozen dataclass, read from a TOML or JSON file, a shipped name or the command
line."""

import dataclasses
import math
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ..config import PRESETS, ModelConfig, from_dict
from ..data import sources
from ..reading import read_json, read_text
from ..uem import ExitConfig
from .losses import loss_named

T = TypeVar("T")

FORMAT_VERSION = 2  # of configuration files

POSITIVE = ("steps", "batch", "accumulate", "save_every", "log_every")
COUNTS = ("warmup", "seed", "sample_every")
SHARES = ("ema", "label_drop")
FACTORS = ("lr", "weight_decay", "uem_weight", "ual_weight")
MOST = dict.fromkeys((*POSITIVE, *COUNTS), 10**9) | {"batch": 10**6}
CHOICES = {
    "recipe": ("joint", "frozen"),
    "precision": ("float32", "bfloat16"),
    "start": ("published", "linear"),
}


@dataclass(frozen=True)
class TrainConfig:
    """exits: False trains the plain network with L_simple alone, the baseline with the same training budget.

    recipe: "joint" trains network and exits together, from scratch or, with `init`, from a checkpoint; "frozen" trains
    the exits of the checkpoint `init` and leaves its network as it is.
    start: initial weights of a fresh network: "published" as its authors', or "linear" (U-ViT only), for networks
    narrower than theirs.
    network, exit_options: changes to the settings of the preset's network and of its exits. schedule, prediction_type:
    as in `ModelConfig`; "": the preset's.
    widths: of a slimmable network, as in `ModelConfig`; each update then trains several widths (`Trainer.turns`).
    Empty: full width only.
    batch: images of one update, counted over all processes and `accumulate` parts.

    Raises ValueError for a wrong type, a value out of range, or settings that do not fit together.
    """

    preset: str = "digits"
    data: str = "digits"
    network: dict = field(default_factory=dict)
    schedule: str = ""
    prediction_type: str = ""
    exits: bool = True
    exit_options: dict = field(default_factory=dict)
    widths: list = field(default_factory=list)
    recipe: str = "joint"
    init: str = ""
    start: str = "published"
    loss: str = "paper"
    steps: int = 8000
    batch: int = 64
    accumulate: int = 1
    lr: float = 2e-3  # reached after `warmup` steps, then a cosine to zero
    warmup: int = 400
    weight_decay: float = 0.03
    ema: float = 0.999
    uem_weight: float = 1.0  # lambda
    ual_weight: float = 1.0  # beta
    label_drop: float = 0.1
    precision: str = "float32"
    seed: int = 0
    save_every: int = 500
    log_every: int = 100
    sample_every: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for known in dataclasses.fields(self):
            value = getattr(self, known.name)
            if type(value) is not known.type and (type(value), known.type) != (int, float):
                raise ValueError(f"{known.name} must be of type {known.type.__name__}, got {value!r}")
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        for name in COUNTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {getattr(self, name)!r}")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {getattr(self, name):,}")
        for name in SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        for name in FACTORS:
            if not 0 <= getattr(self, name) <= sys.float_info.max:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} cannot be split into {self.accumulate} equal parts")
        self._check_model()

    def _check_model(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}, known: {', '.join(PRESETS)}")
        sources.SOURCES.read(self.data)
        loss_named(self.loss)
        if self.start == "linear" and (self.init or PRESETS[self.preset].family != "uvit"):
            raise ValueError(
                "start = 'linear' is for a fresh U-ViT; with a checkpoint in `init`, training starts from its weights"
            )
        if self.recipe == "frozen" and not (self.init and self.exits):
            raise ValueError("the recipe 'frozen' trains exits on the network of a checkpoint: it needs init and exits")
        if self.loss == "relative" and self.exits and not self.init:
            raise ValueError(
                "the loss 'relative' needs a network that can predict already: give init, or take 'supervised'"
            )
        if self.exit_options and not self.exits:
            raise ValueError("exit_options say how exits are made, but exits is false")
        model = self.model
        if self.label_drop and model.null_label is None and not model.network.context_tokens:
            raise ValueError(f"{self.preset!r} has no null class to put in place of a label; set label_drop to 0")

    @property
    def model(self) -> ModelConfig:
        """The preset with the changes. Its null class stays the last one, whatever their number."""
        config = PRESETS[self.preset]
        exits = _changed(config.exits or ExitConfig(), self.exit_options, "exit_options") if self.exits else None
        network = _changed(config.network, self.network, "network")
        given = {name: getattr(self, name) for name in ("schedule", "prediction_type") if getattr(self, name)}
        if config.null_label is not None:
            given["null_label"] = network.num_classes - 1 if network.num_classes else None
        return dataclasses.replace(config, network=network, exits=exits, widths=tuple(self.widths) or None, **given)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update `step`, counted from 0: linear warm-up, then half a cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def shipped() -> dict[str, Path]:
    """The configurations in the package, by name."""
    files = (Path(str(file)) for file in resources.files("adadiff").joinpath("configs").iterdir())
    return {file.stem: file for file in sorted(files) if file.suffix == ".toml"}


def versioned(values: Any, what: str) -> Any:
    """The values of the file `what` without its format_version. ValueError for another version."""
    if not isinstance(values, dict):
        return values
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        advice = ""
        if version in (None, 1):
            entry = '"format_version":' if what.endswith(".json") else "format_version ="
            advice = f"; its keys mean what they did, so write {entry} {FORMAT_VERSION}"
        raise ValueError(f"{what} has format_version {version!r}, this release reads {FORMAT_VERSION}{advice}")
    return {key: value for key, value in values.items() if key != "format_version"}


def load_config(name_or_file: str | Path | None, changes: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a shipped name or a file (.toml or .json), or the defaults for None, with `changes` applied.

    Raises ValueError for a name that is neither shipped nor a file, for an unreadable file, and for unknown keys and
    invalid values.
    """
    if name_or_file is None:
        return from_dict(TrainConfig, changes, "the configuration")
    known = shipped()
    path = known.get(str(name_or_file), Path(name_or_file))
    if not path.is_file():
        raise ValueError(f"no configuration {str(name_or_file)!r}: neither a file nor one of {', '.join(known)}")
    values = _read_toml(path) if path.suffix == ".toml" else read_json(path)
    values = versioned(values, str(path))
    if isinstance(values, dict):
        if changes.get("exits") is False:
            values.pop("exit_options", None)  # exits are switched off
        values |= changes
    try:
        return from_dict(TrainConfig, values, "a training")
    except ValueError as error:
        raise ValueError(f"cannot use {path}: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def _changed(value: T, changes: Mapping[str, Any], what: str) -> T:
    return from_dict(type(value), {**dataclasses.asdict(value), **changes}, what)
