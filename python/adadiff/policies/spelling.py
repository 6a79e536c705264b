"""Policies as text: "full", "exit:0.135,min_layer=3", "exit:budget=0.55", "exit:table=0.55", "exit:patience=0.08",
"exit:depth=8", "exit:batch-mean=0.07", "cache:threshold=0.08", "cache:batch=0.08", "reuse:every=2", "width:FILE",
"cascade:FILE", one of somebody's own as "module:Class"; parts of different kinds joined by +."""

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache

from .calibrated import Calibration
from .cascade import Cascade
from .exits import BatchMean, Depth, Full, Patience, Threshold
from .interface import ExitPolicy
from .parts import Part, Parts
from .reuse import BatchCache, Cache, Reuse, ReusePolicy

Policy = str | Part | Parts | Sequence[str | Part]
DEFAULT = "full"  # nothing is left out unless somebody asks for it
FORMS = (
    "full, exit:THRESHOLD, exit:budget=SHARE and exit:table=SHARE (calibrated models), exit:patience=THRESHOLD, "
    "exit:depth=BLOCKS, exit:batch-mean=THRESHOLD"
)
REUSE_FORMS = (
    "cache:threshold=CHANGE[,first=BLOCKS][,last=BLOCKS][,gate=residual|input], cache:batch=CHANGE[,first=BLOCKS], "
    "reuse:every=STEPS[,level=block|layer|unit][,unit=attention|mlp][,layers=FIRST-LAST][,dense_early=STEPS]"
    "[,dense_late=STEPS]"
)
OWN_FORM = "module:Class[:name=value,...], a policy of your own"
_KINDS = {"threshold": Threshold, "patience": Patience, "depth": Depth, "batch-mean": BatchMean}


def parts_from(policy: Policy, calibration: Calibration | None = None) -> Parts:
    """What a sample follows, or what is spelled so. calibration: of the model, for "exit:budget=" and "exit:table=".

    Raises ValueError for text that is no policy, for two parts of one kind, for a share that the model is not
    calibrated for, and for files and classes that cannot be read.
    """
    check_policy(policy)
    if isinstance(policy, Parts):
        return policy
    given = policy.split("+") if isinstance(policy, str) else [policy] if isinstance(policy, Part) else policy
    return Parts.of(*(_part(one, calibration) for one in given))


def check_policy(policy: object) -> None:
    """ValueError for what is neither a policy nor text, nor several of them."""
    one = str | Part
    several = isinstance(policy, list | tuple) and policy and all(isinstance(part, one) for part in policy)
    if not (isinstance(policy, one | Parts) or several):
        raise ValueError(
            f"a policy is an ExitPolicy, another part, several of different kinds, or text such as 'exit:0.1', "
            f"got {policy!r}"
        )


def policy_from(policy: Policy, calibration: Calibration | None = None) -> ExitPolicy:
    """As `parts_from`, of policies by which lanes exit alone; ValueError for others."""
    parts = parts_from(policy, calibration)
    if not parts.only_exits:
        raise ValueError(f"here only exits can be decided; policy '{parts}' is for `sample` and `Engine`")
    return parts.exit


def reuse_or_exit_policy_from(policy: str | Part, calibration: Calibration | None = None) -> ExitPolicy | ReusePolicy:
    """One part that leaves or reuses; ValueError for others."""
    part = _part(policy, calibration)
    if not isinstance(part, ExitPolicy | ReusePolicy):
        raise ValueError(f"policy '{part}' is for adadiff's own models; there are {FORMS}, {REUSE_FORMS}")
    return part


def _part(policy: str | Part, calibration: Calibration | None) -> Part:
    if isinstance(policy, Part):
        return policy
    if not isinstance(policy, str):
        raise ValueError(f"a policy is text such as 'exit:0.1' or an ExitPolicy, got {policy!r}")
    found = _spelled(policy)
    if not isinstance(found, tuple):
        return found
    kind, share = found
    try:
        if calibration is None:
            raise ValueError(f"this model is not calibrated; `adadiff calibrate MODEL --budget {share:g} --out FILE`")
        return calibration.policy(kind, share)
    except ValueError as error:
        raise ValueError(f"cannot use policy {policy!r}: {error}. There are {FORMS}") from None


@lru_cache(maxsize=256)
def _spelled(policy: str) -> Part | tuple[str, float]:
    """The policy, or what it asks of a calibration: "budget" or "table", and the share."""
    if policy == "full":
        return Full()
    part, colon, text = policy.partition(":")
    if colon and part in _REUSE:
        return _reuse_policy(policy, part, text)
    if colon and part == "cascade":
        return Cascade(text)
    if colon and part == "width":
        raise ValueError(f"unknown policy {policy!r}")
    if colon and part not in ("exit", "full") and _names_a_class(part, text):
        return _own(policy, part, text)
    if part != "exit" or not colon:
        raise ValueError(f"unknown policy {policy!r}; there are {FORMS}, {REUSE_FORMS}, {OWN_FORM}")
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


def _names_a_class(module: str, text: str) -> bool:
    return all(name.isidentifier() for name in (*module.split("."), text.partition(":")[0]))


def _own(policy: str, module: str, text: str) -> Part:
    """Of somebody's own: "module:Class" or "module:Class:name=value,...", values being numbers, true, false or text."""
    name, _, settings = text.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        known = f"{FORMS}, {REUSE_FORMS}, {OWN_FORM}"
        raise ValueError(f"unknown policy {policy!r}: there is no module {module!r}; there are {known}") from None
    except AttributeError:
        raise ValueError(f"cannot use policy {policy!r}: module {module!r} has no {name!r}") from None
    given = [setting.partition("=") for setting in settings.split(",")] if settings else []
    try:
        made = kind(**{key: _value(value) for key, _, value in given})
    except TypeError as error:
        raise ValueError(f"cannot use policy {policy!r}: {error}") from None
    if not isinstance(made, Part):
        raise ValueError(f"cannot use policy {policy!r}: {name} is no ExitPolicy, ReusePolicy or Width")
    return made


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _layers(text: str) -> tuple[int, int]:
    """FIRST-LAST, or one layer."""
    first, dash, last = text.partition("-")
    return int(first), int(last if dash else first)


# Of "cache:" and "reuse:": the class, the option it has to have, and how each option is read.
_REUSE: dict[str, tuple[type[ReusePolicy], str, dict[str, Callable[[str], object]]]] = {
    "cache": (Cache, "threshold", {"threshold": float, "first": int, "last": int, "gate": str}),
    "cache:batch": (BatchCache, "batch", {"batch": float, "first": int}),
    "reuse": (
        Reuse,
        "every",
        {"every": int, "level": str, "dense_early": int, "dense_late": int, "unit": str, "layers": _layers},
    ),
}


def _reuse_policy(policy: str, part: str, text: str) -> ReusePolicy:
    kind, required, options = _REUSE["cache:batch" if part == "cache" and "batch=" in text else part]
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
                wanted = "FIRST-LAST" if name == "layers" else "a number"
                raise ValueError(f"{name} must be {wanted}, got {value!r}") from None
        if required not in values:
            raise ValueError(f"{part} needs {required}")
        return kind(values.pop(required), **values)  # type: ignore[call-arg]
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
