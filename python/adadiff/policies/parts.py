"""The policy of one sample: at most one part of each kind. In text, parts are joined by +, as in
"cache:threshold=0.1+exit:budget=0.55"."""

from dataclasses import dataclass, fields

from .cascade import Cascade
from .exits import Full
from .interface import ExitPolicy
from .reuse import ReusePolicy
from .width import Width

FULL = Full()
Part = ExitPolicy | ReusePolicy | Width | Cascade


@dataclass(frozen=True)
class Parts:
    """exit: after which block a lane exits. reuse: when a lane reuses features of an earlier step. width: the share of
    heads and MLP channels it runs. cascade: a student draws first, a teacher improves some images."""

    exit: ExitPolicy = FULL
    reuse: ReusePolicy | None = None
    width: Width | None = None
    cascade: Cascade | None = None

    @staticmethod
    def of(*parts: Part) -> "Parts":
        """Raises ValueError for two parts of one kind, and for anything that is not a part."""
        found: dict[str, Part] = {}
        for part in parts:
            kind = _kind(part)
            if kind in found:
                raise ValueError(f"a sample follows one {kind} policy, got '{found[kind]}' and '{part}'")
            found[kind] = part
        return Parts(**found)

    @property
    def only_exits(self) -> bool:
        return self.reuse is None and self.width is None and self.cascade is None

    @property
    def asks(self) -> bool:
        """Whether the policy may skip work within a step (by exits or reuse)."""
        return not isinstance(self.exit, Full) or self.reuse is not None

    def __str__(self) -> str:
        given = [getattr(self, field.name) for field in fields(self)]
        named = [str(part) for part in given if part is not None and not isinstance(part, Full)]
        return "+".join(named) if named else "full"


_KINDS = {"exit": ExitPolicy, "reuse": ReusePolicy, "width": Width, "cascade": Cascade}


def _kind(part: object) -> str:
    for name, kind in _KINDS.items():
        if isinstance(part, kind):
            return name
    raise ValueError(f"{part!r} is no policy; there are {', '.join(kind.__name__ for kind in _KINDS.values())}")
