"""The request for a folder of samples, as plain values: any process on any machine draws the same samples from it."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..forward.narrow import width_choice
from ..forward.options import ExecutionOptions, Runner
from ..forward.two_stage import T_SWITCH
from ..model import Model
from ..policies.estimated import EstimatedReuse
from ..policies.exits import Depth
from ..policies.parts import Parts
from ..policies.spelling import DEFAULT, parts_from
from ..policies.step_selector import AUTO
from ..sampling.params import SamplingParams
from ..sampling.sample_batch import whole
from ..sampling.sampler import SamplerRun


@dataclass(frozen=True)
class Networks:
    """Loaded models. shallow: for the noisy timesteps (DuoDiff), or None."""

    model: Model
    shallow: Model | None = None


@dataclass(frozen=True)
class Texts:
    """made: contexts of m prompts, float32 [m, N, E], which samples use in turn. null: context of the empty prompt,
    [N, E]."""

    made: Tensor
    null: Tensor


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Request for n samples. model, shallow_model: names of models in the package, or files. Sample i has the seed
    `seed` + i. steps, class_labels, prompt: one value for all samples, or a list, which repeats. The other fields are
    as in `SamplingParams`, `sample` and `ExecutionOptions`; device None: a GPU if there is one. Error messages name the
    options of `adadiff sample`.
    """

    model: str
    n: int
    steps: int | str | Sequence[int] | Sequence[str] = 50  # a string: "auto"
    solver: str = "ddim"
    policy: str = DEFAULT
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    class_labels: int | Sequence[int] | None = None
    prompt: str | Sequence[str] | None = None
    text_encoder: Path | None = None
    decoder: Path | None = None
    tied: bool = False
    shallow_model: str | None = None
    t_switch: float | None = None
    batch: int = 64
    device: str | None = None
    dtype: str | None = None
    batch_invariant: bool = False
    runner: Runner = "eager"

    def __post_init__(self) -> None:
        whole("n", self.n, 0)
        whole("seed", self.seed, 0)
        for name in ("steps", "class_labels", "prompt"):
            if (values := getattr(self, name)) is not None:  # one value or several becomes a list, as in JSON
                object.__setattr__(self, name, [values] if isinstance(values, int | str) else list(values))
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            object.__setattr__(self, "guidance_interval", (float(low), float(high)))

    @property
    def execution(self) -> ExecutionOptions:
        return ExecutionOptions(batch_invariant=self.batch_invariant, runner=self.runner)

    def load(self, device: str | None = None) -> Networks:
        """Loads the models on `device`; None: on the requested one."""
        where = device or device_of(self)
        model = checkpoint.load(self.model, where, self.dtype)
        shallow = None if self.shallow_model is None else checkpoint.load(self.shallow_model, where, self.dtype)
        return Networks(model, shallow)

    def configuration(self, model: Model) -> dict[str, Any]:
        """The settings that the folder stores, as values for JSON. Equal configurations give the same samples."""
        parts = check_policy(model, self.policy)
        values = {
            **resolved(self),
            "class_labels": None if self.class_labels is None else list(self.class_labels),
            "tied": self.tied,
            **_given(self, "guidance_interval", "prompt", "text_encoder", "decoder"),
        }
        if parts.width is not None:  # the schedule's file may change before a later run completes the folder
            pairs = zip((0.0, *parts.width.times), parts.width.widths, strict=True)
            values["widths"] = [list(pair) for pair in pairs]
        if isinstance(parts.reuse, EstimatedReuse):
            values["estimates_sha256"] = parts.reuse.estimates.digest
        if parts.cascade is not None:
            values["cascade_sha256"] = digest(parts.cascade.path)
        if self.shallow_model is not None:
            values |= {"shallow_model": self.shallow_model, "shallow_sha256": digest(self.shallow_model)}
            values["t_switch"] = T_SWITCH if self.t_switch is None else self.t_switch
        return values

    def files(self, model: Model) -> dict[str, str]:
        """SHA-256 of every model and file that sampling reads, by name; of estimated errors, that of their values."""
        parts = check_policy(model, self.policy)
        names = (self.model, self.shallow_model, None if parts.cascade is None else parts.cascade.path)
        found = {name: digest(name) for name in names if name is not None}
        if isinstance(parts.reuse, EstimatedReuse):
            found[str(parts.reuse.source)] = parts.reuse.estimates.digest
        return found

    def run(
        self, networks: Networks, slots: Sequence[int], texts: Texts | None = None, progress: bool = False
    ) -> SamplerRun:
        """The sampling run of these slots, 0..n - 1. texts: for models that take text. Raises ValueError for settings
        that do not fit the model."""
        embeds: dict[str, Tensor] = {}
        if texts is not None:
            embeds = {
                "text_embeds": texts.made[[slot % len(texts.made) for slot in slots]],
                "null_text_embeds": texts.null,
            }
        labels = self.class_labels
        params = SamplingParams(
            seed=[self.seed + slot for slot in slots],
            class_labels=None if labels is None else cycled("class labels", labels, self.n, slots),
            steps=AUTO if list(self.steps) == [AUTO] else cycled("steps", self.steps, self.n, slots),
            solver=self.solver,
            policy=self.policy,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            tied=self.tied,
            **embeds,
        )
        return SamplerRun(
            *(networks.model, len(slots), params),
            batch=self.batch,
            execution=self.execution,
            shallow_model=networks.shallow,
            t_switch=self.t_switch,
            progress=progress,
        )

    def check(self, networks: Networks) -> None:
        """ValueError if the settings of any sample do not fit the model, before anything is drawn."""
        if self.guidance_interval is not None and self.guidance_scale == 1:
            raise ValueError("--guidance-interval limits guidance, and there is none; give --guidance-scale, too")
        if self.tied and self.guidance_scale == 1:
            raise ValueError("--tied joins the halves of guidance, and there is none; give --guidance-scale, too")
        self.run(networks, self.some_slots, self.no_texts(networks.model))
        if self.guidance_scale != 1 and networks.model.config.classes and self.class_labels is None:
            raise ValueError(
                f"--guidance-scale {self.guidance_scale:g} without --class-labels doubles the work and changes nothing"
            )

    def check_anywhere(self, networks: Networks) -> None:
        """As `check`, for networks that may be on another device than the requested one."""
        same = networks.model.device.type == torch.device(device_of(self)).type
        (self if same else dataclasses.replace(self, runner="eager")).check(networks)

    @property
    def some_slots(self) -> list[int]:
        """Slots that together cover all settings and the largest seed."""
        longest = max(len(values) for values in (self.class_labels or (), self.steps))
        return sorted({*range(min(self.n, longest)), *range(max(0, self.n - 1), self.n)})

    def no_texts(self, model: Model) -> Texts | None:
        """Zeros as placeholders of the prompts' contexts; None for a model without text. ValueError for settings that
        do not fit the model."""
        network, prompts = model.config.network, self.prompt
        if not network.context_tokens:
            if prompts is not None or self.text_encoder is not None:
                raise ValueError("this model takes no text; leave --prompt and --text-encoder out")
            return None
        if prompts is None:
            raise ValueError("this model takes text; give --prompt")
        if self.class_labels is not None:
            raise ValueError("this model takes text; leave --class-labels out")
        cycled("prompts", prompts, self.n, ())  # raises for more prompts than samples
        zeros = torch.zeros((), dtype=torch.float32, device="cpu").expand(network.context_tokens, network.context_dim)
        return Texts(zeros.expand(len(prompts), *zeros.shape), zeros)


