"""The number of steps of each sample, including steps="auto"."""

import torch
from torch import Tensor

from ..diffusion.solvers import solver_from
from ..model import Model
from ..policies.step_selector import AUTO
from .params import SamplingParams, per_sample


def steps_of(model: Model, params: SamplingParams, context: Tensor | None, guidance: Tensor) -> Tensor:
    """The number of steps of each sample, int64 [n]. context: labels int64 [n] or text [n, N, E], of the conditional
    lanes; guidance: float32 [n], guidance_scale - 1. Raises ValueError if steps are "auto" and the model has no step
    selector, or one trained for another solver or guidance."""
    if not isinstance(params.steps, str):
        return per_sample("steps", params.steps, len(guidance), torch.int64)
    selector = model.step_selector
    if selector is None:
        raise ValueError(f"steps={AUTO!r} needs a model with a step selector; `adadiff train-steps` trains one")
    config = selector.config
    if params.solver != solver_from(config.solver):
        raise ValueError(f"the step selector was trained for solver {config.solver!r}, got {params.solver}")
    trained = torch.tensor(config.guidance_scale - 1, dtype=torch.float32, device="cpu")
    if not bool((guidance == trained).all()):
        raise ValueError(
            f"the step selector was trained for guidance_scale {config.guidance_scale:g}, got {params.guidance_scale}"
        )
    if params.guidance_interval is not None:
        raise ValueError(f"the step selector was trained without guidance_interval; leave it out, or steps={AUTO!r}")
    if config.num_classes and params.class_labels is None:
        raise ValueError(f"steps={AUTO!r} chooses steps by class; give class_labels")
    return selector.choose(context)
