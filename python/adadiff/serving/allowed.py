"""Policies that clients may ask for. Only the operator may use policies that import code or open files."""

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch

from ..model import Model
from ..policies.estimated import EstimatedReuse
from ..policies.exits import Depth
from ..policies.parts import Parts
from ..policies.spelling import parts_from
from ..sampling.params import SamplingParams
from ..sampling.sample_batch import SampleBatch
from .errors import invalid, shown
from .settings import DEFAULT_PRESET

KINDS = ("exit", "cache", "reuse")
REUSE = {"cache:threshold=0.1": "cache:threshold=CHANGE", "reuse:every=2": "reuse:every=STEPS"}  # example -> form
FORMS = "full, exit:..., cache:..., reuse:..., joined by +"


def policy_of(text: str | None, model: Model, presets: Mapping[str, str]) -> Parts:
    """The policy for a client's `policy` field. presets: the operator's, as far as they fit this model.

    Raises ServiceError for anything that is neither a preset nor made of KINDS. This is checked before parsing, because
    "module:Class" imports code, and "cascade:FILE", "estimate:FILE" and "width:FILE" open files.
    """
    if text is None:
        text = DEFAULT_PRESET if DEFAULT_PRESET in presets else "full"
    if text in presets:
        return _preset(presets[text], model)
    for part in text.split("+"):
        kind, colon, _ = part.partition(":")
        if part != "full" and not (colon and kind in KINDS):
            named = f", and {', '.join(presets)}" if presets else ""
            raise invalid(f"policy {shown(text)} is not served; there are {FORMS}{named}", "policy")
    if not text.isascii():
        raise invalid(f"policy {shown(text)} is not ASCII", "policy")
    try:
        parts = _fitting(text, model)
    except ValueError as error:
        raise invalid(" ".join(str(error).split()), "policy") from None
    if parts.exit.whole_batch or (parts.reuse is not None and parts.reuse.whole_batch):
        raise invalid(
            f"policy {shown(text)} decides for all requests at once, so that an image would depend on those of others; "
            "it is not served",
            "policy",
        )
    return parts


@lru_cache(maxsize=256)
def _preset(text: str, model: Model) -> Parts:
    """Read once, so that a file may go while the service runs."""
    return parts_from(text, model.calibration)


@lru_cache(maxsize=256)
def _fitting(text: str, model: Model) -> Parts:
    parts = parts_from(text, model.calibration)
    check_fit(parts, model)
    return parts


def check_fit(parts: Parts, model: Model) -> None:
    """ValueError for a policy that this model cannot follow."""
    if isinstance(parts.exit, Depth) and parts.exit.threshold > model.num_layers:
        raise ValueError(f"policy '{parts}': this network has {model.num_layers} blocks; give a smaller depth")
    given: dict[str, Any] = {"steps": 1}
    if isinstance(parts.reuse, EstimatedReuse):  # works with these only
        known = parts.reuse.estimates
        given = {"steps": known.steps, "solver": known.solver}
        if model.config.null_label is not None:
            given["guidance_scale"] = known.guidance_scale  # else a warning says that there was another one
    SampleBatch.of(model, 1, SamplingParams(seed=0, policy=parts, **given, **blank_condition(model)))


def blank_condition(model: Model) -> dict[str, Any]:
    """A placeholder class or text that the model takes, for test runs."""
    network = model.config.network
    if network.context_tokens:
        return {"text_embeds": torch.zeros(network.context_tokens, network.context_dim, device="cpu").float()}
    return {"class_labels": 0} if model.config.classes else {}


def presets_for(
    model: Model, presets: Mapping[str, str], shallow: bool = False, max_steps: int | None = None
) -> dict[str, str]:
    """The presets that this model can follow. shallow: a shallow model replaces it at noisy timesteps, which excludes
    width policies and estimated errors. max_steps: the most that clients may ask for; errors that were estimated for
    more are excluded, too."""
    found = {}
    for name, text in presets.items():
        try:
            parts = _preset(text, model)
            check_fit(parts, model)
        except ValueError:
            continue
        estimates = parts.reuse.estimates if isinstance(parts.reuse, EstimatedReuse) else None
        if shallow and (parts.width is not None or estimates is not None):
            continue
        if estimates is None or max_steps is None or estimates.steps <= max_steps:
            found[name] = text
    return found


def forms_for(model: Model) -> list[str]:
    """Forms of policies that fit this model, for people to choose from, with each calibrated share."""
    forms = ["full", "exit:depth=BLOCKS"]
    if model.exits is not None:
        forms += ["exit:THRESHOLD", "exit:patience=THRESHOLD"]
    for trial, form in REUSE.items():
        with suppress(ValueError):
            _fitting(trial, model)
            forms.append(form)
    if model.calibration is not None:
        forms += [f"exit:{kind}={b.share:g}" for kind in ("budget", "table") for b in model.calibration.budgets]
    return forms
