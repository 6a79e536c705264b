"""Policies as text: POLICIES lists the spelling of each part; parts of different kinds are joined by +, see
joining.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..spelling import Entry, Registry
from .calibrated import Calibration
from .cascade import Cascade
from .estimated_file import estimated_from
from .exits import BatchMean, Depth, Full, Patience, Threshold
from .interface import ExitPolicy
from .joining import split_parts
from .parts import Part, Parts
from .reuse import BatchCache, Cache, Reuse, ReusePolicy
from .width_file import width_from

Policy = str | Part | Parts | Sequence[str | Part]
DEFAULT = "full"  # no work is skipped unless a policy is given


@dataclass(frozen=True)
class Calibrated:
    """A policy that needs the model's calibration: thresholds (kind "budget") or depths ("table") for a share of the
    work."""

    share: float
    kind: str

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError("a share of the work lies in (0, 1]")

    def of(self, calibration: Calibration | None) -> ExitPolicy:
        if calibration is None:
            known = f"`adadiff calibrate MODEL --budget {self.share:g} --out FILE`"
            raise ValueError(f"this model is not calibrated; {known}")
        return calibration.policy(self.kind, self.share)


def _full() -> Full:
    return Full()


def _budget(share: float) -> Calibrated:
    return Calibrated(share, "budget")


def _table(share: float) -> Calibrated:
    return Calibrated(share, "table")


def _layers(text: str) -> tuple[int, int]:
    """FIRST-LAST, or one layer."""
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise ValueError(f"layers must be FIRST-LAST, got {text!r}") from None


_UNCERTAINTY, _BLOCKS = {"threshold": "THRESHOLD", "min_layer": "LAYER"}, {"first": "BLOCKS", "last": "BLOCKS"}
POLICIES: Registry[Part | Calibrated] = Registry(
    "policy",
    (
        Entry("full", _full),
        Entry("exit", Threshold, "threshold", bare=True, words=_UNCERTAINTY),
        Entry("exit", _budget, "share", "budget", words={"share": "SHARE"}),
        Entry("exit", _table, "share", "table", words={"share": "SHARE"}),
        Entry("exit", Patience, "threshold", "patience", words=_UNCERTAINTY),
        Entry("exit", Depth, "threshold", "depth", words={"threshold": "BLOCKS"}),
        Entry("exit", BatchMean, "threshold", "batch-mean", words=_UNCERTAINTY),
        Entry("cache", Cache, "threshold", words={"threshold": "CHANGE", "gate": "residual|input", **_BLOCKS}),
        Entry("cache", BatchCache, "threshold", "batch", words={"threshold": "CHANGE", **_BLOCKS}),
        Entry(
            "reuse",
            Reuse,
            "every",
            readers={"layers": _layers},
            words={
                "every": "STEPS", "level": "block|layer|unit", "unit": "attention|cross|mlp", "layers": "FIRST-LAST",
                "dense_early": "STEPS", "dense_late": "STEPS",
            },
        ),
        Entry(
            "estimate", estimated_from, "path", path=True, words={"path": "FILE", "share": "SHARE", "by": "sample|step"}
        ),
        Entry("width", width_from, "text", path=True, words={"text": "SHARE|FILE"}),
        Entry(
            "cascade",
            Cascade,
            "path",
            path=True,
            words={"path": "FILE", "share": "SHARE", "mode": "refine|regenerate", "sigma": "NOISE"},
        ),
    ),
    Part,
)  # fmt: skip


def parts_from(policy: Policy, calibration: Calibration | None = None) -> Parts:
    """The `Parts` of a policy given as objects or text. calibration: of the model, for "exit:budget=" and
    "exit:table=".

    Raises ValueError for text that is not a policy, for two parts of one kind, for a share that the model is not
    calibrated for, and for files and classes that cannot be read.
    """
    check_policy(policy)
    if isinstance(policy, Parts):
        return policy
    given = split_parts(policy) if isinstance(policy, str) else [policy] if isinstance(policy, Part) else policy
    return Parts.of(*(_part(one, calibration) for one in given))


def check_policy(policy: object) -> None:
    """Raises ValueError unless `policy` is a policy, text, or a list of these."""
    one = str | Part
    several = isinstance(policy, list | tuple) and policy and all(isinstance(part, one) for part in policy)
    if not (isinstance(policy, one | Parts) or several):
        raise ValueError(
            f"a policy is an ExitPolicy, another part, several of different kinds, or text such as 'exit:0.1', "
            f"got {policy!r}"
        )


def policy_from(policy: Policy, calibration: Calibration | None = None) -> ExitPolicy:
    """The exit policy of a policy without other parts; see `parts_from`. Raises ValueError for policies with others."""
    parts = parts_from(policy, calibration)
    if not parts.only_exits:
        raise ValueError(f"only exit policies can be used here; policy '{parts}' is for `sample` and `Engine`")
    return parts.exit


def reuse_or_exit_policy_from(policy: str | Part, calibration: Calibration | None = None) -> ExitPolicy | ReusePolicy:
    """A policy of one part, an exit or a reuse policy. Raises ValueError for others."""
    part = _part(policy, calibration)
    if not isinstance(part, ExitPolicy | ReusePolicy):
        known = POLICIES.forms("full", "exit", "cache", "reuse")
        raise ValueError(f"policy '{part}' is for adadiff's own models; there are {known}")
    return part


def _part(policy: str | Part, calibration: Calibration | None) -> Part:
    if isinstance(policy, Part):
        return policy
    if not isinstance(policy, str):
        raise ValueError(f"a policy is text such as 'exit:0.1' or an ExitPolicy, got {policy!r}")
    if policy.startswith(("width:", "estimate:")):  # may name a file, whose content may change: not cached
        return POLICIES.read(policy)
    found = _spelled(policy)
    if not isinstance(found, Calibrated):
        return found
    try:
        return found.of(calibration)
    except ValueError as error:
        raise ValueError(f"cannot use policy {policy!r}: {error}") from None


@lru_cache(maxsize=256)
def _spelled(policy: str) -> Part | Calibrated:
    return POLICIES.read(policy)
