"""The fused pass with branches of an earlier step: equal, bit for bit, to the pass over branches laid out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from adadiff_kernels import Cached, Norm, Score, residual_uem
from fused import BRAIN, DEVICE, DTYPES, HALF, SINGLE, Problem, inside_nan
from numerics import assert_as_accurate
from operators import serves

SHAPE = (4, 19, 72, 1, 2, 6)  # n, T, D, P, prefix tokens, B: tokens and channels that fill no tile
BACKENDS = ["reference", "triton"]


class Mixed(Problem):
    """A `Problem` whose row r takes cached row source[r] or fresh row -1 - source[r], and stores it at keep[r].
    `branch` is laid out by hand, and what nobody reads is NaN."""

    def __init__(self, shape: tuple[int, ...], dtypes: tuple, source: list[int], keep: list[int] | None, entries: int):
        super().__init__((len(source), *shape[1:5], max(shape[5], len(source))), dtypes)
        self.rows = inside_nan(self.normal(entries, self.T, self.D, dtype=dtypes[1]))
        fresh = 1 + max([-1 - s for s in source if s < 0], default=-1)
        self.fresh = inside_nan(self.normal(fresh, self.T, self.D, dtype=dtypes[1]))
        for entry in set(range(entries)) - set(source):
            self.rows[entry] = math.nan
        laid_out = [self.rows[s] if s >= 0 else self.fresh[-1 - s] for s in source]
        self.branch = torch.stack(laid_out) if laid_out else self.branch
        own = [None if v is None else torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in (source, keep)]
        self.cached, self.kept = Cached(self.rows, *own), keep

    def run_cached(self, norm: str | None = "affine", backend: str = "triton", **change: object) -> tuple:
        given = {"row_to_lane": self.lanes, "gate": self.gate, "bias": self.bias, "score": self.score, **change}
        chosen = None if norm is None else self.norms[norm]
        return residual_uem(self.x, self.fresh, norm=chosen, backend=backend, cached=self.cached, **given)

    def check(self, norm: str | None, backend: str, **change: object) -> None:
        wanted, before = self.run(norm, backend, **change), self.rows.clone()
        for row, entry in enumerate(self.kept or ()):
            if entry >= 0:
                before[entry] = self.branch[row]
        made = self.run_cached(norm, backend, **change)
        for ours, theirs in zip(made, wanted, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or same_bits(ours, theirs)
        assert same_bits(self.rows, before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a == a, b == b)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("norm", ["affine", "modulated", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_and_cached_rows_of_one_pass(backend: str, norm: str | None, dtypes: tuple) -> None:
    Mixed(SHAPE, dtypes, [3, -2, 0, -1], [-1, 2, -1, -1], 5).check(norm, serves(backend))


def test_the_formula_in_float64() -> None:
    p = Mixed(SHAPE, (SINGLE, BRAIN), [3, -2, 0, -1], [-1, 2, -1, -1], 5)
    y, h, u = p.run_cached("affine", serves("triton"))
    same = p.x + (p.gate[p.lanes.long()][:, None] * (p.branch + p.bias)).to(p.x.dtype)
    assert_as_accurate(y, same, p.exact_sum())
    assert_as_accurate(h, p.exact_norm(y, "affine", h.dtype), p.exact_norm(y, "affine"))
    assert (u.double() - p.exact_score(y)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("source", "keep", "entries"),
    [
        pytest.param([2, 2, 0], None, 3, id="all cached, one twice, nothing kept"),
        pytest.param([-1, -2, -3], [1, 0, 2], 3, id="all fresh and kept"),
        pytest.param([-3, -1, -1], [-1, -1, -1], 2, id="fresh rows in another order, one of them read by nobody"),
        pytest.param([-1, -2], None, 0, id="no cache yet"),
        pytest.param([], [], 2, id="no rows"),
        pytest.param([0], [1], 2, id="a cached row moves"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_mixture(backend: str, source: list[int], keep: list[int] | None, entries: int) -> None:
    Mixed(SHAPE, (SINGLE, SINGLE), source, keep, entries).check("modulated", serves(backend))


@st.composite
def patterns(draw: st.DrawFn) -> tuple[list[int], list[int] | None, int]:
    n, entries = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    source = draw(st.lists(st.integers(-n, entries - 1), min_size=n, max_size=n))
    free = sorted(set(range(entries)) - set(source))
    places = iter(draw(st.permutations(free)))
    keep = [next(places, -1) if draw(st.booleans()) else -1 for _ in source]
    return source, keep if draw(st.booleans()) else None, entries


@settings(max_examples=30, deadline=None)
@given(patterns(), st.sampled_from([(BRAIN, BRAIN), (SINGLE, BRAIN), (HALF, HALF)]))
def test_any_pattern_over_the_rows(pattern: tuple[list[int], list[int] | None, int], dtypes: tuple) -> None:
    Mixed((0, 5, 24, 1, 1, 1), dtypes, *pattern).check("affine", "reference")


@pytest.mark.parametrize("outputs", [1, 12])
def test_parts_left_out_and_maps(outputs: int) -> None:
    p = Mixed((3, 35, 96, outputs, 1, 5), (BRAIN, BRAIN), [1, -1, -2], [-1, 0, -1], 3)
    p.check("plain", serves("triton"), gate=None)
    p.check("plain", "triton", bias=None)
    p.check(None, "triton", score=None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_may_be_written_over_x(backend: str) -> None:
    p = Mixed(SHAPE, (SINGLE, SINGLE), [3, -2, 0, -1], [-1, 2, -1, -1], 5)
    wanted = p.run("affine", serves(backend))
    norms = torch.empty_like(p.x)
    made = p.run_cached("affine", backend, out=p.x, norm_out=norms)
    assert made[0].data_ptr() == p.x.data_ptr()
    assert made[1].data_ptr() == norms.data_ptr()
    for ours, theirs in zip(made, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_nan_of_a_cached_row_stays_in_the_rows_that_read_it() -> None:
    p = Mixed(SHAPE, (SINGLE, SINGLE), [3, -2, 0, -1], None, 5)
    clean = p.run_cached("affine", serves("triton"))
    p.rows[0, 18, 71] = math.nan
    hurt = p.run_cached("affine", "triton")
    assert hurt[2].isnan().tolist() == [False, False, True, False]
    for before, after in zip(clean, hurt, strict=True):
        assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])


@pytest.fixture
def small() -> Mixed:
    return Mixed((0, 3, 8, 1, 0, 3), (SINGLE, SINGLE), [1, -1], [-1, 0], 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_over_rows_that_are_read_in_another_order_are_refused(small: Mixed, backend: str) -> None:
    taken = torch.zeros(4, 3, 8, device=DEVICE)
    small.fresh = taken[1:2]
    for out in (taken[:2], taken[1:3], small.rows[1:3]):
        with pytest.raises(ValueError, match=r"out must not share memory with (branch|cached.rows)"):
            small.run_cached(None, serves(backend), out=out)
    with pytest.raises(ValueError, match=r"norm_out must not share memory with cached.rows"):
        small.run_cached("plain", backend, out=small.x, norm_out=small.rows[:2])
    small.run_cached(None, backend, out=taken[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: Cached(c.rows[:, :2], c.source, c.keep), r"x and cached.rows must be .* one T and D"),
        (lambda c: Cached(c.rows.double(), c.source, c.keep), "cached.rows must be torch.float32 as the branch"),
        (lambda c: Cached(c.rows, c.source.long(), c.keep), r"cached.source must be int32 \[2\], got torch.int64"),
        (lambda c: Cached(c.rows, c.source[:1], c.keep), r"cached.source must be int32 \[2\], got torch.int32 \[1\]"),
        (lambda c: Cached(c.rows, c.source, c.keep[:1]), r"cached.keep must be int32 \[2\]"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_that_does_not_fit_is_refused(small: Mixed, backend: str, change, message: str) -> None:
    small.cached, before = change(small.cached), small.rows.clone()
    with pytest.raises(ValueError, match=message):
        small.run_cached(None, serves(backend))
    assert same_bits(small.rows, before)


def test_other_fresh_rows_are_refused(small: Mixed) -> None:
    small.fresh = small.fresh[:, :2]
    with pytest.raises(ValueError, match="x and branch must be"):
        small.run_cached(None, "reference")
    wide = torch.zeros(3, 3, 16, device=DEVICE)[..., ::2]
    small.cached, small.fresh = Cached(wide, small.cached.source), torch.zeros(1, 3, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"cached.rows must be contiguous"):
        small.run_cached(None, serves("triton"))


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_are_what_they_declare(backend: str, out: bool, keeps: bool) -> None:
    p = Mixed((0, 3, 8, 2, 1, 5), (SINGLE, SINGLE), [1, -2, -1], [-1, 0, -1] if keeps else None, 2)
    p.rows[0] = 0.0  # which opcheck compares
    norm, score, gate = p.norms["affine"], p.score, p.gate.contiguous()
    cached = p.cached.rows.clone(), p.cached.source, p.cached.keep
    flat = (p.lanes, gate, p.bias, score.weight, score.offset, 1, None, norm.eps, norm.weight, norm.bias, None, None)
    given = (p.x.clone(), p.fresh.clone())
    ops, results = torch.ops.adadiff_kernels, (torch.zeros_like(p.x), torch.zeros_like(p.x))
    if out:
        opcheck(ops.residual_uem_cached_out.default, (*given, *results, *cached, *flat, serves(backend)))
    else:
        opcheck(ops.residual_uem_cached.default, (*given, *cached, *flat, serves(backend)))


def test_a_compiled_call_is_one_operator() -> None:
    serves("triton")
    p = Mixed((0, 3, 8, 1, 1, 5), (SINGLE, SINGLE), [1, -2, -1], [-1, 0, -1], 2)
    p.rows[0] = 0.0

    def call(x: Tensor, fresh: Tensor, rows: Tensor, source: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = {"row_to_lane": p.lanes, "cached": Cached(rows, source, keep), "backend": "triton"}
        y, h, _ = residual_uem(x, fresh, norm=Norm(1e-6), **given)
        into = torch.empty_like(x)
        residual_uem(x, fresh, score=Score(p.bias[None], p.score.offset, 1), out=into, **given)
        return y, h, into

    given = p.x, p.fresh, p.rows.clone(), p.cached.source, p.cached.keep
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(compiled(*given), call(p.x, p.fresh, p.rows, *given[3:]), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(given[2], p.rows)
