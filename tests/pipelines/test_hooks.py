"""Beside modes, dtypes, and others that hook, offload or compile the same modules."""

import copy
import io
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import adadiff
from adadiff.pipelines.enable import enabled
from pipelines.helpers import RANDOM, STEPS, B, Scripted, check_rows, difference, own, run, with_policy
from pipelines.pipes import draw, pipeline
from pipelines.zoo import call, inputs, parts_of


def test_inference_mode_and_autocast() -> None:
    name = "FluxTransformer2DModel"
    expected = run(name, range(B), STEPS, RANDOM)
    module = own(name)
    adadiff.enable(module, RANDOM)
    with torch.inference_mode():
        outputs = [parts_of(module(**inputs(name, range(B), step), return_dict=False)) for step in range(STEPS)]
    assert difference(outputs, expected) == 0
    adadiff.disable(module)
    with torch.autocast("cpu", torch.bfloat16):
        check = with_policy(module, RANDOM, lambda step: call(name, range(B), step, module))
        plain = [call(name, range(B), step, module) for step in range(STEPS)]
    full = torch.tensor(RANDOM.full)
    assert all(torch.equal(check[step][0][full[step]], plain[step][0][full[step]]) or step for step in range(STEPS))
    torch.testing.assert_close(check[3][0].float(), expected[3][0], rtol=0.1, atol=0.1)


def test_layerwise_casting() -> None:
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    module.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    check_rows(name, module, lambda lanes, step: {})


