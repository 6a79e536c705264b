"""Lower bound for the time of an exit pattern: the plain network's fastest pieces on only the rows that run.

    share of attainable = [T_stem + sum over layers of t_l(n_l) + T_head] / measured seconds
    share of FLOP ideal = measured speed-up / (multiply-adds of the full run / multiply-adds run)

n_l rows run block l; t_l(n) is the time of the fastest plain block on exactly n rows. The fastest way to run each piece
is determined beforehand. The time of a pattern's pieces is measured in turns with the pattern: as the sum of the times
of single pieces if there are many patterns, or in one call (`replay`). U-ViT has two kinds of blocks: "in" (in-blocks
and the middle one) and "out" (with the skip projection); all blocks of a DiT are "in".
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from adadiff.models.interface import Backbone, Block, Conditioning
from benchmarks.harness import Comparison

Call = Callable[[], object]


def rows_per_layer(exit_layer: Tensor, num_layers: int) -> list[int]:
    """exit_layer: integers [B], 1..num_layers; 0 (no pass) runs nothing. Returns n_1..n_L."""
    return [int((exit_layer >= layer).sum()) for layer in range(1, num_layers + 1)]


def kinds(backbone: Backbone) -> list[str]:
    return ["out" if block.skip_from is not None else "in" for block in backbone.blocks]


def of_lanes(cond: Conditioning, lanes: slice) -> Conditioning:
    """The conditioning of some lanes; all its fields are by lane."""
    return dataclasses.replace(
        cond, **{field.name: getattr(cond, field.name)[lanes] for field in dataclasses.fields(cond)}
    )


def share_of_flop_ideal(speedup: float, macs: int, macs_full: int) -> float:
    return speedup / (macs_full / macs)


class PlainPieces:
    """Stem, head and single blocks of a plain network: variants for a comparison, and times computed from its result.

    counts: kind -> numbers of rows at which blocks are timed. sizes: micro-batches that are tried besides one call for
    all rows. compiled: (block, *inputs) -> output through torch.compile, or None. Consecutive calls use consecutive
    blocks, as in a network, because the weights of a single block would stay in the cache.
    """

    def __init__(
        self,
        backbone: Backbone,
        inputs: tuple[Tensor, ...],
        counts: Mapping[str, Iterable[int]],
        sizes: Iterable[int] = (),
        compiled: Callable[..., Tensor] | None = None,
    ):
        self.backbone, self._inputs, self._compiled = backbone, inputs, compiled
        with torch.inference_mode():
            _, self._cond = backbone.embed(*inputs)
        like = {"dtype": backbone.pos_embed.dtype, "device": backbone.pos_embed.device}
        self._rows = torch.randn(len(inputs[0]), backbone.tokens, backbone.dim, **like)
        self._skip = torch.randn_like(self._rows)
        self._sizes = tuple(sizes)
        self._counts = {kind: sorted({n for n in ns if n}) for kind, ns in counts.items()}

    def variants(self) -> dict[str, Call]:
        patches = self._rows[:, self.backbone.num_prefix_tokens :]
        lanes = torch.arange(len(patches), dtype=torch.int32, device=patches.device)
        calls: dict[str, Call] = {
            "stem": lambda: self.backbone.embed(*self._inputs),
            "head": lambda: self.backbone.head(patches, self._cond, lanes),
        }
        for kind, counts in self._counts.items():
            for n in counts:
                calls[f"{kind} {n} whole"] = self._block(kind, n, n)
                for size in sorted({size for size in self._sizes if size < n}):
                    calls[f"{kind} {n} by {size}"] = self._block(kind, n, size)
                if self._compiled is not None:
                    calls[f"{kind} {n} compiled"] = self._block(kind, n, n, self._compiled)
        return calls

    def _block(self, kind: str, n: int, size: int, through: Callable[..., Tensor] | None = None) -> Call:
        blocks = self._cycle(kind)
        parts = []
        for lanes in torch.arange(n).tensor_split(-(-n // size)):
            part = slice(int(lanes[0]), int(lanes[-1]) + 1)
            skip = () if kind == "in" else (self._skip[part],)
            parts.append((self._rows[part], of_lanes(self._cond, part), *skip))

        def call() -> None:
            block = next(blocks)
            for part in parts:
                block(*part) if through is None else through(block, *part)

        return call

    def _cycle(self, kind: str) -> Iterator[Block]:
        return itertools.cycle(
            [block for block, its in zip(self.backbone.blocks, kinds(self.backbone), strict=True) if its == kind]
        )

    def replay(self, measured: Comparison, counts: Sequence[int]) -> Call:
        """A call that runs the stem, counts[l] rows through block l in the fastest measured way, and the head."""
        ways = self.variants()

        def fastest(kind: str, n: int) -> Call:
            return ways[min((name for name in ways if name.startswith(f"{kind} {n} ")), key=measured.median)]

        calls = [fastest(kind, n) for kind, n in zip(kinds(self.backbone), counts, strict=True) if n]
        calls = [ways["stem"], *calls, ways["head"]]

        def call() -> None:
            for piece in calls:
                piece()

        return call

    def seconds(self, measured: Comparison, counts: Sequence[int]) -> float:
        """Attainable seconds of one forward pass in which counts[l] rows run block l."""
        ends = measured.median("stem") + measured.median("head")
        return attainable_seconds(counts, kinds(self.backbone), self.block_seconds(measured), ends)

    def block_seconds(self, measured: Comparison) -> dict[str, dict[int, float]]:
        """kind -> rows -> seconds of the fastest way to run one plain block on these rows."""
        return {
            kind: {
                n: min(measured.median(name) for name in measured.times if name.startswith(f"{kind} {n} "))
                for n in counts
            }
            for kind, counts in self._counts.items()
        }


def attainable_seconds(
    counts: Sequence[int], kinds: Sequence[str], block_seconds: Mapping[str, Mapping[int, float]], ends: float
) -> float:
    """ends + the sum of t_l(n_l). Between measured numbers of rows t is linear, and t(0) = 0.

    Raises ValueError for more rows than were measured.
    """
    total = ends
    for n, kind in zip(counts, kinds, strict=True):
        known = {0: 0.0, **block_seconds.get(kind, {})}
        rows = sorted(known)
        if n > rows[-1]:
            raise ValueError(f"{n} rows of an {kind}-block; measured up to {rows[-1]}")
        total += float(np.interp(n, rows, [known[row] for row in rows]))
    return total
