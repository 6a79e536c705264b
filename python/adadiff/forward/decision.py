"""What all lanes' rules decide together, asked by row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adadiff_kernels import upload

from ..policies.exit_policies import Limits, Rule, below, layers_asked


class Decision:
    """Asks every running lane's own rule after a block, and gathers by row what that rule reads.

    rules: those in use; which: int64 [B], each lane's index into them, or None where there is but one.
    t, threshold: float [B]. Raises ValueError where a rule refuses its lanes' thresholds or asks nobody. Values that
    lie on a GPU are not checked: that would wait for it.
    """

    def __init__(self, rules: Sequence[Rule], which: Tensor | None, layers: int, t: Tensor, threshold: Tensor | None):
        if which is None and len(rules) != 1:
            raise ValueError(f"{len(rules)} rules need `which`, the index of each lane's own")
        if which is not None and (which.dtype != torch.int64 or which.shape != t.shape):
            raise ValueError(
                f"which must be int64 [{len(t)}], one rule per lane, got {which.dtype} {list(which.shape)}"
            )
        if which is not None and which.is_cpu and not bool(((which >= 0) & (which < len(rules))).all()):
            raise ValueError(f"which must lie in [0, {len(rules)}), the rules given")
        if threshold is not None and threshold.shape != t.shape:
            raise ValueError(f"threshold must be one number per lane, {tuple(t.shape)}, got {tuple(threshold.shape)}")
        self._rules = [(rule, layers_asked(rule, layers)) for rule in rules]
        self._which, self._layers, self._t = which, layers, t
        self.asked = frozenset().union(*(asked for _, asked in self._rules))
        self.scored = frozenset().union(*(asked for rule, asked in self._rules if rule.scored))
        self.threshold = self._thresholds(threshold)  # float [B], NaN where a rule has none
        self._state = torch.zeros(len(t), device=t.device)
        self._by_row: tuple[Tensor, Tensor, Tensor] | None = None  # until somebody leaves
        self.limits: Tensor | None = (
            None  # float32 [layers - 1, B], see `Limits`; made by `to`, for rules that have them
        )

    @property
    def by_lane(self) -> bool:
        """Whether no rule looks at the whole batch."""
        return all(getattr(rule, "by_lane", True) for rule, _ in self._rules)

    def to(self, device: torch.device) -> "Decision":
        """Takes what is known by lane to `device`."""
        self._t, self.threshold = upload(self._t, device), upload(self.threshold.contiguous(), device)
        self._which = None if self._which is None else upload(self._which, device)
        if self._state.device != device:
            self._state = torch.zeros(self._state.shape, device=device)
        if self.asked and all(isinstance(rule, Limits) for rule, _ in self._rules):
            self.limits = self._limits()
        return self

    def _limits(self) -> Tensor:
        layers, t, threshold, which = self._layers, self._t, self.threshold, self._which
        if which is None:
            return self._rules[0][0].limits(layers, t, threshold).contiguous()
        limits = torch.full((layers - 1, len(t)), -torch.inf, device=t.device)
        for index, (rule, asked) in enumerate(self._rules):
            if asked:
                own = rule.limits(layers, t, threshold)
                limits = torch.where(which == index, own, limits)
        return limits.contiguous()

    def leave_blindly(self, u: Tensor | None, layer: int, lanes: Tensor, asked: Tensor) -> Tensor:
        """`leave` of the rows asked, bool [n], without a look at any value, so that nobody waits for a device: every
        rule is asked about every row, and heeded where it is that row's own."""
        t, threshold, before = (v.index_select(0, lanes) for v in (self._t, self.threshold, self._state))
        which = None if self._which is None else self._which.index_select(0, lanes)
        mask = torch.zeros_like(asked)
        for index, (rule, layers) in enumerate(self._rules):
            if layer in layers:
                own = asked if which is None else asked & (which == index)
                state = before.clone() if rule.stateful else before
                mask |= own & rule.leave(u if rule.scored else None, layer, self._layers, t, threshold, state)
                if rule.stateful:
                    before = torch.where(own, state, before)
                    self._state.index_copy_(0, lanes.long(), before)
        return mask

    def leave(self, u: Tensor | None, layer: int, lanes: Tensor) -> Tensor:
        """bool [n]: who of the running rows leaves. u: float32 [n]; lanes: i32 [n], row -> lane."""
        if self.limits is not None:
            return below(u, self.limits[layer - 1].index_select(0, lanes))
        if self._by_row is None:
            self._by_row = self._t[lanes], self.threshold[lanes], self._state[lanes]
        if self._which is None:
            rule, _ = self._rules[0]
            mask = self._ask(rule, u, layer, lanes, *self._by_row)
        else:
            mask = torch.zeros(len(lanes), dtype=torch.bool, device=self._t.device)
            which = self._which[lanes]
            for index, (rule, asked) in enumerate(self._rules):
                rows = (which == index).nonzero().squeeze(1) if layer in asked else ()
                if len(rows):
                    own = (v[rows] for v in self._by_row)
                    mask[rows] = self._ask(rule, u if u is None else u[rows], layer, lanes[rows], *own)
            if any(rule.stateful for rule, _ in self._rules):
                self._by_row = None
        return mask

    def moved(self) -> None:
        """Rows have left or changed places."""
        self._by_row = None

    def _ask(
        self, rule: Rule, u: Tensor | None, layer: int, lanes: Tensor, t: Tensor, threshold: Tensor, state: Tensor
    ) -> Tensor:
        mask = rule.leave(u if rule.scored else None, layer, self._layers, t, threshold, state)
        if rule.stateful:
            self._state[lanes] = state
        return mask.expand(len(lanes))

    def _thresholds(self, threshold: Tensor | None) -> Tensor:
        given = threshold is not None
        if not given:
            device = self._t.device if self._which is None else self._which.device
            threshold = torch.full(self._t.shape, torch.nan, device=device)
        for index, (rule, asked) in enumerate(self._rules):
            own = None if self._which is None else self._which == index
            if given:
                if own is None and threshold.is_cpu:
                    rule.check(threshold)
                elif asked and threshold.is_cpu and own.is_cpu:
                    rule.check(threshold[own])
            elif rule.threshold is not None:
                value = float(rule.threshold)
                threshold = threshold.fill_(value) if own is None else threshold.masked_fill(own, value)
            elif asked:
                raise ValueError(f"{rule} has no threshold of its own; give one per lane")
        return threshold