class Counting(AccelerateHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_others_come_and_go(before: bool) -> None:
    """As accelerate offloads whole models: put on before `enable` or afterwards, and kept by `disable`."""
    name, module, hook = "SD3Transformer2DModel", own("SD3Transformer2DModel"), Counting()
    expected = run(name, range(B), STEPS, RANDOM)
    if before:
        add_hook_to_module(module, hook)
    adadiff.enable(module, RANDOM)
    if not before:
        add_hook_to_module(module, hook)
    outputs = [call(name, range(B), step, module) for step in range(STEPS)]
    assert difference(outputs, expected) == 0
    assert hook.calls == STEPS
    adadiff.disable(module)
    call(name, range(B), 0, module)
    assert hook.calls == STEPS + 1
    remove_hook_from_module(module)
    assert difference([call(name, range(B), 0, module)], [call(name, range(B), 0)]) == 0


def test_weights_that_are_elsewhere_until_they_are_called() -> None:
    """As sequential offloading keeps them."""
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    expected = run(name, range(B), STEPS, RANDOM)
    cpu_offload(module, torch.device("cpu"))
    assert any(value.is_meta for value in module.parameters())
    outputs = with_policy(module, RANDOM, lambda step: call(name, range(B), step, module))
    assert difference(outputs, expected) == 0


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind: str) -> None:
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    cpu = torch.device("cpu")
    groups = {} if kind == "leaf_level" else {"num_blocks_per_group": 1}
    apply_group_offloading(module, cpu, cpu, kind, **groups)
    check_rows(name, module, lambda lanes, step: {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before"),
    [("SD3Transformer2DModel", True), ("SD3Transformer2DModel", False), ("FluxTransformer2DModel", True)],
)
def test_compiled_blocks_have_one_graph_for_any_number_of_rows(name: str, before: bool) -> None:
    """Those of the plain network, for two rows or more, whether they lie together or apart; as many again for one row,
    of which PyTorch makes a graph of its own. A check of blocks counts as two rows."""
    module, counter = own(name), CompileCounter()
    lists = [module.transformer_blocks, getattr(module, "single_transformer_blocks", [])]
    rows = (range(B), (0, 3, 4), (1, 2), (), (0, 1, 2, 4), (2, 3, 4), range(B), (3,), (1,))
    policy = Scripted(tuple(tuple(lane in full for lane in range(B)) for full in rows))
    expected = run(name, range(B), len(rows), policy)

    def compile_blocks() -> None:
        for block in [one for blocks in lists for one in blocks]:
            block.compile(fullgraph=True, backend=counter)

    torch._dynamo.reset()
    compile_blocks()
    call(name, range(B), 0, module)
    plain = counter.frame_count
    assert plain > 0
    for block in [one for blocks in lists for one in blocks]:
        block._compiled_call_impl = None
    torch._dynamo.reset()
    counter.frame_count = 0
    if before:
        compile_blocks()
    adadiff.enable(module, policy)
    if not before:
        compile_blocks()
    outputs = [call(name, range(B), step, module) for step in range(len(rows) - 2)]
    assert counter.frame_count == plain
    outputs += [call(name, range(B), step, module) for step in range(len(rows) - 2, len(rows))]
    assert plain < counter.frame_count <= 2 * plain
    assert difference(outputs, expected) == 0
    adadiff.disable(module)
    assert difference([call(name, range(B), 0, module)], [call(name, range(B), 0)]) == 0
    assert module.transformer_blocks[0]._compiled_call_impl is not None


def test_the_input_gate_does_not_see_into_compiled_blocks() -> None:
    for before in (True, False):
        module = own("SD3Transformer2DModel")
        if before:
            module.transformer_blocks[0].compile(backend="eager")
        adadiff.enable(module, "cache:threshold=0.1,gate=input")
        if not before:
            module.transformer_blocks[0].compile(backend="eager")
        with pytest.raises(ValueError, match="gate=input cannot read inside compiled blocks"):
            call("SD3Transformer2DModel", range(B), 0, module)


def test_a_transformer_compiled_as_a_whole_is_refused() -> None:
    module = own("SD3Transformer2DModel")
    with pytest.raises(ValueError, match="is compiled as a whole; compile its blocks"):
        adadiff.enable(torch.compile(module), "reuse:every=2")
    adadiff.enable(module, "reuse:every=2")
    with pytest.raises(ValueError, match="compile only the blocks"):
        module.compile()
    adadiff.disable(module)
    module.compile()
    with pytest.raises(ValueError, match="is compiled as a whole; compile its blocks"):
        adadiff.enable(module, "reuse:every=2")


def test_copies_and_files_know_nothing_of_it() -> None:
    name, module = "FluxTransformer2DModel", own("FluxTransformer2DModel")
    names, plain = list(module.state_dict()), call("FluxTransformer2DModel", range(B), 0, module)
    adadiff.enable(module, "exit:depth=1")
    assert list(module.state_dict()) == names
    twin = copy.deepcopy(module)
    assert enabled(twin) is None
    assert [call(name, range(B), step, twin)[0].equal(plain[0]) for step in (0, 0)] == [True, True]
    with twin.cache_context("cond"):
        call(name, range(B), 1, twin)
    adadiff.enable(twin, "reuse:every=2")
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    module.to(torch.float64).to(torch.float32)
    call(name, range(B), 0, module)
    adadiff.disable(module)
    assert call(name, range(B), 0, module)[0].equal(plain[0])
    assert not vars(module).keys() & {"cache_context", "compile", "_adadiff"}


def test_weights_that_change_between_runs_count() -> None:
    name, module = "SD3Transformer2DModel", own("SD3Transformer2DModel")
    adadiff.enable(module, RANDOM)
    for step in range(STEPS):
        call(name, range(B), step, module)
    with torch.no_grad():
        module.transformer_blocks[2].ff.net[2].weight.mul_(1.5)
    outputs = [call(name, range(B), step, module) for step in range(STEPS)]
    adadiff.disable(module)
    twin = copy.deepcopy(module)
    assert difference(outputs, with_policy(twin, RANDOM, lambda step: call(name, range(B), step, twin))) == 0


def test_several_images_for_a_prompt() -> None:
    pipe = pipeline("pixart")

    def images(prompts: list[int], repeat: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)]
        return draw(pipe, "pixart", prompts, num_images_per_prompt=repeat, generator=generators)

    record = adadiff.enable(pipe, "cache:threshold=0.25")
    several = images([1, 2], 2)
    assert 0 < record.left_out < 1
    torch.testing.assert_close(several, images([1, 1, 2, 2], 1), rtol=1e-4, atol=1e-4)
