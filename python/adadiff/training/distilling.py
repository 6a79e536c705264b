"""Makes a cascade for a model: a few-step student by progressive distillation, an oracle that tells its images from
real ones, and the quantiles of its scores."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import checkpoint
from ..data.datasets import Dataset
from ..model import Model
from ..policies.cascade import MODES, check_share, check_sigma
from ..sampling.cascade_file import QUANTILES, CascadeSettings
from ..sampling.oracle import Oracle, OracleConfig
from ..sampling.sampler import sample
from .discriminator import Labelled, train_oracle
from .progressive import halve, step_pairs

SOLVER = "ddim"
MOST_REAL = 20_000  # images that the oracle is trained on
SEED_OF_SAMPLES = 10**9  # far from the seeds of other commands


@dataclass(frozen=True)
class DistillConfig:
    """steps: of the student; its first teacher takes steps x 2^halvings. updates: optimizer updates of each halving.
    samples: images of the student that the oracle learns from; as many others give the quantiles of its scores. share,
    mode, sigma: defaults of the cascade, as in `Cascade`. Raises ValueError for invalid values."""

    steps: int = 4
    halvings: int = 2
    updates: int = 1000
    batch: int = 64
    lr: float = 5e-4
    label_drop: float = 0.1
    oracle_updates: int = 1500
    samples: int = 4000
    share: float = 0.3
    mode: str = "refine"
    sigma: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"steps": 500, "halvings": 9, "updates": 10**7, "batch": 10**5, "oracle_updates": 10**7}
        limits |= {"samples": 10**6, "seed": 10**9}
        least = {"seed": 0, "samples": 100}
        for name, most in limits.items():
            value, low = getattr(self, name), least.get(name, 1)
            if type(value) is not int or not low <= value <= most:
                raise ValueError(f"{name} must be an integer from {low} to {most:,}, got {value!r}")
        if self.steps << self.halvings > 1000:
            raise ValueError(
                f"{self.halvings} halvings to {self.steps} steps begin with more than 1,000; give fewer of either"
            )
        if not 0 < self.lr < 1 or not 0 <= self.label_drop < 1:
            raise ValueError(f"lr must lie in (0, 1), label_drop in [0, 1), got {self.lr!r} and {self.label_drop!r}")
        check_share(self.share)
        check_sigma(self.sigma)
        if self.mode not in MODES:
            raise ValueError(f"mode must be {' or '.join(MODES)}, got {self.mode!r}")

    @property
    def all_steps(self) -> list[int]:
        """Numbers of steps of the students, in the order in which they are trained."""
        return [self.steps << k for k in reversed(range(self.halvings))]


class Distilling:
    """Distillation of `model` into a cascade, resumable after each halving.

    state: file of the last finished student, which `load` reads; with the same settings, `run` continues from it.
    identity: describes model and data; stored in `state`, where it has to agree, and in `notes`.

    Raises ValueError, before any work, where model, data and settings do not fit together, and for a state of other
    settings unless `force`.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        config: DistillConfig,
        state: Path,
        identity: dict[str, object],
        force: bool = False,
    ):
        self.data, self.config, self.state = data, config, state
        self._identity = {**identity, **dataclasses.asdict(config)}
        _check(model, data, config)
        self.student = plain(model)
        self.left = config.all_steps
        for steps in self.left:
            step_pairs(model.schedule, steps)
        if state.exists():
            self._resume(force)

    def run(
        self, on_update: Callable[[str, int, float], None] = lambda *_: None
    ) -> tuple[Model, Oracle, CascadeSettings]:
        """Returns student, oracle and settings. on_update: called with the stage, the number of updates made and the
        loss. If interrupted, `state` holds the student of the last finished halving."""
        config = self.config
        while self.left:
            steps = self.left[0]
            self.student = halve(
                self.student,
                self.data,
                steps,
                updates=config.updates,
                batch=config.batch,
                lr=config.lr,
                label_drop=config.label_drop if self.student.config.null_label is not None else 0.0,
                seed=config.seed * 1009 + steps,
                on_update=lambda k, loss, steps=steps: on_update(f"{2 * steps} to {steps} steps", k, loss),
            )
            self.left = self.left[1:]
            self._save()
        oracle, self.held_out_auc, self.oracle_update = self._oracle()
        scores = self._scores(oracle)
        quantiles = np.quantile(scores.double().numpy(), np.linspace(0.01, 0.99, QUANTILES))
        defaults = {"share": config.share, "mode": config.mode, "sigma": config.sigma}
        settings = CascadeSettings(config.steps, SOLVER, quantiles=tuple(quantiles.tolist()), **defaults)
        return self.student, oracle, settings

    @property
    def notes(self) -> dict[str, object]:
        """Settings and results of the distillation, for the file; available after `run`."""
        return {**self._identity, "oracle_auc": round(self.held_out_auc, 4), "oracle_update": self.oracle_update}

    def _oracle(self) -> tuple[Oracle, float, int]:
        network, config = self.student.config.network, self.config
        index = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(config.seed), device="cpu")
        images, labels = self.data.batch(index[:MOST_REAL])
        classes = self.student.config.classes if network.num_classes else 0
        described = OracleConfig(network.channels, network.image_size, classes)
        real = Labelled(images, labels if classes else None)
        found = train_oracle(described, real, self._drawn(0), updates=config.oracle_updates, seed=config.seed)
        return found.oracle, found.held_out_auc, found.update

    @torch.no_grad()
    def _scores(self, oracle: Oracle) -> Tensor:
        """Scores of images that the oracle was not trained on, [samples]."""
        drawn = self._drawn(self.config.samples)
        return oracle(drawn.images, drawn.labels)

    def _drawn(self, first: int) -> Labelled:
        """Images of the student, with class labels drawn from the data. first: offset of the seeds."""
        n, seed = self.config.samples, self.config.seed
        generator, labels = torch.Generator().manual_seed(seed * 1009 + first + 1), None
        if self.student.config.network.num_classes:
            labels = self.data.batch(torch.randint(len(self.data), (n,), generator=generator, device="cpu"))[1]
        params = {"steps": self.config.steps, "solver": SOLVER, "class_labels": labels, "seed": SEED_OF_SAMPLES + first}
        images, _ = sample(self.student, n, batch=256, **params)
        return Labelled(images, labels)

    def _save(self) -> None:
        checkpoint.save(self.student, self.state, {**self._identity, "left": self.left})

    def _resume(self, force: bool) -> None:
        notes = checkpoint.read_tensors(self.state)[1].get("notes", {})
        left = notes.pop("left", None)
        if notes != self._identity or not isinstance(left, list) or left != self.left[len(self.left) - len(left) :]:
            if force:
                return
            raise ValueError(
                f"{self.state} was left by a distillation with other settings; remove it, or --force begins anew"
            )
        student = checkpoint.load(self.state, self.student.device)
        checkpoint.load_strictly(self.student, student.state_dict(), str(self.state))
        self.left = left


def plain(model: Model) -> Model:
    """A copy of the network, float32, without its exits."""
    made = Model(dataclasses.replace(model.config, exits=None)).to(model.device)
    checkpoint.load_strictly(made.backbone, model.backbone.state_dict(), "the model to distill")
    return made.eval().requires_grad_(False)


def _check(model: Model, data: Dataset, config: DistillConfig) -> None:
    network, shape = model.config.network, tuple(model.backbone.sample_shape)
    if network.context_tokens:
        raise ValueError("distillation takes class-conditional or unconditional models; this one takes text")
    if data.moments:
        raise ValueError("distillation takes images; this data set holds latents")
    if tuple(data.shape) != shape or (network.num_classes and not 1 <= data.classes <= model.config.classes):
        raise ValueError(
            f"the data is {'x'.join(map(str, data.shape))} in {data.classes} classes, but the model draws "
            f"{'x'.join(map(str, shape))} in {model.config.classes}"
        )
    if len(data) < 10:
        raise ValueError(f"an oracle cannot learn from {len(data)} images; give 10 or more")
