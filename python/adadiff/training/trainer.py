"""Training: from scratch, from a checkpoint, or of exits alone on a frozen network. Resumable, bit for bit.

The random numbers of step k come from a generator seeded by (seed, k), so the state on disk is only the step, the
weights, their average (EMA) and the optimizer's moments. Each process draws the numbers of the whole batch and uses its
part, so that the number of processes changes a run by rounding only.
"""

import copy
import dataclasses
import hashlib
import os
import random
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import checkpoint
from ..data import sources
from ..data.feature_sets import CaptionedMoments
from ..diffusion.prediction import target_of
from ..model import Model
from ..models.uvit import start_as_linear
from ..output.pictures import CHANNELS
from ..pipelines.latents import draw_latents
from .config import TrainConfig, learning_rate
from .losses import OF_WHOLE_BATCHES
from .objective import Objective
from .processes import Processes
from .run_folder import MODEL, STATE, RunFolder

MOST_NORM = 1.0  # gradients are scaled down to this norm


class Trainer:
    """A training run at some step: weights, their average and the optimizer. `folder` receives state, log and the
    averaged model.

    Raises ValueError, before any step, if configuration, data, initial checkpoint and folder do not fit together, and
    if gradients are disabled or PyTorch's default dtype and device are not float32 and cpu. force: replace another run
    in the folder, see `RunFolder`.
    """

    def __init__(self, config: TrainConfig, folder: Path, force: bool = False):
        _check_process()
        self.config, self.step, self.seconds = config, 0, 0.0
        self._whole = True  # False while an update is changing the weights, when saving would mix two steps
        self.processes = Processes()
        self._part = config.batch // (self.processes.world * config.accumulate)
        if self._part * self.processes.world * config.accumulate != config.batch:
            raise ValueError(
                f"a batch of {config.batch} cannot be split into {config.accumulate} equal parts for each of "
                f"{self.processes.world} processes"
            )
        self.data = sources.load(config.data)
        self._check_data()
        torch.manual_seed(config.seed)
        self.model = start_model(config)
        self._start = fingerprint(self.model.backbone) if config.init else None  # of the initial network
        self.average = copy.deepcopy(self.model).requires_grad_(False).to(self.processes.device)
        self._own = Objective(self.model, config)
        self.objective = self.processes.join(self._own)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay
        )
        self.folder = RunFolder(folder, config, self.processes.main, force)
        if (state := self.folder.read_state()) is not None:
            self._resume(*state)

    def _check_data(self) -> None:
        data, model, network = self.data, self.config.model, self.config.model.network
        shape = data.shape
        if data.moments:
            if model.latent_scale is None:
                raise ValueError(f"data {self.config.data!r} is latents, but {self.config.preset!r} draws images")
            shape = (shape[0] // 2, *shape[1:])
        wanted = (network.channels, network.image_size, network.image_size)
        if shape != wanted or (network.num_classes and not 1 <= data.classes <= model.classes):
            raise ValueError(
                f"data {self.config.data!r} is {'x'.join(map(str, shape))} in {data.classes} classes, but the network "
                f"draws {'x'.join(map(str, wanted))} in {model.classes}; choose data, preset and network that agree"
            )
        self._check_text()
        if self.config.sample_every and shape[0] not in CHANNELS:
            raise ValueError(f"samples of {shape[0]} channels cannot be drawn as pictures; set sample_every to 0")

    def _check_text(self) -> None:
        network = self.config.model.network
        given, wanted = getattr(self.data, "empty_context", None), (network.context_tokens, network.context_dim)
        if not network.context_tokens:
            return
        if given is None or tuple(given.shape) != wanted:
            what = "no text" if given is None else f"text of {list(given.shape)}"
            raise ValueError(
                f"{self.config.preset!r} takes text of {list(wanted)}, but data {self.config.data!r} has {what}; data "
                "with text is extracted by U-ViT's scripts and named mscoco256_features:FOLDER"
            )
        if self.config.sample_every:
            raise ValueError("no samples are drawn during a training on text; set sample_every to 0")

    def turns(self, step: int) -> list[float]:
        """The widths whose losses are summed in update `step`: [1.0], or for a slimmable network the full, the smallest
        and a random one between (the sandwich rule: Yu and Huang, ICCV 2019, arXiv 1903.05134, as in DDSM)."""
        if not self.config.widths:
            return [1.0]
        smallest, *between, _ = self.model.config.widths
        drawn = random.Random(f"{self.config.seed} {step}").choices(between) if between else []
        return [1.0, smallest, *drawn]

    def inputs(self, step: int, part: int = 0, turn: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """This process's inputs for part `part` of `accumulate` of update `step`: x, t, labels or text, and target, as
        `Objective.forward` takes them. Every turn (width) has the same images, with other times and noise."""
        config, model = self.config, self.config.model
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        drawn = {"generator": generator, "device": "cpu"}
        pick = torch.randint(len(self.data), (config.batch,), **drawn)
        drop = torch.rand(config.batch, dtype=torch.float32, **drawn) < config.label_drop
        u = torch.rand(config.batch, dtype=torch.float64, **drawn)
        t, alpha, sigma = self.model.schedule.training_levels(u)
        noise = torch.randn(config.batch, *self.model.backbone.sample_shape, dtype=torch.float32, **drawn)
        first = (self.processes.rank * config.accumulate + part) * self._part
        own = slice(first, first + self._part)
        x0, labels = self._batch(pick, own, generator)
        if self.data.moments:
            fresh = torch.randn(noise.shape, dtype=torch.float32, **drawn)[own]
            x0 = draw_latents(x0, fresh, model.latent_scale, model.latent_shift)
        for _ in range(turn):
            u = torch.rand(config.batch, dtype=torch.float64, **drawn)
            t, alpha, sigma = self.model.schedule.training_levels(u)
            noise = torch.randn(noise.shape, dtype=torch.float32, **drawn)
        if model.network.context_tokens:
            labels = torch.where(drop[own, None, None], cast(CaptionedMoments, self.data).empty_context, labels)
        elif not model.network.num_classes:
            labels = None
        elif model.null_label is not None:
            labels = labels.masked_fill(drop[own], model.null_label)
        noise, alpha, sigma = noise[own], alpha[own, None, None, None], sigma[own, None, None, None]
        x, target = alpha * x0 + sigma * noise, target_of(model.prediction_type, x0, noise, alpha, sigma)
        device = self.processes.device
        return x.to(device), t[own].to(device), None if labels is None else labels.to(device), target.to(device)

    def _batch(self, pick: Tensor, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        if not self.config.model.network.context_tokens:
            return self.data.batch(pick[own])
        caption = torch.rand(self.config.batch, generator=generator, dtype=torch.float32, device="cpu")
        return cast(CaptionedMoments, self.data).batch(pick[own], caption[own])

    def update(self) -> dict[str, Tensor]:
        """One optimizer step. Returns this process's loss terms. Raises FloatingPointError, with the weights unchanged,
        if a loss or gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        whole, turns = self._means(), self.turns(self.step)
        narrow = []
        for turn, width in enumerate(turns[1:], start=1):
            for part in range(self.config.accumulate):
                with self.processes.apart(self.objective):
                    narrow.append(self._backward(part, whole, turn, width))
        parts = []
        for part in range(1, self.config.accumulate):
            with self.processes.apart(self.objective):
                parts.append(self._backward(part, whole))
        parts.append(self._backward(0, whole))
        terms = {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}
        if narrow:
            simple = torch.stack([part["simple"] for part in narrow]).view(len(turns) - 1, -1)
            terms["narrow"] = simple.mean(1)
        norm = nn.utils.clip_grad_norm_(self.trained, MOST_NORM)
        if not bool(torch.isfinite(norm)):  # gradients are averaged, so this sees a non-finite loss of any process
            raise FloatingPointError(
                f"the loss is {float(terms['loss'])} and the gradient's norm {float(norm)} at step {self.step}; "
                "nothing was changed and the last checkpoint is kept"
            )
        self._whole = False
        self.optimizer.step()
        self.step += 1
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))  # a short average while the weights move fast
        for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            if value.requires_grad:
                mean.lerp_(value.detach(), 1 - decay)
        self._whole = True
        return terms

    def _means(self) -> Tensor | None:
        """`Objective.means` over the whole batch, [2, L]; None if the loss does not need them, or the batch has a
        single part."""
        parts = self.config.accumulate
        if self.config.loss not in OF_WHOLE_BATCHES or self.model.exits is None or parts * self.processes.world == 1:
            return None
        return self.processes.mean(
            torch.stack([self._own.means(*self.inputs(self.step, part)) for part in range(parts)]).mean(0)
        )

    def _backward(self, part: int, whole: Tensor | None, turn: int = 0, width: float = 1.0) -> dict[str, Tensor]:
        loss, terms = self.objective(*self.inputs(self.step, part, turn), whole, width)
        (loss / self.config.accumulate).backward()
        return {"loss": loss.detach(), **terms}

    def run(self, progress: bool = True) -> Path:
        """Trains to the end, saving at intervals and when interrupted. Returns the path of the averaged model."""
        _check_process()
        config = self.config
        weights, trained = (sum(v.nbytes for v in values) for values in (self.model.parameters(), self.trained))
        self.folder.check_space(2 * weights + 2 * trained)  # weights, their average, the optimizer's moments
        self.folder.start_logs(self.step)
        hidden = not (progress and self.processes.main)
        bar = tqdm(total=config.steps, initial=self.step, disable=hidden, unit="step", dynamic_ncols=True)
        try:
            with bar:
                while self.step < config.steps:
                    started = time.perf_counter()
                    terms = self.update()
                    if not hidden:
                        bar.set_postfix(simple=f"{float(terms['simple']):.4f}")
                    self.seconds += time.perf_counter() - started
                    bar.update()
                    if self.step % config.log_every == 0:
                        self._log(terms)
                    if config.sample_every and self.step % config.sample_every == 0:
                        self.folder.draw(self.step, copy.deepcopy(self.average).cpu().eval())
                    if self.step % config.save_every == 0:
                        self.save()
        except (KeyboardInterrupt, OSError) as error:
            if self._whole:  # else keep the last checkpoint
                with suppress(OSError) if isinstance(error, OSError) else nullcontext():
                    self.save()
            raise
        finally:
            self.folder.close()
        self.save()
        return self.folder.path / MODEL

    def save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        numbers = {"step": self.step, "seconds": self.seconds, "network_sha256": fingerprint(self.model.backbone)}
        if self._start is not None:
            numbers["start_sha256"] = self._start
        self.folder.save(tensors, numbers, self.average)

    def _resume(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        file = str(self.folder.path / STATE)
        if numbers.get("start_sha256", self._start) != self._start:
            raise ValueError(
                f"{self.folder.path} holds a run that began with other weights of {self.config.init}; choose another "
                "folder, or give --force to begin anew"
            )
        for key, value in tensors.items():
            group, _, name = key.partition(".")
            if group not in groups:
                raise ValueError(f"{file} is damaged: unexpected {key}")
            groups[group][name] = value
        checkpoint.load_strictly(self.model, groups["model"], file)
        checkpoint.load_strictly(self.average, groups["average"], file)
        if numbers["step"]:
            self._load_moments(groups["optimizer"], file)
        self.step, self.seconds = numbers["step"], numbers["seconds"]

    def _load_moments(self, tensors: dict[str, Tensor], file: str) -> None:
        """Loads AdamW's moments of every parameter that has had a gradient."""
        if not tensors:
            raise ValueError(f"{file} is damaged: the optimizer's moments are missing")
        keys, state = checkpoint.Keys(tensors), self.optimizer.state_dict()
        for index, parameter in enumerate(self.trained):
            shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            if any(f"{index}.{name}" in keys for name in shapes):
                state["state"][index] = {name: keys.take(f"{index}.{name}", shape) for name, shape in shapes.items()}
        keys.finish(file)
        self.optimizer.load_state_dict(state)

    def _log(self, terms: dict[str, Tensor]) -> None:
        row = {name: self.processes.mean(value).tolist() for name, value in terms.items()}
        self.folder.log(self.step, {"seconds": round(self.seconds, 1), **row})


def start_model(config: TrainConfig) -> Model:
    """The model at step 0: fresh, or with the network of `config.init`, which the recipe "frozen" freezes.

    Exits of the checkpoint are kept if they have the same settings; otherwise they are new, with heads copied from the
    network's head. Raises ValueError for a checkpoint of another network, and for a network larger than this machine's
    memory.
    """
    _check_memory(config)
    model = Model(config.model)
    if not config.init:
        if config.start == "linear":
            start_as_linear(model.backbone)
        return model
    found = checkpoint.load(config.init)
    ours, theirs = config.model.to_dict(), found.config.to_dict()
    keys = ("family", "schedule", "null_label", "prediction_type", *(["widths"] if config.recipe == "frozen" else []))
    differing = [key for key in keys if ours.get(key) != theirs.get(key)]
    values = [f"{key}: {theirs.get(key)}, the configuration asks for {ours.get(key)}" for key in differing]
    if ours["family"] == theirs["family"]:
        sizes, asked = dataclasses.asdict(found.config.network), dataclasses.asdict(config.model.network)
        values += [f"{k}: {v}, the configuration asks for {asked[k]}" for k, v in sizes.items() if asked[k] != v]
    if values:
        raise ValueError(
            f"{config.init} holds another network, choose preset and network to fit it. {'; '.join(values)}"
        )
    checkpoint.load_strictly(model.backbone, found.backbone.state_dict(), config.init)
    if model.exits is not None:
        if found.exits is not None and found.config.exits == config.model.exits:
            model.exits.load_state_dict(found.exits.state_dict())
        else:
            model.exits.copy_heads(model.backbone)
    if config.recipe == "frozen":
        model.backbone.requires_grad_(False)
    return model


def _check_process() -> None:
    """ValueError for global PyTorch settings that would change weights, moments or gradients."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32 or device.type != "cpu":
        raise ValueError(
            f"training needs the defaults of PyTorch, float32 and cpu, got {dtype} and {device}; "
            "torch.set_default_dtype and torch.set_default_device change them"
        )
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ValueError("training needs gradients; leave torch.no_grad() or torch.inference_mode() before it")


def _check_memory(config: TrainConfig) -> None:
    with torch.device("meta"):
        weights = sum(value.numel() for value in Model(config.model).parameters())
    memory, needed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 8 * weights  # float32: weights, average
    if needed > memory:
        raise ValueError(
            f"this network has {weights / 1e9:,.1f} billion weights; training it takes more than the "
            f"{memory / 1e9:,.1f} GB of memory of this machine; choose smaller network settings"
        )


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of names and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
