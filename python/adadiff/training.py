"""Training from scratch: the network alone, or together with its exits. Resumable, bit for bit.

Every random number of step k comes from a generator seeded by (seed, k), so the state on disk is the step, the weights,
their average (EMA) and the optimizer's moments, and nothing else.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from . import checkpoint, data
from .config import PRESETS, ModelConfig, from_dict
from .exits import all_layers
from .losses import adadiff_loss
from .model import Model

STATE, MODEL, LOG, CONFIG = "state.safetensors", "model.safetensors", "log.jsonl", "config.json"


@dataclass(frozen=True)
class TrainConfig:
    """`exits` False trains the plain network with L_simple alone: the baseline of equal budget."""

    preset: str = "digits"
    exits: bool = True
    steps: int = 8000
    batch: int = 64
    lr: float = 2e-3  # reached after `warmup` steps, then a cosine to zero
    warmup: int = 400
    weight_decay: float = 0.03
    ema: float = 0.999
    uem_weight: float = 1.0  # lambda
    ual_weight: float = 1.0  # beta
    label_drop: float = 0.1
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        if self.preset != "digits":
            raise ValueError(f"training data is at hand for the preset 'digits', not {self.preset!r}")
        for name in ("steps", "batch", "save_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if not isinstance(self.warmup, int) or self.warmup < 0 or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"warmup and seed must be integers >= 0, got {self.warmup!r} and {self.seed!r}")
        for name in ("lr", "weight_decay", "uem_weight", "ual_weight", "ema", "label_drop"):
            if not isinstance(getattr(self, name), (int, float)) or isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not isinstance(self.exits, bool):
            raise ValueError(f"exits must be true or false, got {self.exits!r}")
        for name in ("ema", "label_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        for name in ("lr", "weight_decay", "uem_weight", "ual_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")

    @property
    def model(self) -> ModelConfig:
        config = PRESETS[self.preset]
        return config if self.exits else dataclasses.replace(config, exits=None)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of update `step`, counted from 0: linear warm-up, then half a cosine."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class Trainer:
    """Weights, their average and the optimizer, at some step. `folder` receives state, log and the averaged model."""

    def __init__(self, config: TrainConfig, folder: Path):
        self.config, self.folder, self.step, self.seconds = config, folder, 0, 0.0
        self._whole = True  # False while an update has changed some of the weights and not yet all
        torch.manual_seed(config.seed)
        self.model = Model(config.model)
        self.average = Model(config.model).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay
        )
        self.images, self.labels = data.digits("train")
        self._claim_folder()

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / CONFIG
        if file.exists():
            try:
                theirs = from_dict(TrainConfig, json.loads(file.read_text()), str(file))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} is not readable: {error}") from error
            if theirs != self.config:
                differing = [k for k, v in vars(self.config).items() if getattr(theirs, k) != v]
                raise ValueError(
                    f"{self.folder} holds a run with another {', '.join(differing)}; choose another folder"
                )
        file.write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        if (self.folder / STATE).exists():
            self._resume()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float | list[float]]]:
        """The loss of one update and its logged terms."""
        config, model = self.config, self.model
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        pick = torch.randint(len(self.images), (config.batch,), generator=generator)
        x0, labels = self.images[pick], self.labels[pick]
        drop = torch.rand(config.batch, generator=generator) < config.label_drop
        labels = labels.masked_fill(drop, config.model.null_label)
        t, alpha_bar = model.schedule.training_times(torch.rand(config.batch, generator=generator, dtype=torch.float64))
        noise = torch.randn(x0.shape, generator=generator)
        alpha_bar = alpha_bar.float()[:, None, None, None]
        x = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        if model.exits is None:
            loss = F.mse_loss(model.backbone(x, t.float(), labels), noise)
            return loss, {"simple": loss.item()}
        predictions, scores = all_layers(model.backbone, model.exits, x, t.float(), labels)
        terms = adadiff_loss(predictions, scores, noise, model.backbone.patchify, config.uem_weight, config.ual_weight)
        logged = {name: getattr(terms, name).item() for name in ("simple", "uem", "ual")}
        return terms.total, {**logged, "errors": terms.errors.tolist()}

    def update(self) -> dict[str, float | list[float]]:
        """One optimizer step. Raises FloatingPointError on a loss or gradient that is not finite; the weights stay."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss, logged = self.loss(self.step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}; the last checkpoint is kept")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {self.step}; nothing was changed")
        self._whole = False
        self.optimizer.step()
        self.step += 1
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))  # follow quickly while everything moves
        for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - decay)
        self._whole = True
        return logged

    def run(self, progress: bool = True) -> Path:
        """Trains to the end, saving as it goes and when interrupted. Returns the file of the averaged model."""
        bar = tqdm(total=self.config.steps, initial=self.step, disable=not progress, unit="step", dynamic_ncols=True)
        try:
            with bar:
                while self.step < self.config.steps:
                    started = time.perf_counter()
                    logged = self.update()
                    self.seconds += time.perf_counter() - started
                    bar.update()
                    bar.set_postfix(simple=f"{logged['simple']:.4f}")
                    if self.step % 100 == 0:
                        self._log(logged)
                    if self.step % self.config.save_every == 0:
                        self.save()
        except KeyboardInterrupt:
            if self._whole:  # else the last checkpoint stands
                self.save()
            raise
        self.save()
        return self.folder / MODEL

    def save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        checkpoint.write_tensors(self.folder / STATE, tensors, {"step": self.step, "seconds": self.seconds})
        notes = {"train": dataclasses.asdict(self.config), "step": self.step, "seconds": round(self.seconds)}
        checkpoint.save(self.average, self.folder / MODEL, notes)

    def _resume(self) -> None:
        tensors, metadata = checkpoint.read_tensors(self.folder / STATE)
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for key, value in tensors.items():
            group, name = key.split(".", 1)
            groups[group][name] = value
        checkpoint.load_strictly(self.model, groups["model"], str(self.folder / STATE))
        checkpoint.load_strictly(self.average, groups["average"], str(self.folder / STATE))
        state = self.optimizer.state_dict()
        for key, value in groups["optimizer"].items():
            index, name = key.split(".", 1)
            state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)
        self.step, self.seconds = metadata["step"], metadata["seconds"]

    def _log(self, logged: dict[str, float | list[float]]) -> None:
        with open(self.folder / LOG, "a") as file:
            file.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **logged}) + "\n")
