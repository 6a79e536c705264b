"""The sampling parameters of a request."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ..diffusion.solvers import solver_from
from ..diffusion.tables import Solver
from ..policies.parts import Parts
from ..policies.spelling import DEFAULT, Policy, check_policy
from ..policies.step_selector import AUTO

Numbers = Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class SamplingParams:
    """Sampling parameters: for most of them one value for all samples, or a sequence with one for each. Checked on
    construction as far as possible without a model, and against the model before any work.

    seed: in [0, 2^63); a sample depends on its seed, not on its batch. One number: sample i has seed + i; None: 0.
    class_labels: None: no class (the null class). text_embeds: float [N, E] for all, or [n, N, E], for models that take
    text; null_text_embeds: [N, E], of the empty prompt, needed for guidance.
    steps: network evaluations, or "auto": chosen by the model's step selector from label or text (see
    `adadiff train-steps`). solver: "ddim", "ddim:ETA", "ddpm", "dpm++2m", "unipc", "heun" (two evaluations a step),
    "dpm-fast", "dpm++fast", "euler-maruyama", "flow-euler" (settings: see `solver_from`) or a Solver.
    policy: "full", "exit:0.135,min_layer=3", "exit:patience=0.08", "exit:depth=8", "exit:batch-mean=0.07"; for a
    calibrated model "exit:budget=0.55" and "exit:table=0.55"; an ExitPolicy; "cache:threshold=0.1", "reuse:every=2" or
    a ReusePolicy, which reuse features of earlier steps; or several parts joined by +, see `parts_from`. With
    "cascade:FILE,share=0.3", steps, solver and guidance are the teacher's.
    thresholds: replace the exit policy's. guidance_scale: uncond + guidance_scale (cond - uncond), as in diffusers; 1:
    no guidance. guidance_interval: (low, high), or [n, 2], in the network's time 0..1000; outside it there is no
    guidance, and no unconditional lane is run. guided_channels: the number of leading channels that are guided (None:
    as the model was published).
    tied: the two lanes of a guided sample exit together, by the larger uncertainty, and reuse only if both may.
    init_image: float [C, H, W] for all, or [n, C, H, W], images to start from; strength: in (0, 1], the share of the
    steps that is then run (None: 0.8), as in diffusers' image-to-image (SDEdit). A singlestep solver starts with a
    whole step, so it may run an evaluation or two more.
    record_scores: record every computed uncertainty in the report.
    Raises ValueError for anything else, naming what was given.
    """

    seed: int | Sequence[int] | Tensor | None = None
    class_labels: int | Sequence[int] | Tensor | None = None
    text_embeds: Tensor | None = None
    null_text_embeds: Tensor | None = None
    steps: int | Sequence[int] | Tensor | str = 50
    solver: str | Solver = "ddim"
    policy: Policy | Parts = DEFAULT
    thresholds: float | Numbers | None = None
    guidance_scale: float | Numbers = 1.0
    guidance_interval: Numbers | None = None
    guided_channels: int | Sequence[int] | Tensor | None = None
    tied: bool = False
    init_image: Tensor | None = None
    strength: float | Numbers | None = None
    record_scores: bool = False

    def __post_init__(self) -> None:
        check_policy(self.policy)
        if isinstance(self.solver, str):
            object.__setattr__(self, "solver", solver_from(self.solver))
        elif not hasattr(self.solver, "table"):
            raise ValueError(f"a solver is a Solver or text such as 'ddim', got {self.solver!r}")
        for name in ("tied", "record_scores"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("seed", "class_labels", "guided_channels"):
            _check_numbers(name, getattr(self, name), whole=True)
        if not isinstance(self.steps, str):
            _check_numbers("steps", self.steps, whole=True, least=1)
        elif self.steps != AUTO:
            raise ValueError(f"steps must be a number, one for each sample or {AUTO!r}, got {self.steps!r}")
        elif self.init_image is not None:
            raise ValueError(f"steps={AUTO!r} is learnt for samples from noise; with init_image give a number")
        _check_numbers("seed", self.seed, whole=True, least=0)
        for name in ("thresholds", "guidance_scale", "strength"):
            _check_numbers(name, getattr(self, name))
        if self.strength is not None:
            strength = as_tensor(self.strength).flatten()
            if not bool(((strength > 0) & (strength <= 1)).all()):
                raise ValueError(f"strength must lie in (0, 1], got {strength.tolist()[:8]}")
            if self.init_image is None:
                raise ValueError("strength needs init_image; give that, too")
        for name in ("text_embeds", "null_text_embeds", "init_image"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
                raise ValueError(f"{name} must be a float tensor, got {_shown(value)}")
            if value is not None and value.is_meta:
                raise ValueError(f"{name} must hold values; tensors on device 'meta' hold none")

    @staticmethod
    def of(params: "SamplingParams | None", settings: dict[str, Any]) -> "SamplingParams":
        """`params` with `settings` replaced by name; both may be absent. Raises ValueError for an unknown name."""
        names = [field.name for field in dataclasses.fields(SamplingParams)]
        if unknown := [name for name in settings if name not in names]:
            raise ValueError(f"unknown setting {', '.join(unknown)}; there are {', '.join(names)}")
        if params is None:
            return SamplingParams(**settings)
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {_shown(params)}")
        return dataclasses.replace(params, **settings) if settings else params


FLOAT32_MAX: float = torch.finfo(torch.float32).max
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def is_plain(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a finite Python number. A shortcut for the usual request: each call of PyTorch may hand the
    interpreter to the engine's thread, which slows a server down."""
    return (type(value) is int and -(2**63) <= value < 2**63) or (type(value) is float and math.isfinite(value))


