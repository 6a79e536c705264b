"""Every transformer class of the installed diffusers: rows that reuse, beside rows that do not.

Lanes have their own samples, texts and times, so that a row of another lane shows."""

import diffusers
import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin

import adadiff
from adadiff.pipelines.enable import enabled as reused
from adadiff.pipelines.families import TIME, family_of
from pipelines.helpers import LinearRows, difference, enabled, of_lane, run, scripted
from pipelines.zoo import CASES, call, inputs, kind_of, network, parts_of

B, STEPS = 5, 3
PATTERNS = ("none", "alternating", "single", "random")
EVERY = [pytest.param(name, marks=[pytest.mark.slow] if case.slow else []) for name, case in CASES.items()]
OTHERS = {
    "AnyFlowFARTransformer3DModel": "chunks with a key-value cache",
    "BriaFibo2Transformer2DModel": "not tried",
    "Cosmos3OmniTransformer": "refused: all samples are packed into one sequence",
    "DreamLiteTransformer2DModel": "a part of a UNet",
    "Flux3Transformer2DModel": "not tried: its blocks lie in a ModuleDict",
    "JoyImageEditPlusTransformer3DModel": "not tried: shapes by sample",
    "Kandinsky6SRTransformer3DModel": "not tried",
    "Kandinsky6Transformer3DModel": "not tried",
    "MiniMaxH3Transformer3DModel": "refused: times are looked up over the whole batch",
    "PriorTransformer": "one step before the pipeline's own",
    "QwenImage21Transformer2DModel": "not tried",
    "RFD4ProteinaTransformer": "proteins",
    "SanaWMLTX2RefinerTransformer3DModel": "not tried",
    "SanaWMTransformer3DModel": "not tried",
    "StableAudio3DiTModel": "not tried",
    "Transformer2DModel": "a part of a UNet",
    "TransformerTemporalModel": "a part of a UNet",
    "WanAnimate2Transformer3DModel": "a key-value cache",
}


def limit(name: str, plain: list) -> float:
    """Twice what the untouched network's rows differ by from its own rows alone."""
    alone = [difference(of_lane(plain, lane), run(name, [lane], STEPS)) for lane in range(B)]
    largest = max(float(part.abs().max()) for parts in plain for part in parts)
    return 2 * max(*alone, torch.finfo(torch.float32).eps * largest)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_left_out_and_disabled_are_the_same_bits(name: str) -> None:
    plain = run(name, range(B), STEPS)
    assert all(part.isfinite().all() for parts in plain for part in parts)
    assert difference(run(name, range(B), STEPS, scripted("all", STEPS, B)), plain) == 0
    assert difference(run(name, range(B), STEPS), plain) == 0  # disabled again
    assert not any(module._compiled_call_impl for module in network(name).modules())


@pytest.mark.parametrize("name", EVERY)
def test_each_row_is_its_run_alone_and_only_rows_that_run_are_computed(name: str) -> None:
    plain = run(name, range(B), STEPS)
    allowed = limit(name, plain)
    for pattern in PATTERNS:
        policy, outputs = scripted(pattern, STEPS, B), []
        record = enabled(name, policy)
        layout_of = reused(network(name))
        outputs.append(call(name, range(B), 0))
        (layout,) = layout_of._layouts.values()
        called = [planned.block for planned in layout.calls]
        later = [layout_of._blocks[block].module for block in called[layout.head :]]
        with LinearRows(later) as rows:
            outputs += [call(name, range(B), step) for step in range(1, STEPS)]
        adadiff.disable(network(name))
        for lane in range(B):
            alone = run(name, [lane], STEPS, policy.column(lane))
            assert difference(of_lane(outputs, lane), alone) <= allowed, (pattern, lane)
        assert difference(outputs, plain) > 100 * allowed, "reuse changes nothing, so that nothing is told"
        with LinearRows(later) as once:
            call(name, [0], 0)
        full = sum(sum(step) for step in policy.full[1:])
        assert {key: value for key, value in rows.read.items() if value} == {
            key: value * full for key, value in once.read.items() if value * full
        }
        assert [step.full.tolist() for step in record.steps] == [list(step) for step in policy.full]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        *(pytest.param(*case.values, 0, marks=case.marks) for case in EVERY),
        *(("LatteTransformer3DModel", 1), ("LatteTransformer3DModel", 2)),  # its two lists take turns
        *(("FluxTransformer2DModel", 1), ("FluxTransformer2DModel", 4), ("MotifVideoTransformer3DModel", 1)),
    ],
)
def test_reuse_is_exact_where_nothing_has_changed(name: str, last: int) -> None:
    """The same call again, hardly later: what code between blocks adds counts once."""

    def again(later: float) -> list[torch.Tensor]:
        given = inputs(name, range(B), 2)
        time = next(key for key in TIME if key in given)
        sign = -1 if family_of(network(name)).rising else 1
        given[time] = given[time] * (1 - sign * later)
        with torch.no_grad():
            return parts_of(network(name)(**given, return_dict=False))

    record = enabled(name, scripted("none", 2, B, last=last))
    outputs = [again(0), again(1e-6)]
    adadiff.disable(network(name))
    assert [step.full.tolist() for step in record.steps] == [[True] * B, [False] * B]
    assert record.steps[1].blocks.max() < record.num_blocks
    for full, reused_again in zip(*outputs, strict=True):
        torch.testing.assert_close(reused_again, full, rtol=0, atol=2e-3 * float(full.abs().max()))


@pytest.mark.parametrize(("first", "last"), [(2, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize(
    "name",
    [
        *("DiTTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel", "AuraFlowTransformer2DModel"),
        *("LatteTransformer3DModel", "MotifVideoTransformer3DModel", "HunyuanVideoTransformer3DModel"),
        *("WanVACETransformer3DModel", "OmniGenTransformer2DModel"),
    ],
)
def test_first_and_last_blocks_always_run(name: str, first: int, last: int) -> None:
    plain = run(name, range(B), STEPS)
    allowed = limit(name, plain)
    policy = scripted("random", STEPS, B, first, last)
    record = enabled(name, policy)
    outputs = [call(name, range(B), step) for step in range(STEPS)]
    adadiff.disable(network(name))
    for lane in range(B):
        assert difference(of_lane(outputs, lane), run(name, [lane], STEPS, policy.column(lane))) <= allowed, lane
    assert difference(outputs, plain) > 100 * allowed
    blocks = record.num_blocks
    for step, full in zip(record.steps, policy.full, strict=True):
        ran = [blocks if own else step.blocks.min() for own in full]
        assert step.blocks.tolist() == ran
        assert all(own or int(count) <= blocks - 1 for own, count in zip(full, ran, strict=True))
    if name in ("DiTTransformer2DModel", "SD3Transformer2DModel"):
        assert set(record.steps[1].blocks.tolist()) == {first + last, blocks}


def test_every_class_of_the_installed_diffusers_is_tried_or_named() -> None:
    there = set()
    for name in dir(diffusers):
        if "Transformer" in name or "DiTModel" in name or name.endswith("DiT2DModel"):
            kind = getattr(diffusers, name)
            if isinstance(kind, type) and issubclass(kind, ModelMixin) and "ControlNet" not in name:
                there.add(name)
    tried = {kind_of(name).__name__ for name in CASES}
    assert len(tried) >= 40
    assert not tried & OTHERS.keys()
    assert there - tried <= OTHERS.keys(), there - tried - OTHERS.keys()
