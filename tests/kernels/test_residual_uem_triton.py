"""The Triton kernel of the fused pass: against float64, and what its launcher refuses. Interpreted without a GPU."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adadiff_kernels import Norm, Score, residual_uem
from fused import BRAIN, DEVICE, DTYPES, HALF, SINGLE, Problem, check

pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = [  # n rows, T tokens, D channels, P outputs, prefix tokens, B lanes; most tiles do not end where a row ends
    pytest.param((2, 17, 384, 1, 1, 5), id="one-token-over"),
    pytest.param((2, 65, 128, 1, 1, 3), id="one-chunk"),
    pytest.param((2, 17, 1152, 16, 1, 4), id="no-power-of-two"),
    pytest.param((3, 7, 33, 3, 1, 3), id="odd"),  # masked channels, tokens and outputs
    pytest.param((1, 1, 1, 1, 0, 1), id="one-element"),
    pytest.param((0, 9, 20, 1, 0, 6), id="no-rows"),
]
LARGE = [
    pytest.param((1, 257, 128, 12, 1, 2), id="map-of-12"),
    pytest.param((1, 258, 128, 1, 2, 2), id="classes"),
    pytest.param((1, 334, 128, 1, 78, 2), id="text"),  # whole tiles of num_prefix_tokens
    pytest.param((1, 1024, 128, 64, 0, 1), id="map-of-64"),
    pytest.param((1, 17, 1536, 1, 0, 2), id="widest"),
]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_states_the_formula(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(Problem(shape, dtypes), "affine")


@pytest.mark.parametrize("shape", LARGE)
def test_states_the_formula_at_real_lengths(shape: tuple[int, ...]) -> None:
    check(Problem(shape, (BRAIN, BRAIN)), "affine")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("norm", ["plain", "modulated"])
def test_other_norms(norm: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(Problem((3, 19, 160, 1, 2, 7), dtypes), norm)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF])
def test_weights_in_the_dtype_of_the_rows(dtype: torch.dtype) -> None:
    for outputs in (1, 4):
        check(Problem((2, 19, 160, outputs, 2, 3), (dtype, dtype), dtype), "affine")


@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_norm_of_rows_far_from_zero_keeps_its_digits(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The mean goes first: sums of squares would leave nothing of a deviation of 1 around 200."""
    p = Problem((1, 5, 130, 1, 0, 1), dtypes)
    p.x += 200
    check(p, "plain")


@pytest.mark.parametrize("outputs", [1, 12])
def test_a_row_has_the_same_bits_in_any_batch(outputs: int) -> None:
    p = Problem((5, 35, 96, outputs, 1, 9), (BRAIN, BRAIN))
    together = p.run("modulated")
    order = [3, 0, 4, 1, 2]
    for rows in (order, [2], [4, 1]):
        part = Problem((5, 35, 96, outputs, 1, 9), (BRAIN, BRAIN))
        part.x, part.branch, part.lanes = (value[rows].clone() for value in (p.x, p.branch, p.lanes))
        for mine, whole in zip(part.run("modulated"), together, strict=True):
            assert torch.equal(mine, whole[rows])


@pytest.mark.parametrize("outputs", [1, 4])
def test_extra_tokens_are_summed_and_normalised_but_have_no_say(outputs: int) -> None:
    p = Problem((2, 40, 64, outputs, 18, 3), (SINGLE, SINGLE))
    y, h, u = p.run()
    p.x[:, :18] = math.nan
    hurt_y, hurt_h, hurt_u = p.run()
    assert torch.equal(hurt_u, u)
    assert hurt_y[:, :18].isnan().all()
    assert hurt_h[:, :18].isnan().all()
    assert torch.equal(hurt_y[:, 18:], y[:, 18:])
    assert torch.equal(hurt_h[:, 18:], h[:, 18:])


