"""Bytes per second of `residual_uem`, compared with a copy, with PyTorch and with the pass without a score; with one
UEM output per token and with maps; in bfloat16, and with float32 rows and bfloat16 branches, as published U-ViTs run
under autocast. There is no bias of the branch: PyTorch adds it within the matrix product at no cost.

Every variant is one CUDA graph of calls that alternate between several sets of rows, together four times the L2 cache.
So each call reads its rows from device memory, and as many bytes are written back as it writes. (If the cache were
flushed before each call, the flush's bytes would be written back during the call.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from adadiff_kernels import Norm, Score, residual_uem
from benchmarks.gpu.session import Call, Session, Task, check_close, copy_of, gigabytes

SUITE = "gpu-passes"
SINGLE, BRAIN = torch.float32, torch.bfloat16
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Rows of T tokens (prefix tokens included) of D channels. modulated: gate, scale and shift by lane, as in a DiT,
    instead of an affine norm."""

    T: int
    D: int
    num_prefix_tokens: int
    modulated: bool = False


SHAPES = {  # the first two are measured first
    "U-ViT-L/2": Shape(258, 1024, 2),
    "DiT-XL/2": Shape(256, 1152, 0, modulated=True),
    "U-ViT-S/2": Shape(257, 512, 1),
    "U-ViT-H/2": Shape(258, 1152, 2),
}
TINY = {"tiny": Shape(5, 32, 1), "tiny, modulated": Shape(4, 24, 0, modulated=True)}
ROWS = {"bfloat16": BRAIN, "float32 beside bfloat16": SINGLE}
MAP_TILES = (16, 32)  # tokens per program for maps


def tasks(session: Session) -> Iterator[Task]:
    """The most important comparisons first: bfloat16 with one output per token and with maps of 16. Few are also
    compiled (see `task`), as Inductor's autotuning takes 10 to 20 seconds."""
    shapes = list(TINY if session.dry else SHAPES)
    for names in (shapes[:2], shapes[2:]):
        for P in (1, 3) if session.dry else (1, 16):
            for name in names:
                for B in (2,) if session.dry else (64, 8, 256) if P == 1 else (64, 256):
                    yield task(session, name, "bfloat16", B, P)
    for name in shapes:
        if not (TINY if session.dry else SHAPES)[name].modulated:  # no published DiT runs like this
            yield task(session, name, "float32 beside bfloat16", 2 if session.dry else 64, 1)
        yield task(session, name, "bfloat16", 2 if session.dry else 64, 64)


def task(session: Session, name: str, rows: str, B: int, P: int) -> Task:
    given = {"shape": name, "rows": rows, "batch": B, "outputs": P}
    shape = (TINY if session.dry else SHAPES)[name]
    compiled = session.dry or (P == 1 and B == 64 and rows == "bfloat16" and name in list(SHAPES)[:2])
    return Task("pass", given, partial(measure, session, shape, given, compiled))


def measure(session: Session, shape: Shape, parameters: dict[str, object], compiled: bool) -> None:
    B, P, x = parameters["batch"], parameters["outputs"], ROWS[parameters["rows"]]
    torch.manual_seed(0)
    torch.compiler.reset()  # Dynamo compiles a function for at most eight shapes
    p = Parameters.draw(session, shape, B, P, x)
    moved = 2 * B * shape.T * shape.D * (x.itemsize + BRAIN.itemsize)  # x and branch are read, y and h written
    sets = rows(session, (B, shape.T, shape.D), moved, x)
    ways: dict[str, Way] = {
        "fused": p.fused,
        "fused, no score": lambda x, branch: p.fused(x, branch, scored=False),
        "eager": lambda x, branch: plain_pass(x, branch, *p.plain, product=True),
    }
    if P > 1:
        ways |= {f"fused, tiles of {tile}": in_tiles(tile, p.fused) for tile in MAP_TILES}
    if compiled:
        passed = session.compile(plain_pass, dynamic=False, mode="max-autotune-no-cudagraphs")
        ways["compiled"] = lambda x, branch: passed(x, branch, *p.plain, product=P > 1)
    with torch.inference_mode():
        check(ways, *sets[0], p, scored=P)
    calls = {name: session.captured(over(way, sets)) for name, way in ways.items()}
    copying, copied = copy_of(session, 2**12 if session.dry else 2**30)
    measured = session.compare({**calls, "copy": copying})

    def rate(name: str) -> float:
        return gigabytes(measured.median(name) / len(sets), moved)

    copy_rate = gigabytes(measured.median("copy"), copied)
    results = {
        name: {
            "sets": len(sets),  # seconds are of one call on each set
            "gb_per_second": rate(name),
            "copy_gb_per_second": copy_rate,
            "share_of_copy": rate(name) / copy_rate,
            "over_no_score": measured.ratio(name, "fused, no score").median,
        }
        for name in ways
    }
    session.write(SUITE, "pass", parameters, measured, results, x)