def as_tensor(value: object) -> Tensor:
    """`torch.as_tensor` on the CPU, with Python numbers as int64 or float32, whatever PyTorch's defaults are."""
    tensor = torch.as_tensor(value, device="cpu")
    if tensor.dtype in UNSIGNED:  # PyTorch does little with them
        tensor = tensor.long()
        if bool((tensor < 0).any()):
            raise ValueError("whole numbers must be below 2^63")
    if tensor.is_floating_point() and not isinstance(value, Tensor | np.ndarray | np.generic):
        return torch.as_tensor(value, dtype=torch.float32, device="cpu")
    return tensor


def per_sample(name: str, value: object, n: int, dtype: torch.dtype) -> Tensor:
    """A new tensor [n] from one number for all samples, or one for each. Raises ValueError for another length."""
    if is_plain(value) and abs(value) <= FLOAT32_MAX:
        kept = torch.float32 if isinstance(value, float) else torch.int64
        return torch.full((n,), value, dtype=kept, device="cpu").to(dtype)  # type: ignore[call-overload]
    given = as_tensor(value).detach()
    if given.ndim == 0:
        given = given.expand(n)
    if given.shape != (n,):
        raise ValueError(f"{name} must be one number, or one for each sample, {n}, got shape {list(given.shape)}")
    return given.to(dtype, copy=True)


def _check_numbers(name: str, value: object, whole: bool = False, least: float = -math.inf) -> None:
    """Raises ValueError unless `value` is None, a finite number, or a sequence or tensor [n] of them."""
    if value is None or (is_plain(value) and not (whole and isinstance(value, float)) and float(value) >= least):
        return
    try:
        given = as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be a number or one for each sample, got {_shown(value)}: {error}") from None
    if given.ndim > 1:
        raise ValueError(f"{name} must be a number or one for each sample, got shape {list(given.shape)}")
    integer = not given.dtype.is_floating_point and given.dtype != torch.bool
    if given.dtype == torch.bool or given.is_complex() or (whole and not integer and given.numel()):
        raise ValueError(f"{name} must be {'whole ' if whole else ''}numbers, got {_shown(value)}")
    if not bool(torch.isfinite(given).all()):
        raise ValueError(f"{name} must be finite, got {_shown(value)}")
    if given.numel() and float(given.min()) < least:
        raise ValueError(f"{name} must be at least {least:g}, got {given.min().item()}")


def _shown(value: object) -> str:
    return f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
