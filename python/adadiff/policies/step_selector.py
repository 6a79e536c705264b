"""Chooses the number of steps of a sample once, from its label or prompt: steps="auto".

After AdaDiff, Adaptive Step Selection for Fast Diffusion (Zhang et al., AAAI 2025, arXiv 2311.14768): a small network
reads the condition and scores candidate numbers of steps; the best one is used. Training: calibration/step_policy.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.solvers import solver_from

AUTO = "auto"  # in place of a number of steps
MOST_STEPS = 1000
MOST_CANDIDATES = 64
TEXT_CHANNELS = 64  # inside the network that reads prompts


@dataclass(frozen=True)
class Ratio:
    """The selector's error relative to a baseline with as many steps on average, and its 95 % interval."""

    error: float  # of the baseline, root mean square
    ratio: float | None  # selector over baseline; None if the baseline's error is 0
    low: float | None
    high: float | None


@dataclass(frozen=True)
class MeasuredSteps:
    """A selector measured on held-out noise, against the images of the largest number of steps."""

    n: int
    mean_steps: float
    error: float  # root mean squared difference of the images
    low: float  # ends of its 95 % interval
    high: float
    above_bar: float  # share of the samples whose error is above `SelectorConfig.bar`
    fixed_steps: int  # the mean number of steps, rounded up
    fixed: Ratio  # baseline: fixed_steps for all samples
    random: Ratio  # baseline: the selector's numbers of steps, permuted among the samples


@dataclass(frozen=True)
class SelectorConfig:
    """Configuration of a step selector. candidates: numbers of steps to choose from, ascending.

    Reads labels (num_classes: their number) or text (context_dim: channels of its tokens); the other one is 0. bar,
    penalty: see `rewards`. Raises ValueError for invalid values."""

    candidates: tuple[int, ...]
    solver: str
    guidance_scale: float
    num_classes: int
    context_dim: int
    bar: float
    penalty: float
    n: int
    seed: int
    measured: MeasuredSteps | None = None

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        for name in ("guidance_scale", "bar", "penalty"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"a step selector's {name} is a finite number, got {value!r}")
        for name in ("num_classes", "context_dim", "n", "seed"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"a step selector's {name} is a whole number, got {value!r}")
        if (self.num_classes > 0) == (self.context_dim > 0):
            raise ValueError("a step selector reads labels or text: one of num_classes and context_dim is above 0")
        if not isinstance(self.solver, str):
            raise ValueError(f"a step selector's solver is text, got {self.solver!r}")
        solver_from(self.solver, own=False)  # from a file of others
        if self.measured is not None:
            _check_measured(self.measured)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "SelectorConfig":
        """The configuration of `to_dict`, also after a round trip through JSON. Raises ValueError for anything else."""
        try:
            measured = values["measured"]
            if measured is not None:
                measured = MeasuredSteps(**{**measured, **{k: Ratio(**measured[k]) for k in ("fixed", "random")}})
            return cls(**{**values, "candidates": tuple(values["candidates"]), "measured": measured})
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no step selector: {error}") from None


class LabelScores(nn.Module):
    """A score for every class and candidate: labels int64 [n] -> [n, K]."""

    def __init__(self, num_classes: int, candidates: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_classes, candidates, dtype=torch.float32, device="cpu"))

    def forward(self, labels: Tensor) -> Tensor:
        return self.table[labels]


class TextScores(nn.Module):
    """Attention with one learnt query pools the tokens, and an MLP scores the candidates: text [n, N, E] -> [n, K].
    (The paper uses three self-attention layers.) All scores are 0 before training."""

    def __init__(self, context_dim: int, candidates: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(TEXT_CHANNELS, dtype=torch.float32, device="cpu"))
        self.norm = nn.LayerNorm(context_dim)
        self.key = nn.Linear(context_dim, TEXT_CHANNELS)
        self.value = nn.Linear(context_dim, TEXT_CHANNELS)
        self.hidden = nn.Linear(TEXT_CHANNELS, TEXT_CHANNELS)
        self.head = nn.Linear(TEXT_CHANNELS, candidates)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, text: Tensor) -> Tensor:
        tokens = self.norm(text)
        weight = (self.key(tokens) @ self.query / TEXT_CHANNELS**0.5).softmax(1)
        pooled = (weight[:, :, None] * self.value(tokens)).sum(1)
        return self.head(nn.functional.gelu(self.hidden(pooled)))


