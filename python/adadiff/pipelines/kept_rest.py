"""What skippable blocks added to one of their outputs, by lane, and what they would add in a later step."""

import torch
from torch import Tensor

from ..policies.reuse import extrapolated, growth
from .compaction import Rows


class KeptRest:
    """value: what the blocks added at each lane's last full step, rows of B lanes along `dim`. growth: with `order` 1,
    what that grew by a step since the full step before, 0 if it has nothing to be compared with."""

    def __init__(self, B: int, dim: int, order: int) -> None:
        self._B, self._dim, self._order = B, dim, order
        self.value: Tensor | None = None
        self.growth: Tensor | None = None

    def bytes(self) -> int:
        return sum(kept.numel() * kept.element_size() for kept in (self.value, self.growth) if kept is not None)

    def store(self, part: Tensor, base: Tensor, rows: Rows | None, age: Tensor, grows: Tensor) -> None:
        """Stores part - base. part: the blocks' output for the lanes of `rows`, None: for all; base: their input, for
        all lanes. age: int64 [B], steps since the last full step; grows: bool [B], whether that can be compared."""
        if rows is None and not self._order and _fits(self.value, part, base):
            torch.sub(part, base, out=self.value)
            return
        added = part - (base if rows is None else rows.take(base, self._dim, base.shape[self._dim] // self._B))
        if self._order:
            self._grow(added, rows, age, grows)
        if rows is None:
            self.value = added
        else:
            assert self.value is not None
            rows.put(self.value, self._dim, added)

    def _grow(self, added: Tensor, rows: Rows | None, age: Tensor, grows: Tensor) -> None:
        """Stores the growth, while `value` is still the previous one."""
        if self.value is None or (rows is None and self.value.shape != added.shape):
            self.growth = torch.zeros_like(added)
            return
        before, lanes = self.value, slice(None) if rows is None else rows.lanes
        if rows is not None:
            before = rows.take(before, self._dim, before.shape[self._dim] // self._B)
        steps = self._by_row(age[lanes], added).to(added.dtype)
        grown = growth(added, before, steps, self._by_row(grows[lanes], added))
        if rows is None:
            self.growth = grown
        else:
            assert self.growth is not None
            rows.put(self.growth, self._dim, grown)

    def reused(self, age: Tensor) -> Tensor:
        """What lanes would add now, `age` (int64 [B]) steps after their last full step; of all lanes, undefined for
        those that have made none."""
        assert self.value is not None
        if self.growth is None:
            return self.value
        return extrapolated(self.value, self.growth, self._by_row(age, self.value).to(self.value.dtype))

    def _by_row(self, values: Tensor, like: Tensor) -> Tensor:
        """values: [n], by lane. Returns them by row of `like`, on its device, with ones as the other dimensions."""
        by_row = values.repeat_interleave(like.shape[self._dim] // len(values)).to(like.device)
        return by_row.view(*[1] * self._dim, -1, *[1] * (like.ndim - self._dim - 1))


def _fits(out: Tensor | None, a: Tensor, b: Tensor) -> bool:
    """Whether a - b can be written to `out`."""
    return out is not None and (out.shape, out.dtype, out.device) == (a.shape, torch.result_type(a, b), a.device)
