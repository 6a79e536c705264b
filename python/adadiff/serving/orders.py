"""Orders: requests checked against the model and the limits, with sampling parameters for each image."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..diffusion.schedules import NoiseSchedule
from ..diffusion.solvers import solver_from
from ..diffusion.tables import Solver
from ..policies.estimated import EstimatedReuse
from ..policies.parts import Parts
from ..sampling.params import SamplingParams
from .allowed import policy_of
from .bodies import ImageRequest
from .errors import ServiceError, invalid, shown
from .served import ServedModel
from .settings import Settings

SEED_BITS = 32  # of random seeds, which every client reads exactly, JavaScript included
_RANDOM = random.Random()  # independent of the global generator, which the program may seed


@dataclass(frozen=True)
class Order:
    """previews: number for each image of a stream. png: whether the reply is the bytes of a PNG file."""

    model: ServedModel
    params: tuple[SamplingParams, ...]  # one for each image
    seed: int  # of the first image
    steps: int
    policy: str
    solver: str
    guidance_scale: float
    stream: bool
    previews: int
    png: bool


async def order_of(
    asked: ImageRequest,
    served: ServedModel,
    settings: Settings,
    presets: Mapping[str, str],
    accept: str | None = None,
) -> Order:
    """The order for a request. presets: the operator's policies that this model can follow. accept: the request's
    header. Raises ServiceError, which names the field, for anything that the model or the limits exclude."""
    n = 1 if asked.n is None else asked.n
    policy = policy_of(asked.policy, served.model, presets)
    usual_steps, usual_solver = _usual(policy, settings)
    steps = usual_steps if asked.num_inference_steps is None else asked.num_inference_steps
    scale = 1.0 if asked.guidance_scale is None else asked.guidance_scale
    _check_limit("n", n, settings.max_images)
    _check_limit("num_inference_steps", steps, settings.max_steps)
    _check_limit("guidance_scale", scale, settings.max_guidance_scale)
    if asked.size not in (None, "auto", served.size):
        raise invalid(f"{served.name} draws images of {served.size}, got size {shown(asked.size)}", "size")
    if scale != 1 and not served.takes_guidance:
        raise invalid(f"{served.name} was not trained for guidance; leave guidance_scale out", "guidance_scale")
    if scale != 1 and served.engine.capacity < 2:
        raise invalid("guidance takes two lanes of an engine, and this one has a single lane", "guidance_scale")
    seed = _RANDOM.getrandbits(SEED_BITS) if asked.seed is None else asked.seed
    if seed + n > 2**63:
        raise invalid(f"seed must be below 2^63 for every image, got {seed} for the first of {n}", "seed")
    stream, previews, png = _form(asked, n, settings, accept)
    solver = usual_solver if asked.solver is None else asked.solver
    _check_solver(solver, served, steps)
    _check_estimates(policy, solver, steps)
    condition = await _condition(asked, served)
    params = tuple(
        SamplingParams(
            seed=seed + i,
            steps=steps,
            solver=solver,
            policy=policy,
            guidance_scale=scale,
            **condition,
        )
        for i in range(n)
    )
    named = asked.policy if asked.policy in presets else str(policy)
    return Order(served, params, seed, steps, named, solver, scale, stream, previews, png)


def model_of(name: str | None, models: Mapping[str, ServedModel]) -> ServedModel:
    """The model of that name; None: the first. ServiceError (404, as in OpenAI's API) for an unknown name."""
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        message = f"there is no model {shown(name)}; there are {', '.join(models)}"
        raise ServiceError(404, message, "model_not_found", "model")
    return models[name]


def _check_limit(param: str, value: float, most: float) -> None:
    if value > most:
        raise invalid(f"{param} must be at most {most:g} here, got {shown(value)}", param, "limit_exceeded")


def _form(asked: ImageRequest, n: int, settings: Settings, accept: str | None) -> tuple[bool, int, bool]:
    """Whether the reply is a stream, the number of previews of each image, and whether the reply is a PNG file."""
    stream, previews = bool(asked.stream), asked.partial_images or 0
    png = asked.response_format == "png"
    if asked.response_format is None and not stream and accept is not None:
        png = any(part.partition(";")[0].strip().lower() == "image/png" for part in accept.split(","))
    if png and stream:
        raise invalid("a stream has events, not the bytes of a picture; leave response_format out", "response_format")
    if png and n != 1:
        raise invalid(f"a PNG reply is one image; n must be 1, got {n}", "n")
    if previews and not stream:
        raise invalid("previews come in a stream; give stream: true with partial_images", "partial_images")
    _check_limit("partial_images", previews, settings.max_partial_images)
    return stream, previews, png


def _check_solver(text: str, served: ServedModel, steps: int) -> None:
    try:
        solver = solver_from(text, own=False)
    except ValueError as error:
        raise invalid(str(error), "solver") from None
    try:
        _check_table(solver, served.model.schedule, steps)
    except ValueError as error:
        raise invalid(f"solver {shown(text)} with {steps} steps: {error}", "num_inference_steps") from None


def _usual(policy: Parts, settings: Settings) -> tuple[int, str]:
    """Steps and solver of a request that names none. Estimated errors hold for certain ones."""
    if isinstance(policy.reuse, EstimatedReuse):
        return policy.reuse.estimates.steps, policy.reuse.estimates.solver
    return settings.steps, "ddim"


def _check_estimates(policy: Parts, solver: str, steps: int) -> None:
    """Estimated errors hold for one solver and number of steps. The operator's file name is not shown."""
    if not isinstance(policy.reuse, EstimatedReuse):
        return
    wanted = policy.reuse.estimates
    if solver_from(solver, own=False) != solver_from(wanted.solver, own=False) or steps != wanted.steps:
        field = "num_inference_steps" if steps != wanted.steps else "solver"
        raise invalid(
            f"this policy is for num_inference_steps {wanted.steps} and solver {wanted.solver}, got {steps} and "
            f"{shown(solver)}",
            field,
        )


@lru_cache(maxsize=1024)
def _check_table(solver: Solver, schedule: NoiseSchedule, steps: int) -> None:
    solver.table(schedule, steps)


async def _condition(asked: ImageRequest, served: ServedModel) -> dict[str, Any]:
    """Sampling parameters for the class or the text of a request. ServiceError for one that does not fit the model."""
    prompt, label, classes = asked.prompt or None, asked.class_label, served.model.config.classes
    if served.takes_text:
        if label is not None:
            raise invalid(f"{served.name} takes text; give prompt and leave class_label out", "class_label")
        if prompt is None:
            raise invalid(f"{served.name} takes text; give prompt", "prompt", "missing_field")
        text, null = await served.contexts(prompt)
        if not bool(torch.isfinite(text).all()):
            raise ServiceError(500, "the text encoder made NaN or infinity of the prompt", "not_finite", "prompt")
        return {"text_embeds": text, "null_text_embeds": null}
    labels = f"class_label, 0 to {classes - 1}" if classes else "no prompt: it takes neither text nor classes"
    if prompt is not None:
        if label is not None:
            raise invalid("give either prompt or class_label", "prompt")
        if not served.class_names:
            raise invalid(f"{served.name} takes no text; give {labels}", "prompt")
        if prompt.strip().lower() not in served.class_names:
            names = ", ".join(served.class_names[:32])
            raise invalid(f"{served.name} takes no text; give {labels}, or a prompt that names one: {names}", "prompt")
        label = served.class_names.index(prompt.strip().lower())
    if label is None:
        if classes and served.model.config.null_label is None:
            raise invalid(f"{served.name} needs {labels}", "class_label", "missing_field")
        return {}
    if not label < classes:
        given = f"give {labels}" if classes else "leave class_label out: the model has no classes"
        raise invalid(f"{served.name}: {given}, got {shown(label)}", "class_label")
    return {"class_labels": label}