def _given(asked: Any, *names: str) -> dict[str, Any]:
    """The attributes `names` that are not None, as values for JSON."""
    values = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    return {name: str(value) if isinstance(value, Path | tuple) else value for name, value in values.items()}


def device_of(asked: Any) -> str:
    """The requested device, or a GPU if there is one. asked: an object with `device`."""
    return asked.device or ("cuda" if torch.cuda.is_available() else "cpu")


def resolved(asked: Any) -> dict[str, Any]:
    """The settings that determine samples. asked: an `Asked`, or the options of a command."""
    return {
        "model": asked.model,
        "model_sha256": digest(asked.model),
        "n": asked.n,
        "steps": asked.steps,
        "solver": asked.solver,
        "policy": asked.policy,
        "guidance_scale": asked.guidance_scale,
        "seed": asked.seed,
        "batch": asked.batch,
        "device": device_of(asked),
        "dtype": asked.dtype,
        "batch_invariant": asked.batch_invariant,
        "runner": asked.runner,
    }


def check_policy(model: Model, policy: str) -> Parts:
    """The parts of the policy. ValueError for text that is no policy, for a depth beyond the network's, which would
    have no effect, and for widths that the network was not trained with."""
    parts = parts_from(policy, model.calibration)
    if parts.width is not None:
        width_choice(model, parts.width)
    found = parts.exit
    if isinstance(found, Depth) and found.threshold > model.num_layers:
        raise ValueError(f"policy {policy!r}: this network has {model.num_layers} blocks; give a smaller depth")
    return parts


def digest(name_or_file: str) -> str:
    """SHA-256 of a checkpoint file."""
    with checkpoint.find(name_or_file).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cycled(name: str, values: Sequence, n: int, slots: Sequence[int]) -> list:
    """The values of the samples in `slots`; `values` repeat over the n samples. ValueError for more than n of them."""
    if n and len(values) > n:
        raise ValueError(f"{len(values)} {name} for {n} samples; give at most one each")
    return [values[slot % len(values)] for slot in slots]
