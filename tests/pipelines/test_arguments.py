"""Arguments that do not go by lane, change between blocks, or hold NaN: rows come out right, or it is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adadiff
from adadiff.pipelines.compaction import Gather
from adadiff.pipelines.enable import enabled
from adadiff.policies.reuse import Cache, Reuse
from pipelines.helpers import RANDOM, STEPS, B, check_rows, difference, of_lane, own, run, scripted, with_policy
from pipelines.zoo import call, inputs, parts_of


@pytest.mark.parametrize(
    "name",
    [
        *("FluxTransformer2DModel", "QwenImage, edit", "MochiTransformer3DModel", "Krea2Transformer2DModel"),
        *("AceStepTransformer1DModel", "LongCatAudioDiTTransformer", "JoyImageEditTransformer3DModel"),
        pytest.param("OmniGenTransformer2DModel", marks=pytest.mark.slow),
        pytest.param("CogView4Transformer2DModel", marks=pytest.mark.slow),
        pytest.param("CosmosTransformer3DModel", marks=pytest.mark.slow),
        pytest.param("HunyuanVideoTransformer3DModel", marks=pytest.mark.slow),
    ],
)
def test_shared_tables_may_have_as_many_rows_as_there_are_lanes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which those are is noted first, at a batch that no dimension equals."""
    lengths, layout = set(), Gather.layout

    def noted(self: Gather, value: Tensor, argument: str, R: int) -> Any:
        found = layout(self, value, argument, R)
        lengths.update({value.shape[0]} if found is None and value.ndim else set())
        return found

    monkeypatch.setattr(Gather, "layout", noted)
    run(name, range(B), 2, scripted("alternating", 2, B))
    monkeypatch.undo()
    tried = sorted(length for length in lengths if 1 < length <= 24)
    assert tried
    for lanes in tried:
        policy = scripted("random", 3, lanes)
        plain, outputs = run(name, range(lanes), 3), run(name, range(lanes), 3, policy)
        for lane in (0, lanes - 1):
            allowed = 2 * max(difference(of_lane(plain, lane), run(name, [lane], 3)), 1e-6)
            assert difference(of_lane(outputs, lane), run(name, [lane], 3, policy.column(lane))) <= allowed


def test_layers_that_a_call_skips() -> None:
    """SD3's guidance without some layers: calls with and without them, of two batches, keep apart."""
    module = own("SD3Transformer2DModel")
    for skipped in ([1], [3], [1, 2]):
        check_rows("SD3Transformer2DModel", module, lambda lanes, step, skipped=skipped: {"skip_layers": skipped})
    name, policy = "SD3Transformer2DModel", scripted("none", STEPS, B)
    apart = [
        with_policy(module, policy, lambda step: call(name, range(B), step, module)),
        with_policy(module, policy, lambda step: call(name, range(B), step, module, skip_layers=[2])),
    ]
    both = with_policy(
        module,
        policy,
        lambda step: [
            *call(name, range(B), step, module),
            *call(name, range(B), step, module, skip_layers=[2]),
        ],
    )
    assert difference([[parts[0]] for parts in both], apart[0]) == 0
    assert difference([[parts[1]] for parts in both], apart[1]) == 0


def residuals(lanes: list[int], step: int, count: int, tokens: int, channels: int) -> list[Tensor]:
    return [
        torch.stack(
            [torch.randn(tokens, channels, generator=torch.Generator().manual_seed(97 * lane + i)) for lane in lanes]
        )
        * (0.1 + 0.05 * step)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("FluxTransformer2DModel", {"controlnet_block_samples": 9, "controlnet_single_block_samples": 9}),
        ("ChromaTransformer2DModel", {"controlnet_block_samples": 9, "controlnet_single_block_samples": 9}),
        ("SD3Transformer2DModel", {"block_controlnet_hidden_states": 24}),
        ("QwenImageTransformer2DModel", {"controlnet_block_samples": 12}),
    ],
)
def test_residuals_of_a_controlnet(name: str, arguments: dict[str, int]) -> None:
    """Added between blocks, in place by some."""
    module = own(name)
    channels = module.inner_dim

    def more(lanes: list[int], step: int) -> dict[str, Any]:
        return {key: residuals(lanes, step, 2, tokens, channels) for key, tokens in arguments.items()}

    check_rows(name, module, more)
    # and they count once: where nothing changes, what is reused is what was computed
    outputs = []
    adadiff.enable(module, scripted("none", 2, B))
    for later in (0, 1e-6):
        given = inputs(name, range(B), 1)
        given["timestep"] = given["timestep"] * (1 - later)
        with torch.no_grad():
            outputs.append(module(**given, **more(list(range(B)), 1), return_dict=False)[0])
    assert not enabled(module).record.steps[1].full.any()
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-3)


def test_an_object_that_nobody_knows_is_refused() -> None:
    module = own("Flux2Transformer2DModel")
    before = call("Flux2Transformer2DModel", range(B), 0, module)
    adadiff.enable(module, RANDOM)

    class Store:
        """As key-value caches are."""

    block = module.transformer_blocks[1]
    block.register_forward_pre_hook(lambda *_: None)
    forward = type(block).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(block), "forward", lambda self, *a, store=None, **k: forward(self, *a, **k))
        original = type(module).forward

        def calling(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(type(block), "__call__", lambda b, *a, **k: nn.Module.__call__(b, *a, store=Store(), **k))
                return original(self, *args, **kwargs)

        patch.setattr(type(module), "forward", calling)
        with pytest.raises(ValueError, match="a block takes store: Store, which cannot be split"):
            call("Flux2Transformer2DModel", range(B), 0, module)
    adadiff.disable(module)
    assert difference([call("Flux2Transformer2DModel", range(B), 0, module)], [before]) == 0


def test_a_block_whose_rows_depend_on_each_other_is_found_at_first_use() -> None:
    module = own("PixArtTransformer2DModel")
    block = module.transformer_blocks[2]
    forward = block.forward
    block.forward = lambda hidden_states, **more: forward(hidden_states + hidden_states.mean(0), **more)
    adadiff.enable(module, RANDOM)
    with pytest.raises(ValueError, match=r"transformer_blocks\[2\] of PixArtTransformer2DModel cannot be run for some"):
        call("PixArtTransformer2DModel", range(B), 0, module)


@pytest.mark.parametrize("policy", [Cache(1e9), Cache(1e9, gate="input"), Reuse(9)], ids=str)
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_nan_never_reuses_and_stays_in_its_lane(name: str, policy: Any) -> None:
    module = own(name)

    def made(broken: bool) -> list[list[Tensor]]:
        def make(step: int) -> list[Tensor]:
            given = inputs(name, range(B), step)
            if broken and step == 2:
                given["hidden_states"][1, 0] = torch.nan
            with torch.no_grad():
                return parts_of(module(**given, return_dict=False))

        adadiff.enable(module, policy)
        outputs = [make(step) for step in range(STEPS)]
        full = [step.full.tolist() for step in enabled(module).record.steps]
        adadiff.disable(module)
        others = [True] * 5, *[[False, broken and step > 1, False, False, False] for step in (1, 2)]
        assert full[:3] == [*others]
        return outputs

    sound, broken = made(False), made(True)
    for step in range(STEPS):
        for a, b in zip(sound[step], broken[step], strict=True):
            assert bool(b[1].isnan().any()) == (step == 2) or step == 3
            torch.testing.assert_close(a[[0, 2, 3, 4]], b[[0, 2, 3, 4]], rtol=0, atol=1e-5)