@pytest.mark.parametrize("outputs", [1, 4])
def test_nan_stays_in_its_row(outputs: int) -> None:
    p = Problem((3, 35, 64, outputs, 1, 3), (SINGLE, SINGLE))
    clean = p.run()
    p.branch[1, 34, 63] = math.nan
    hurt = p.run()
    assert hurt[2].isnan().tolist() == [False, True, False]
    for before, after in zip(clean, hurt, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


@pytest.mark.parametrize("target", ["x", "branch", "part"])
def test_out_receives_the_sum_and_its_neighbours_stay(target: str) -> None:
    p = Problem((2, 18, 200, 1, 2, 3), (SINGLE, SINGLE))
    want = p.run()
    whole = torch.full((5, 18, 200), 7.0, device=DEVICE)
    out = {"x": p.x, "branch": p.branch, "part": whole[2:4]}[target]
    got = p.run(out=out)
    assert got[0].data_ptr() == out.data_ptr()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    assert bool((whole[[0, 1, 4]] == 7).all())


def test_norm_out_receives_the_normalised_rows_and_its_neighbours_stay() -> None:
    p = Problem((2, 18, 200, 1, 2, 3), (BRAIN, BRAIN))
    want = p.run()
    whole = torch.full((5, 18, 200), 7.0, device=DEVICE, dtype=BRAIN)
    got = p.run(out=p.x, norm_out=whole[2:4])
    assert got[1].data_ptr() == whole[2:4].data_ptr()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    assert bool((whole[[0, 1, 4]] == 7).all())


def test_what_is_not_asked_for_is_not_made() -> None:
    p = Problem((2, 18, 96, 1, 2, 3), (SINGLE, SINGLE))
    y, h, u = p.run(None, gate=None, bias=None, score=None)
    assert torch.equal(y, p.x + p.branch)
    assert h is None
    assert u is None
    whole = p.run("affine")
    assert torch.equal(p.run(None)[2], whole[2])
    assert torch.equal(p.run("affine", score=None)[1], whole[1])


def test_an_offset_for_all_lanes_may_be_expanded() -> None:
    p = Problem((2, 18, 96, 3, 2, 3), (SINGLE, SINGLE))
    row = p.score.offset[:1]
    expanded = Score(p.score.weight, row.expand(3, 3), 2)
    copied = Score(p.score.weight, row.repeat(3, 1), 2)
    assert torch.equal(p.run(score=expanded)[2], p.run(score=copied)[2])


@pytest.mark.parametrize("outputs", [1, 12])
def test_tickets_are_left_as_they_were_found(outputs: int) -> None:
    """One tensor serves calls of any number of rows and tokens, one after the other."""
    tickets = torch.zeros(9, dtype=torch.int32, device=DEVICE)
    for n, T in ((5, 35), (2, 70), (5, 1), (0, 35), (5, 35)):
        p = Problem((n, T, 40, outputs, 0, 6), (SINGLE, SINGLE))
        alone = p.run()[2]
        p.score = replace(p.score, tickets=tickets)
        assert torch.equal(p.run()[2], alone)
        assert not tickets.any()


def other_device(value: Tensor) -> Tensor:
    return value.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"x": p.x.double(), "out": None}, "x must be float32 or bfloat16 or float16, got float64"),
        (lambda p: {"x": p.x.mT.contiguous().mT}, "x must be contiguous, got strides"),
        (lambda p: {"branch": p.branch.mT.contiguous().mT}, "branch must be contiguous"),
        (lambda p: {"branch": other_device(p.branch)}, "branch must be on (cpu|cuda:0), got meta"),
        (lambda p: {"row_to_lane": p.lanes.long(), "score": None}, "row_to_lane must be int32, got int64"),
        (lambda p: {"gate": p.gate.T.contiguous().T}, "gate must have contiguous rows"),
        (lambda p: {"gate": other_device(p.gate)}, "gate must be on (cpu|cuda:0), got meta"),
        (lambda p: {"bias": p.bias.double()}, "bias must be float32 or .* got float64"),
        (lambda p: {"out": torch.ones(2, 16, 5, device=DEVICE).mT}, "out must be contiguous"),
        (lambda p: {"norm": Norm(1e-6, p.bias[:3], p.bias)}, r"norm.weight must be \[16\], got \[3\]"),
        (lambda p: {"norm": Norm(1e-6, None, None, p.gate, p.gate[:, :3])}, r"norm.shift must be \[B, 16\]"),
        (lambda p: {"score": Score(p.x.new_zeros(65, 16), p.x.new_zeros(3, 65), 0)}, "1 to 64 outputs a token, got 65"),
        (lambda p: {"score": replace(p.score, tickets=torch.zeros(4, dtype=torch.int32)[::2])}, "tickets must be cont"),
        (lambda p: {"score": Score(p.x.new_zeros(16, 2).T, p.x.new_zeros(3, 2), 0)}, "score.weight must be contiguous"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(change, message: str) -> None:
    p = Problem((2, 5, 16, 1, 0, 3), (SINGLE, SINGLE))
    given = {"x": p.x, "branch": p.branch, "row_to_lane": p.lanes, "out": torch.ones_like(p.x)}
    given |= change(p)
    with pytest.raises(ValueError, match=message):
        residual_uem(given.pop("x"), given.pop("branch"), **given, backend="triton")
    assert given["out"] is None or bool((given["out"] == 1).all())


def test_rows_too_wide_for_registers_are_refused() -> None:
    x = torch.zeros(1, 2, 1537, device=DEVICE)
    with pytest.raises(ValueError, match="1 to 1536 channels fit in registers, got 1537"):
        residual_uem(x, x, row_to_lane=torch.zeros(1, dtype=torch.int32, device=DEVICE), backend="triton")