class StepSelector:
    """Chooses numbers of steps. scores: `LabelScores` or `TextScores`.

    Not a submodule of the model it belongs to: it stays on the CPU and computes in float64 from float32 weights,
    whatever device and dtype the model has. So the number of steps depends on the condition alone."""

    def __init__(self, config: SelectorConfig, scores: nn.Module):
        self.config = config
        self.scores = scores.cpu().float().double().requires_grad_(False).eval()

    @property
    def steps_of_classes(self) -> list[int] | None:
        """The number of steps for each label; None if it reads text."""
        labels = torch.arange(self.config.num_classes, device="cpu")
        return self.choose(labels).tolist() if self.config.num_classes else None

    @torch.no_grad()
    def choose(self, context: Tensor) -> Tensor:
        """Returns numbers of steps, int64 [n]; fewer steps win ties. context: labels int64 [n], or text [n, N, E].

        Samples are scored one by one, so that rounding does not depend on n."""
        candidates = torch.tensor(self.config.candidates, dtype=torch.int64, device="cpu")
        context = context.detach().cpu()
        context = context.double() if context.is_floating_point() else context
        best = [int(self.scores(one[None])[0].argmax()) for one in context]
        return candidates[torch.tensor(best, dtype=torch.int64, device="cpu")]

    def tensors(self) -> dict[str, Tensor]:
        """The weights for a file, float32."""
        return {name: value.float() for name, value in self.scores.state_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        """The selector with its weights, as JSON values."""
        return {"config": self.config.to_dict(), "weights": {name: v.tolist() for name, v in self.tensors().items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StepSelector":
        """The selector of `to_dict`, bit for bit. Raises ValueError for anything else."""
        try:
            config, given = SelectorConfig.from_dict(values["config"]), dict(values["weights"])
            weights = {name: torch.tensor(v, dtype=torch.float32, device="cpu") for name, v in given.items()}
            with torch.device("cpu"):
                scores = new_scores(config)
            scores.load_state_dict(weights)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"this is no step selector: {error}") from None
        return cls(config, scores)


def new_scores(config: SelectorConfig) -> nn.Module:
    """Untrained scores on the default device; `TextScores` is initialised at random."""
    if config.num_classes:
        return LabelScores(config.num_classes, len(config.candidates))
    return TextScores(config.context_dim, len(config.candidates))


def check_candidates(candidates: Sequence[int]) -> None:
    """Raises ValueError unless candidates are 2 to 64 ascending numbers of steps in 1..1000."""
    wrong = [c for c in candidates if type(c) is not int or not 1 <= c <= MOST_STEPS]
    if wrong or not 2 <= len(candidates) <= MOST_CANDIDATES or list(candidates) != sorted(set(candidates)):
        raise ValueError(
            f"candidates are 2 to {MOST_CANDIDATES} numbers of steps in 1..{MOST_STEPS}, rising, got "
            f"{list(candidates)[:8]}"
        )


def _check_measured(measured: MeasuredSteps) -> None:
    """Raises ValueError for a field of the wrong type, as in a damaged file."""
    needed = (measured.mean_steps, measured.error, measured.low, measured.high, measured.above_bar)
    needed += (measured.fixed.error, measured.random.error)
    ends = [end for one in (measured.fixed, measured.random) for end in (one.ratio, one.low, one.high)]
    if any(type(v) not in (int, float) for v in (*needed, *(end for end in ends if end is not None))):
        raise ValueError("a step selector's measurement has a value of another type where it needs a number")
    if any(type(v) is not int or abs(v) >= 2**63 for v in (measured.n, measured.fixed_steps)):
        raise ValueError("a step selector's measurement has a value of another type where it needs a whole number")