def in_tiles(tile: int, way: "Way") -> "Way":
    def call(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        from adadiff_kernels.residual_uem import kernel

        usual, kernel.MAP_TILE = kernel.MAP_TILE, tile
        try:
            return way(x, branch)
        finally:
            kernel.MAP_TILE = usual

    return call


Way = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class Parameters:
    """All arguments but the rows. Row i belongs to lane i."""

    lanes: Tensor
    gate: Tensor | None
    score: Score
    norm: Norm

    @classmethod
    def draw(cls, session: Session, shape: Shape, B: int, P: int, dtype: torch.dtype) -> "Parameters":
        """dtype: of rows and weights (float32 under autocast)."""
        D = shape.D
        weight = session.normal(P, D, dtype=dtype) / D**0.5
        tickets = torch.zeros(B, dtype=torch.int32, device=session.device)
        score = Score(weight, session.normal(B, P, dtype=torch.float32), shape.num_prefix_tokens, tickets)
        lanes = torch.arange(B, dtype=torch.int32, device=session.device)
        if shape.modulated:
            by_lane = session.normal(B, 6 * D, dtype=BRAIN)
            norm = Norm(EPS, None, None, by_lane[:, D : 2 * D], by_lane[:, -D:])
            return cls(lanes, by_lane[:, :D], score, norm)
        affine = session.normal(D, dtype=dtype) + 1, session.normal(D, dtype=dtype)
        return cls(lanes, None, score, Norm(EPS, *affine))

    def fused(self, x: Tensor, branch: Tensor, scored: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        score = self.score if scored else None
        given = {"row_to_lane": self.lanes, "gate": self.gate, "score": score, "norm": self.norm}
        return residual_uem(x, branch, **given, backend="triton")

    @property
    def plain(self) -> tuple[Tensor | int | None, ...]:
        score, norm = self.score, self.norm
        return (
            self.gate,
            score.weight,
            score.offset,
            score.num_prefix_tokens,
            norm.weight,
            norm.bias,
            norm.scale,
            norm.shift,
        )


def plain_pass(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    score: Tensor,
    offset: Tensor,
    num_prefix_tokens: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    product: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pass in plain PyTorch: sum and score in the rows' dtype, norm in the branch's. product: compute the score by
    a matrix product, which Inductor cannot fuse, instead of a sum, which it can."""
    y = x + branch if gate is None else torch.addcmul(x, gate[:, None], branch)
    h = F.layer_norm(y, y.shape[-1:], weight, bias, EPS).to(branch.dtype)
    if scale is not None:
        h = torch.addcmul(shift[:, None], h, 1 + scale[:, None])
    s = F.linear(y, score) if product else (y.float() * score.float()).sum(-1, keepdim=True)
    u = torch.sigmoid(s[:, num_prefix_tokens:].float() + offset[:, None]).mean((1, 2))
    return y, h, u


def rows(session: Session, shape: tuple[int, int, int], moved: int, x: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Pairs of x and branch, at least two, together four times the L2 cache. moved: bytes of a call."""
    cache = torch.cuda.get_device_properties(session.device).L2_cache_size if session.device.type == "cuda" else 0
    number = max(2, -(-4 * cache // moved))
    return [tuple(session.normal(*shape, dtype=dtype) for dtype in (x, BRAIN)) for _ in range(number)]


def over(way: Way, sets: list[tuple[Tensor, Tensor]]) -> Call:
    """Calls `way` on each set and keeps the results, so that no two calls write to the same memory."""
    return lambda: [way(*pair) for pair in sets]


def check(ways: dict[str, Way], x: Tensor, branch: Tensor, p: Parameters, scored: int) -> None:
    exact = plain_pass(x.float(), branch.float(), *(v.float() if torch.is_tensor(v) else v for v in p.plain), True)
    for name, way in ways.items():
        for part, got, want in zip("yhu", way(x, branch), exact, strict=True):
            if got is not None:
                check_close(f"{part} of {name} ({scored} outputs)", got, want, 1e-2)
