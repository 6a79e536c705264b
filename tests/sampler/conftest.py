"""Products whose rounding cannot depend on the batch, because every lane is computed on its own."""

import dataclasses
from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import Tensor

from adadiff.models import dit, layers, uvit
from adadiff.uem import Exits
from adadiff_kernels import LayerScores
from sampler import adaln

fused = import_module("adadiff_kernels.residual_uem")  # the package has a function of this name


def lane_by_lane(function: Callable) -> Callable:
    """The same function, called for one lane at a time; all its tensors are by lane, other values are passed on."""

    def join(parts: list) -> object:
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        if isinstance(parts[0], tuple):
            return tuple(join(list(column)) for column in zip(*parts, strict=True))
        names = [field.name for field in dataclasses.fields(parts[0])]
        return dataclasses.replace(parts[0], **{k: join([getattr(part, k) for part in parts]) for k in names})

    def wrapped(*values: object) -> object:
        n = len(values[0])
        return join([function(*(v[i : i + 1] if isinstance(v, Tensor) else v for v in values)) for i in range(n)])

    return wrapped


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(kind: type, name: str) -> None:
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *by_lane: lane_by_lane(partial(method, self))(*by_lane))

    for kind in (layers.Attention, layers.Mlp, uvit.Head, dit.Head, adaln.Head, adaln.Mix, adaln.Mlp):
        patch(kind, "forward")
    for kind in (uvit.UViT, dit.DiT, adaln.AdaLN):
        patch(kind, "embed")
    for kind, name in ((uvit.UViT, "head"),):
        patch(kind, name)
    join = uvit.Block.join

    def joined(
        self: uvit.Block, x: Tensor, skip: Tensor, row_to_lane: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        own = index if row_to_lane is None else index[row_to_lane]
        return lane_by_lane(partial(join, self))(x, skip if own is None else skip[own])

    monkeypatch.setattr(uvit.Block, "join", joined)
    offsets, score, layer_score = Exits.offsets, fused.score_rows, LayerScores.__call__
    monkeypatch.setattr(
        Exits,
        "offsets",
        lambda self, time, t: torch.cat(
            [offsets(self, *(one[None] for one in pair)) for pair in zip(time, t, strict=True)], dim=1
        ),
    )
    monkeypatch.setattr(
        fused,
        "score_rows",
        lambda y, weights, lanes: lane_by_lane(lambda y, lane: score(y, weights, lane))(y, lanes),
    )

    def scores(self: LayerScores, y: Tensor, layer: int, row_to_lane: Tensor) -> Tensor:
        u, anybody = [], False
        for i in range(len(y)):
            u.append(layer_score(self, y[i : i + 1], layer, row_to_lane[i : i + 1]).clone())
            anybody |= self.anybody
        self.anybody = anybody
        return torch.cat(u)

    monkeypatch.setattr(LayerScores, "__call__", scores)
