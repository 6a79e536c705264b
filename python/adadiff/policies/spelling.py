"""Policies as text: "full", "exit:0.135,min_layer=3", "exit:budget=0.55", "exit:table=0.55", "exit:patience=0.08",
"exit:depth=8", "exit:batch-mean=0.07"; for pipelines of diffusers "cache:threshold=0.08", "reuse:every=2"."""

from collections.abc import Callable
from functools import lru_cache

from .calibrated import Calibration
from .exits import BatchMean, Depth, Full, Patience, Threshold
from .interface import ExitPolicy
from .reuse import Cache, Reuse, ReusePolicy

DEFAULT = "full"  # nothing is left out unless somebody asks for it
FORMS = (
    "full, exit:THRESHOLD, exit:budget=SHARE and exit:table=SHARE (calibrated models), exit:patience=THRESHOLD, "
    "exit:depth=BLOCKS, exit:batch-mean=THRESHOLD"
)
REUSE_FORMS = (
    "cache:threshold=CHANGE[,first=BLOCKS][,last=BLOCKS][,gate=residual|input], "
    "reuse:every=STEPS[,level=block|layer|unit][,dense_early=STEPS][,dense_late=STEPS]"
)
_KINDS = {"threshold": Threshold, "patience": Patience, "depth": Depth, "batch-mean": BatchMean}


def policy_from(policy: ExitPolicy | str, calibration: Calibration | None = None) -> ExitPolicy:
    """A policy, or the one that is spelled so. calibration: of the model, for "exit:budget=" and "exit:table=".

    Raises ValueError for text that is no policy, for a share that the model is not calibrated for, and for policies
    that reuse earlier steps, which are for pipelines of diffusers (`reuse_or_exit_policy_from`).
    """
    found = reuse_or_exit_policy_from(policy, calibration)
    if isinstance(found, ReusePolicy):
        raise ValueError(
            f"policy '{found}' reuses earlier steps, which is for pipelines of diffusers for now: "
            "adadiff.enable(pipe, policy)"
        )
    return found


def reuse_or_exit_policy_from(
    policy: ExitPolicy | ReusePolicy | str, calibration: Calibration | None = None
) -> ExitPolicy | ReusePolicy:
    """As `policy_from`, with those that reuse earlier steps."""
    if isinstance(policy, ExitPolicy | ReusePolicy):
        return policy
    if not isinstance(policy, str):
        raise ValueError(f"a policy is an ExitPolicy or text such as 'exit:0.1', got {policy!r}")
    found = _spelled(policy)
    if isinstance(found, ExitPolicy | ReusePolicy):
        return found
    kind, share = found
    try:
        if calibration is None:
            raise ValueError(f"this model is not calibrated; `adadiff calibrate MODEL --budget {share:g} --out FILE`")
        return calibration.policy(kind, share)
    except ValueError as error:
        raise ValueError(f"cannot use policy {policy!r}: {error}. There are {FORMS}") from None


@lru_cache(maxsize=256)
def _spelled(policy: str) -> ExitPolicy | ReusePolicy | tuple[str, float]:
    """The policy, or what it asks of a calibration: "budget" or "table", and the share."""
    if policy == "full":
        return Full()
    part, colon, text = policy.partition(":")
    if part in _REUSE and colon:
        return _reuse_policy(policy, part, text)
    if part != "exit" or not colon:
        raise ValueError(f"unknown policy {policy!r}; there are {FORMS}")
    first, *rest = text.split(",")
    kind, value = first.split("=", 1) if "=" in first else ("threshold", first)
    try:
        if kind in ("budget", "table"):
            return kind, _share(kind, _number(value), rest)
        if kind not in _KINDS:
            raise ValueError(f"there is no {kind!r}")
        return _KINDS[kind](_number(value), **_options(kind, rest))
    except ValueError as error:
        raise ValueError(f"cannot use policy {policy!r}: {error}. There are {FORMS}") from None


# Of "cache:" and "reuse:": the class, the option it has to have, and how each option is read.
_REUSE: dict[str, tuple[type[Cache] | type[Reuse], str, dict[str, Callable[[str], object]]]] = {
    "cache": (Cache, "threshold", {"threshold": float, "first": int, "last": int, "gate": str}),
    "reuse": (Reuse, "every", {"every": int, "level": str, "dense_early": int, "dense_late": int}),
}


def _reuse_policy(policy: str, part: str, text: str) -> ReusePolicy:
    kind, required, options = _REUSE[part]
    values: dict[str, object] = {}
    try:
        for option in text.split(","):
            name, equals, value = option.partition("=")
            if not equals or name not in options:
                raise ValueError(f"{part} takes no {option!r}")
            if name in values:
                raise ValueError(f"{name} is given twice")
            try:
                values[name] = options[name](value)
            except ValueError:
                raise ValueError(f"{name} must be a number, got {value!r}") from None
        if required not in values:
            raise ValueError(f"{part} needs {required}")
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"cannot use policy {policy!r}: {error}. There are {REUSE_FORMS}") from None


def _share(kind: str, share: float, rest: list[str]) -> float:
    if rest:
        raise ValueError(f"{kind} takes no {rest[0].split('=')[0]!r}")
    if not 0 < share <= 1:
        raise ValueError("a share of the work lies in (0, 1]")
    return share


def _options(kind: str, rest: list[str]) -> dict[str, int | bool]:
    """min_layer=K, for policies that read u; patience=0 or 1, for "batch-mean"."""
    options: dict[str, int | bool] = {}
    for text in rest:
        name, _, value = text.partition("=")
        if name == "patience" and kind == "batch-mean" and name not in options:
            if value not in ("0", "1"):
                raise ValueError(f"patience must be 0 or 1, got {value!r}")
            options[name] = value == "1"
            continue
        if name != "min_layer" or kind == "depth" or name in options:
            raise ValueError(f"{kind} takes no {name!r}" if name not in options else f"{name} is given twice")
        if not value.isdecimal():
            raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
        options[name] = int(value)
    return options


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
