"""The fused pass against its formula in float64, element by element, and what it must leave alone."""

import math

import pytest
import torch
from torch import Tensor

from adadiff_kernels import Norm, Score, layer_norm, residual_uem, uem_score, uem_score_reference
from numerics import assert_as_accurate

SIZES = [  # n rows, T tokens, D channels, P outputs, num_prefix_tokens, B lanes
    pytest.param((5, 18, 48, 1, 2, 13), id="classes"),
    pytest.param((3, 7, 33, 12, 1, 3), id="map-odd"),
    pytest.param((1, 1, 1, 1, 0, 1), id="one-element"),
    pytest.param((4, 80, 16, 4, 78, 9), id="text"),  # two patches behind 78 num_prefix_tokens
    pytest.param((0, 9, 20, 1, 0, 6), id="no-rows"),
]
DTYPES = [torch.float32, torch.bfloat16]


class Problem:
    """Random inputs; rows carry lanes in no order, and parameters by lane are filled for all B."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype, seed: int = 0):
        self.n, self.T, self.D, self.P, self.num_prefix_tokens, self.B = sizes
        self.dtype, self.draw = dtype, torch.Generator().manual_seed(seed)
        self.x, self.branch = self.normal(self.n, self.T, self.D), self.normal(self.n, self.T, self.D)
        self.lanes = torch.randperm(self.B, generator=self.draw)[: self.n].int()
        self.gate = self.normal(self.B, self.D)
        offset = self.normal(self.B, self.P).float()
        self.score = Score(self.normal(self.P, self.D) / math.sqrt(self.D), offset, self.num_prefix_tokens)
        self.affine = Norm(1e-5, weight=self.normal(self.D) + 1, bias=self.normal(self.D))
        self.modulated = Norm(1e-6, scale=self.normal(self.B, self.D), shift=self.normal(self.B, self.D))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(self.dtype)

    def row(self, i: int, y: Tensor, norm: Norm, lane: int) -> tuple[Tensor, Tensor]:
        """u and the normalised tokens of stored row i, float64."""
        stored = y[i].double()
        logits = stored[self.num_prefix_tokens :] @ self.score.weight.double().T + self.score.offset[lane].double()
        deviation = stored - stored.sum(1, keepdim=True) / self.D
        h = deviation / torch.sqrt(deviation.square().sum(1, keepdim=True) / self.D + norm.eps)
        if norm.weight is not None:
            h = h * norm.weight.double() + norm.bias.double()
        if norm.scale is not None:
            h = h * (1 + norm.scale[lane].double()) + norm.shift[lane].double()
        return (1 / (1 + torch.exp(-logits))).sum() / ((self.T - self.num_prefix_tokens) * self.P), h


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", ["affine", "modulated", "plain"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("sizes", SIZES)
def test_states_the_formula(sizes: tuple[int, ...], gated: bool, norm: str, dtype: torch.dtype) -> None:
    p = Problem(sizes, dtype)
    norm = {"affine": p.affine, "modulated": p.modulated, "plain": Norm(1e-6)}[norm]
    gate = p.gate if gated else None
    before = p.x.clone(), p.branch.clone()
    y, h, u = residual_uem(p.x, p.branch, row_to_lane=p.lanes, gate=gate, score=p.score, norm=norm)
    assert torch.equal(p.x, before[0])  # without `out` nothing is overwritten
    assert torch.equal(p.branch, before[1])
    assert (y.dtype, h.dtype, u.dtype, u.shape) == (dtype, dtype, torch.float32, (p.n,))

    own = torch.ones(p.n, p.D, dtype=dtype) if gate is None else gate[p.lanes.long()]
    exact = p.x.double() + own[:, None].double() * p.branch.double()
    assert_as_accurate(y, p.x + own[:, None] * p.branch, exact)
    # score and norm read y as it is stored, so their references start from the stored y
    for i, lane in enumerate(p.lanes.tolist()):
        want_u, want_h = p.row(i, y, norm, lane)
        assert abs(float(u[i]) - float(want_u)) <= 1e-6
        same = torch.nn.functional.layer_norm(y[i], (p.D,), norm.weight, norm.bias, norm.eps)
        if norm.scale is not None:
            same = same * (1 + norm.scale[lane]) + norm.shift[lane]
        assert_as_accurate(h[i], same, want_h)


@pytest.mark.parametrize("target", ["x", "branch", "part"])
def test_out_receives_the_sum_and_its_neighbours_stay(target: str) -> None:
    p = Problem((5, 18, 48, 1, 2, 13), torch.float32)
    want, h, u = residual_uem(p.x, p.branch, row_to_lane=p.lanes, gate=p.gate, score=p.score, norm=p.affine)
    whole = torch.full((9, p.T, p.D), 7.0)
    out = {"x": p.x, "branch": p.branch, "part": whole[2:7]}[target]
    got = residual_uem(p.x, p.branch, row_to_lane=p.lanes, gate=p.gate, score=p.score, norm=p.affine, out=out)
    assert got[0].data_ptr() == out.data_ptr()
    for mine, theirs in zip(got, (want, h, u), strict=True):
        assert torch.equal(mine, theirs)
    assert bool((whole[:2] == 7).all())
    assert bool((whole[7:] == 7).all())


def test_norm_out_receives_the_normalised_rows_and_its_neighbours_stay() -> None:
    p = Problem((5, 18, 48, 1, 2, 13), torch.float32)
    want = residual_uem(p.x, p.branch, row_to_lane=p.lanes, gate=p.gate, score=p.score, norm=p.affine)
    whole, given = torch.full((9, p.T, p.D), 7.0), {"gate": p.gate, "score": p.score, "norm": p.affine}
    got = residual_uem(p.x, p.branch, row_to_lane=p.lanes, **given, out=p.branch, norm_out=whole[2:7])
    assert got[1].data_ptr() == whole[2:7].data_ptr()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    assert bool((whole[[0, 1, 7, 8]] == 7).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": None}, "give norm and out, too"),
        ({"out": None}, "give norm and out, too"),
        ({"norm_out": torch.zeros(4, 18, 48)}, r"norm_out must be \(5, 18, 48\) torch.float32, got \(4, 18, 48\)"),
        ({"norm_out": torch.zeros(5, 18, 48).bfloat16()}, "norm_out must be .* torch.bfloat16"),
    ],
)
def test_norm_out_must_fit(change: dict, message: str) -> None:
    p = Problem((5, 18, 48, 1, 2, 13), torch.float32)
    given = {"norm": p.affine, "out": torch.zeros_like(p.x), "norm_out": torch.zeros_like(p.x)}
    with pytest.raises(ValueError, match=message):
        residual_uem(p.x, p.branch, row_to_lane=p.lanes, **given | change)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("outputs", [1, 4])
def test_extra_tokens_have_no_say(outputs: int) -> None:
    p = Problem((4, 80, 16, outputs, 78, 9), torch.float32)
    u = uem_score(p.x, p.score, p.lanes)
    p.x[:, :78] = math.nan
    assert torch.equal(uem_score(p.x, p.score, p.lanes), u)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("time", [True, False], ids=["offset by lane", "one offset"])
def test_compiled_scores_do_not_see_other_rows(dtype: torch.dtype, time: bool) -> None:
    """Bit for bit, also where the offset is one row expanded over the lanes, as for exits blind to time."""
    pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    p = Problem((5, 18, 50, 1, 2, 13), dtype)
    if not time:
        p.score = Score(p.score.weight, p.score.offset[:1].expand(p.B, -1), p.score.num_prefix_tokens)
    u = uem_score(p.x, p.score, p.lanes)
    torch.testing.assert_close(u, uem_score_reference(p.x, p.score, p.lanes), rtol=0, atol=1e-6)
    for i in range(p.n):
        assert torch.equal(uem_score(p.x[i : i + 1], p.score, p.lanes[i : i + 1]), u[i : i + 1])


def test_rows_with_gaps_are_scored() -> None:
    p = Problem((5, 18, 48, 1, 2, 13), torch.float32)
    apart = torch.full((5, 18, 60), math.nan)
    apart[..., :48] = p.x
    u = uem_score(apart[..., :48], p.score, p.lanes)
    torch.testing.assert_close(u, uem_score(p.x, p.score, p.lanes), rtol=0, atol=1e-6)
    torch.testing.assert_close(uem_score(p.x, p.score, torch.stack([p.lanes, p.lanes]).t()[:, 0]), u, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(("row", "token", "channel"), [(0, 2, 0), (4, 17, 47), (2, 9, 31)])
def test_nan_stays_in_its_row(row: int, token: int, channel: int) -> None:
    p = Problem((5, 18, 48, 1, 2, 13), torch.float32)
    clean = residual_uem(p.x, p.branch, row_to_lane=p.lanes, gate=p.gate, score=p.score, norm=p.modulated)
    p.branch[row, token, channel] = math.nan
    hurt = residual_uem(p.x, p.branch, row_to_lane=p.lanes, gate=p.gate, score=p.score, norm=p.modulated)
    assert math.isnan(hurt[2][row])
    others = torch.arange(5) != row
    for before, after in zip(clean, hurt, strict=True):
        assert torch.equal(before[others], after[others])


def test_parameters_follow_the_lane_and_not_the_row() -> None:
    p = Problem((5, 18, 48, 2, 2, 13), torch.float32)
    whole = residual_uem(p.x, p.branch, row_to_lane=p.lanes, gate=p.gate, score=p.score, norm=p.modulated)
    unused = torch.ones(p.B, dtype=torch.bool)
    unused[p.lanes.long()] = False
    for by_lane in (p.gate, p.score.offset, p.modulated.scale, p.modulated.shift):
        by_lane[unused] = math.nan
    again = residual_uem(p.x, p.branch, row_to_lane=p.lanes, gate=p.gate, score=p.score, norm=p.modulated)
    for before, after in zip(whole, again, strict=True):
        assert torch.equal(before, after)
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = residual_uem(
        p.x[order], p.branch[order], row_to_lane=p.lanes[order], gate=p.gate, score=p.score, norm=p.modulated
    )
    assert torch.equal(turned[0], whole[0][order])
    assert torch.equal(turned[1], whole[1][order])
    torch.testing.assert_close(turned[2], whole[2][order], rtol=0, atol=1e-6)  # one product over all rows


def test_what_is_not_asked_for_is_not_made() -> None:
    p = Problem((5, 18, 48, 1, 2, 13), torch.float32)
    y, h, u = residual_uem(p.x, p.branch, row_to_lane=p.lanes)
    assert torch.equal(y, p.x + p.branch)
    assert h is None
    assert u is None
    assert torch.equal(
        layer_norm(y, p.affine, p.lanes), residual_uem(p.x, p.branch, row_to_lane=p.lanes, norm=p.affine)[1]
    )


X, LANES = torch.zeros(3, 5, 8), torch.arange(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"\[n, T, D\]"),
        ({"branch": X[:2]}, r"\(2, 5, 8\)"),
        ({"row_to_lane": LANES[:2]}, r"row_to_lane must be \[3\]"),
        ({"gate": torch.zeros(3, 7)}, r"gate must be \[B, 8\]"),
        ({"out": X.double()}, "float64"),
        ({"out": X[:, :4]}, r"\(3, 4, 8\)"),
        ({"score": Score(torch.zeros(1, 7), torch.zeros(3, 1), 0)}, r"weight \[P, 8\]"),
        ({"score": Score(torch.zeros(2, 8), torch.zeros(3, 1), 0)}, r"offset \[B, P\]"),
        ({"score": Score(torch.zeros(8), torch.zeros(3, 1), 0)}, r"weight \[P, 8\]"),
        ({"score": Score(torch.zeros(1, 8), torch.zeros(3, 1).double(), 0)}, "offset must be float32"),
        (
            {"row_to_lane": LANES.long(), "score": Score(torch.zeros(1, 8), torch.zeros(3, 1), 0)},
            r"row_to_lane must be int32",
        ),
        ({"score": Score(torch.zeros(1, 8), torch.zeros(3, 1), 5)}, "at least one of 5 tokens"),
        ({"score": Score(torch.zeros(1, 8), torch.zeros(3, 1), -1)}, "at least one of 5 tokens"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    given = {"x": X, "branch": X, "row_to_lane": LANES, "out": torch.ones_like(X), **change}
    with pytest.raises(ValueError, match=message):
        residual_uem(given["x"], given["branch"], **{k: v for k, v in given.items() if k not in ("x", "branch")})
    if "out" not in change:
        assert bool((given["out"] == 1).all())  # refused before anything is written


def test_lanes_outside_are_refused_by_the_core() -> None:
    pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    with pytest.raises(ValueError, match="outside"):
        uem_score(X, Score(torch.zeros(1, 8), torch.zeros(2, 1), 0), LANES)


@pytest.mark.parametrize("halves", [{"weight": X}, {"bias": X}, {"scale": X}, {"shift": X}])
def test_half_a_norm_is_refused(halves: dict) -> None:
    with pytest.raises(ValueError, match="weight with bias"):
        Norm(1e-5, **halves)
