"""Which argument a block's output is the next value of does not depend on values, and so not on a lane's neighbours."""

import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.pipelines.families import Family
from adadiff.pipelines.layout import outputs_of
from adadiff.pipelines.self_check import ALONE, BESIDE, same
from adadiff.policies.reuse import Cache
from pipelines.helpers import B, enabled
from pipelines.zoo import CASES, call, network


def sources(output: object, **arguments: Tensor) -> tuple[str | None, ...]:
    return outputs_of(output, arguments, Family(), 2).sources


@pytest.mark.parametrize(
    "beside", ["skip", "temb", "extra_pos_emb", "image_rotary_emb", "pos_embeds", "freqs_cos", "encoder_hidden_states"]
)
def test_a_single_output_is_the_hidden_states_whatever_lies_nearer(beside: str) -> None:
    """Also where the hidden states are not named so, and where all are taken in another order."""
    near, output = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    far = torch.full((2, 3, 4), 9.0)
    assert sources(output, **{beside: near, "hidden_states": far}) == ("hidden_states",)
    assert sources(output, **{"x": far, beside: near}) == ("x",)
    if beside != "encoder_hidden_states":
        assert sources((output,), **{beside: near, "img": far}) == ("img",)
        assert sources(output, **{beside: near}) == (beside,)  # there is no other


def test_two_streams_of_one_shape_come_in_any_order() -> None:
    text, image = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 9.0)
    given = {"hidden_states": image, "encoder_hidden_states": text, "skip": torch.full((2, 3, 4), 8.5)}
    assert sources((text + 0.1, image - 0.4), **given) == ("encoder_hidden_states", "hidden_states")
    assert sources((image - 0.4, text + 0.1), **given) == ("hidden_states", "encoder_hidden_states")


@pytest.mark.parametrize("gate", ["residual", "input"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "ErnieImageTransformer2DModel",
            "HunyuanDiT, long skips",
            "FluxTransformer2DModel",
            "Lumina2Transformer2DModel",
        ),
        pytest.param("CosmosTransformer3DModel", marks=[pytest.mark.slow] * CASES["CosmosTransformer3DModel"].slow),
    ],
)
def test_what_a_gate_reads_of_a_lane_is_the_lanes_own(name: str, gate: str) -> None:
    """The change of every lane at every step, beside its run alone. Nobody reuses, so that steps are alike."""
    found = {}
    for lanes in (range(B), *[[lane] for lane in range(B)]):
        record = enabled(name, Cache(0.0, gate=gate))
        for step in range(4):
            call(name, lanes, step)
        found[tuple(lanes)] = torch.stack([step.change for step in record.steps])
        adadiff.disable(network(name))
    together = found[tuple(range(B))]
    assert bool(together[1:].isfinite().all())
    assert float(together[1:].max()) > 1e-3
    for lane in range(B):
        torch.testing.assert_close(together[1:, lane], found[lane,][1:, 0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", list(ALONE), ids=str)
def test_rows_alone_are_compared_up_to_rounding(dtype: torch.dtype) -> None:
    """A tenth of what a block adds is seen, rounding passes."""
    draw = torch.Generator().manual_seed(0)
    came, added = (torch.randn(2, 30, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    came, added = came * 4, added * 0.7
    whole, rounded = (came + added).to(dtype), (came + added * (1 + 0.4 * torch.finfo(dtype).eps)).to(dtype)
    assert same(rounded, whole, came.to(dtype), ALONE)
    assert not same((came + 1.1 * added).to(dtype), whole, came.to(dtype), ALONE)


@pytest.mark.parametrize("dtype", list(BESIDE), ids=str)
def test_rows_beside_others_are_compared_more_closely(dtype: torch.dtype) -> None:
    """One in a hundred numbers may be rounded to the next one. Not a hundredth of what a block adds."""
    draw = torch.Generator().manual_seed(0)
    came, added = (torch.randn(2, 30, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    came, added = came * 4, added * 0.7
    whole = (came + added).to(dtype)
    rounded = whole.clone()
    rounded.view(-1)[::100] *= 1 + torch.finfo(dtype).eps
    assert not torch.equal(rounded, whole)
    assert same(rounded, whole, came.to(dtype), BESIDE)
    assert not same((came + 1.01 * added).to(dtype), whole, came.to(dtype), BESIDE)
