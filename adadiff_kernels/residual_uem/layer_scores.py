"""The scores of all layers of a network, for one forward pass."""

import torch
from torch import Tensor

from adadiff_kernels import extension
from adadiff_kernels.dispatch import needs_grad
from adadiff_kernels.extension import traced
from adadiff_kernels.residual_uem.reference import Score, uem_score


class LayerScores:
    """Scores of all layers. Arguments are checked once, since scoring a few rows takes microseconds.

    weight: [L, P, D]; offset: float32 [L, B, P] by lane; limits: float32 [L - 1, B] or None, the u below which a lane
    may exit, see `ActiveSet.exit_rows`. Raises ValueError for shapes or dtypes that do not fit.
    Runs in C++ for one output per token on the CPU without gradients, else as `uem_score`.
    anybody: whether any row may exit by the limits after the layer scored last; True where that was not tested.
    """

    def __init__(self, weight: Tensor, offset: Tensor, num_prefix_tokens: int, limits: Tensor | None = None) -> None:
        if weight.dim() != 3 or offset.dim() != 3 or offset.shape[::2] != weight.shape[:2]:
            raise ValueError(
                f"need weight [L, P, D] and offset [L, B, P], got {list(weight.shape)} and {list(offset.shape)}"
            )
        if offset.dtype != torch.float32:
            raise ValueError(f"offset must be float32, got {offset.dtype}")
        self._weight, self._offset, self._num_prefix_tokens = weight, offset, num_prefix_tokens
        self.anybody, self._core = True, None
        if weight.shape[1] == 1 and weight.is_cpu and not traced(weight) and not needs_grad(weight, offset):
            self._core = extension.core
            self._single = weight.float().contiguous()
            self._channels, self._stride, lanes = weight.shape[2], offset.stride(), offset.shape[1]
            self._lanes = self._stride[1], lanes
            self._limits, self._last = limits, 0 if limits is None else len(limits)
            if limits is not None and (limits.shape[1:] != (lanes,) or not limits.is_contiguous()):
                raise ValueError(f"limits must be float32 [L - 1, {lanes}], contiguous, got {list(limits.shape)}")
            # addresses of the first layer's floats
            self._first = [0 if v is None else v.data_ptr() for v in (self._single, offset, limits)]
            self._u = torch.empty(lanes, dtype=torch.float32, device="cpu")

    def of(self, layer: int, tickets: Tensor | None = None) -> Score:
        """The score of one layer, 1..L, for the fused pass. tickets: see `Score`."""
        return Score(self._weight[layer - 1], self._offset[layer - 1], self._num_prefix_tokens, tickets)

    def __call__(self, y: Tensor, layer: int, row_to_lane: Tensor) -> Tensor:
        """Returns u, float32 [n], whose memory the next call may overwrite.

        y: [n, T, D], a block's output, n at most B; layer: 1..L; row_to_lane: int32 [n]. Raises ValueError for shapes
        or dtypes that do not fit.
        """
        core, kind = self._core, y.dtype
        if core is None or kind not in _CORE_DTYPES or not y.is_contiguous() or needs_grad(y):
            self.anybody = True
            return uem_score(y, self.of(layer), row_to_lane)
        n, tokens, channels = y.shape
        if channels != self._channels or row_to_lane.dtype != torch.int32 or row_to_lane.shape != (n,):
            raise ValueError(
                f"need y [n, T, {self._channels}] and row_to_lane int32 [n], got {list(y.shape)} and "
                f"{row_to_lane.dtype} {list(row_to_lane.shape)}"
            )
        if (u := self._u).shape[0] != n:
            u = self._u = torch.empty(n, dtype=torch.float32, device="cpu")
        weight, offset, limit = self._first
        before = 4 * (layer - 1)
        stride, lanes = self._lanes
        self.anybody = core.uem_score(
            *(y.data_ptr(), kind is torch.bfloat16, n, tokens, channels, self._num_prefix_tokens),
            *(weight + before * channels, offset + before * self._stride[0], stride, lanes),
            *(row_to_lane.data_ptr(), u.data_ptr(), limit + before * lanes if layer <= self._last else 0),
        )
        return u


_CORE_DTYPES = (torch.float32, torch.bfloat16)
