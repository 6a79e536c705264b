"""`enable`, `disable` and `summary`: adaptive compute per sample in an existing diffusers pipeline, in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import load
from ..model import Model
from ..policies.calibrated import Calibration
from ..policies.calibrated_cache import CalibratedCache
from ..policies.exits import Depth, Full
from ..policies.interface import ExitPolicy
from ..policies.reuse import CachedRest, Reuse, ReusePolicy
from ..policies.spelling import reuse_or_exit_policy_from
from ..uem import Exits
from . import early_exit
from .calibrated_file import ENDING, check_fits, load_cache
from .early_exit import EarlyExit
from .private import check_version
from .record import ReuseRecord
from .reuse import ReusedTransformer, can_reuse


def enable(
    pipe: Any,
    policy: str | Path | ExitPolicy | ReusePolicy = "cache:threshold=0.08",
    *,
    exits: Exits | Model | str | Path | None = None,
    blocks: Sequence[str] | None = None,
    tied: bool = False,
    fused: bool = False,
) -> ReuseRecord | EarlyExit:
    """Enables `policy` for each sample of `pipe` on its own; what it skips is not computed.

    pipe: a diffusers pipeline (all its transformers) or one transformer.
    policy: "full", "cache:threshold=0.08" (first-block cache), "reuse:every=2", and "exit:depth=8" (blocks after the
    eighth run in the sample's first step only; their contribution is reused) need no training; a path to a file of
    `calibrate` (.json). Other "exit:" policies, and "exit:depth" with `exits`, are for a DiTPipeline and need exits
    trained for its transformer. See `adadiff.policies`. exits: these, or the model that has them, or its file, with
    whose calibration "exit:budget=" and "exit:table=" work.
    blocks: names of the transformer's block lists, if they are not found. tied: the halves of a guided batch [2B]
    decide together. fused: run a copy of a DiT's weights in our DiT, see `early_exit`.
    Returns a record that every call adds to; for several transformers, that of the first.
    Raises ValueError before anything is changed: no transformer, unknown blocks, already enabled, another cache
    enabled, a policy that does not fit. Problems that only a call can show raise ValueError in that call. Raises
    ImportError for an unsupported version of diffusers.
    """
    check_version()
    if isinstance(policy, Path) or (isinstance(policy, str) and policy.endswith(ENDING)):
        policy = load_cache(policy)
    exits, calibration = _exits_of(exits)
    policy = reuse_or_exit_policy_from(policy, calibration)
    transformers = _transformers(pipe)
    if isinstance(policy, CalibratedCache) and len(transformers) > 1:
        raise ValueError(f"'{policy}' is for one transformer, this pipeline has {', '.join(transformers)}")
    for name, transformer in transformers.items():
        if enabled(transformer) is not None or early_exit.record_of(transformer) is not None:
            raise ValueError(f"{name} is enabled already; call disable first")
    if isinstance(policy, ExitPolicy) and (exits is not None or fused or not isinstance(policy, Depth | Full)):
        if blocks is not None or tied:
            raise ValueError(f"policy '{policy}' does not take blocks or tied")
        return early_exit.enable_early_exit(pipe, policy, exits, fused=fused)
    if exits is not None or fused:
        raise ValueError(f"policy '{policy}' does not take exits or fused")
    spelled = str(policy)
    if isinstance(policy, Full):
        policy = Reuse(every=1)
    if isinstance(policy, Depth):
        if policy.threshold != int(policy.threshold):
            raise ValueError(f"policy '{policy}' without exits takes a whole number of blocks")
        policy = CachedRest(int(policy.threshold))
    if isinstance(policy, Reuse) and policy.level != "block":
        raise ValueError(f"policy '{policy}': pipelines support level=block only")
    if policy.needs_steps_left and getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"policy '{policy}' counts steps from the end, which needs a pipeline with its scheduler")
    made: list[ReusedTransformer] = []
    owner = None if isinstance(pipe, nn.Module) else pipe
    try:
        for name, transformer in transformers.items():
            made.append(ReusedTransformer(transformer, policy, spelled, name, blocks, tied, owner))
            if isinstance(policy, CalibratedCache):
                check_fits(policy, pipe, transformer, made[-1].record.num_blocks, tied)
    except ValueError:
        for one in made:
            one.remove()
        raise
    return made[0].record


def _exits_of(given: Exits | Model | str | Path | None) -> tuple[Exits | None, Calibration | None]:
    """The exits, and the calibration of their model. Raises ValueError for a model without exits, and for anything
    else."""
    if given is None or isinstance(given, Exits):
        return given, None
    if isinstance(given, str | Path):
        given = load(given)
    if not isinstance(given, Model):
        raise ValueError(f"exits are an adadiff.Model that has some, or its file, got {type(given).__name__}")
    if given.exits is None:
        raise ValueError("the model given for exits has none")
    return given.exits, given.calibration


def disable(pipe: Any) -> None:
    """Undoes `enable`. Raises ValueError if `pipe` is not enabled."""
    undone = False
    for transformer in _transformers(pipe).values():
        reused = enabled(transformer)
        if reused is not None:
            reused.remove()
        elif early_exit.record_of(transformer) is not None:
            early_exit.disable_early_exit(transformer)
        else:
            continue
        undone = True
    if not undone:
        raise ValueError(f"{type(pipe).__name__} is not enabled")


def summary(pipe: Any) -> str:
    """A text about each enabled transformer: which lanes ran all blocks at which step of the latest run, the share of
    blocks skipped in all calls, seconds. Raises ValueError if none is enabled."""
    texts = []
    for transformer in _transformers(pipe).values():
        reused = enabled(transformer)
        if reused is not None:
            texts.append(reused.record.summary())
        elif (record := early_exit.record_of(transformer)) is not None:
            texts.append(record.summary())
    if not texts:
        raise ValueError(f"{type(pipe).__name__} is not enabled")
    return "\n".join(texts)


def enabled(transformer: nn.Module) -> ReusedTransformer | None:
    return getattr(transformer, "_adadiff", None)


def transformers_in(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline, by name."""
    parts = getattr(pipe, "components", None) or {}
    named = {name: part for name, part in parts.items() if "transformer" in name and isinstance(part, nn.Module)}
    first = [name for name in named if name.startswith("transformer")]
    others = [name for name in named if name not in first and can_reuse(named[name])]
    found: dict[str, nn.Module] = {}
    for name in first + others:
        if not any(named[name] is module for module in found.values()):  # one module may have two names
            found[name] = named[name]
    return found


def _transformers(pipe: Any) -> dict[str, nn.Module]:
    """By name: `pipe` itself if it is a transformer, else those of the pipeline. Raises ValueError if there is none, or
    one is compiled as a whole."""
    found = {type(pipe).__name__: pipe} if isinstance(pipe, nn.Module) else transformers_in(pipe)
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no transformer")
    for name, module in found.items():
        compiled = module._compiled_call_impl is not None and enabled(module) is None
        if compiled or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{name} is compiled as a whole; compile its blocks: transformer.compile_repeated_blocks()"
            )
    return found
