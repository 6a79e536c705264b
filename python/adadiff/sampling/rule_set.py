"""The rules of the samples in flight."""

import dataclasses

from torch import Tensor

from ..policies.exit_policies import Rule


class RuleSet:
    """Rules in use. Those that differ in nothing but their threshold, which is kept by sample, are one kind."""

    def __init__(self) -> None:
        self._index: dict[object, int] = {}
        self.kinds: list[Rule] = []

    def __len__(self) -> int:
        return len(self.kinds)

    def add(self, rule: Rule) -> int:
        index = self._index.setdefault(self._kind(rule), len(self.kinds))
        if index == len(self.kinds):
            self.kinds.append(rule)
        return index

    def keep(self, used: Tensor) -> Tensor:
        """Forgets all but the kinds used: int64 [n]. Returns their new indices, int64 [n]."""
        kept, index = used.unique(return_inverse=True)
        self.kinds = [self.kinds[i] for i in kept.tolist()]
        self._index = {self._kind(rule): i for i, rule in enumerate(self.kinds)}
        return index

    @staticmethod
    def _kind(rule: Rule) -> object:
        if not dataclasses.is_dataclass(rule):
            return rule
        settings = ((f.name, getattr(rule, f.name)) for f in dataclasses.fields(rule) if f.name != "threshold")
        return type(rule), *settings
