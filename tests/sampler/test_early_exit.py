"""`enable` with exit policies: early exit in a DiTPipeline of diffusers, through its own blocks or through ours."""

import copy
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

import adadiff
from adadiff.config import ModelConfig
from adadiff.conversion.convert import from_transformer
from adadiff.models.dit import DiTConfig
from adadiff.pipelines import early_exit
from adadiff.pipelines.early_exit import DiffusersDiT, record_of
from adadiff.uem import ExitConfig, Exits
from sampler.test_calibration import HALF, MOST
from sampler.test_calibration import made as calibration
from sampler.tiny import scramble

LAYERS = 5
SHARED = ExitConfig(shared_head=True)


@cache
def parts(seed: int = 0) -> tuple[DiTTransformer2DModel, AutoencoderKL]:
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=LAYERS,
        sample_size=6,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    scramble(transformer, 0.15, seed)
    first = transformer.transformer_blocks[0].norm1.emb  # every block has a copy of the one embedder
    for block in transformer.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=6)
    return transformer.eval().requires_grad_(False), vae.eval().requires_grad_(False)


@pytest.fixture
def pipe() -> DiTPipeline:
    made = DiTPipeline(*parts(), DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    yield made
    if record_of(made.transformer) is not None:
        adadiff.disable(made)


def exits() -> Exits:
    made = Exits(DiffusersDiT(parts()[0]), SHARED).requires_grad_(False)
    scramble(made, 0.3, seed=2)
    return made


def draw(pipe: DiTPipeline, guidance: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    labels = [7, 1, 999]
    return pipe(labels, guidance, generator, num_inference_steps=4, output_type="pt").images


def lanes(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, 6, 6, generator=generator)
    return x, torch.linspace(3, 990, n).long(), torch.randint(1001, (n,), generator=generator)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("policy", ["full", "exit:0.000001"])
def test_where_nobody_exits_images_are_the_same_bits(policy: str, guidance: float, pipe: DiTPipeline) -> None:
    plain = draw(pipe, guidance)
    record = adadiff.enable(pipe, policy, exits=exits())
    assert torch.equal(draw(pipe, guidance), plain)
    passes = 4 * (6 if guidance > 1 else 3)
    assert (record.totals.passes, record.totals.blocks) == (passes, passes * LAYERS)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("policy", ["full", "exit:0.000001"])
def test_through_our_blocks_images_are_the_same_but_for_rounding(
    policy: str, guidance: float, pipe: DiTPipeline
) -> None:
    plain = draw(pipe, guidance)
    record = adadiff.enable(pipe, policy, exits=exits(), fused=True)
    torch.testing.assert_close(draw(pipe, guidance), plain, rtol=0, atol=1e-5)
    assert record.totals.blocks == record.totals.passes * LAYERS > 0


def test_both_paths_exit_alike(pipe: DiTPipeline) -> None:
    x, t, labels = lanes()
    outputs, layers = [], []
    for fused in (False, True):
        record = adadiff.enable(pipe, "exit:0.17", exits=exits(), fused=fused)
        outputs.append(pipe.transformer(x, timestep=t, class_labels=labels).sample)
        layers.append(record.exit_layer.tolist())
        adadiff.disable(pipe)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert layers[0] == layers[1]
    assert outputs[0].shape == (6, 8, 6, 6)


def test_heads_of_their_own_run_through_our_blocks(pipe: DiTPipeline) -> None:
    x, t, labels = lanes()
    ours = from_transformer(pipe.transformer.state_dict(), pipe.transformer.config)
    with_heads = Exits(ours, ExitConfig()).requires_grad_(False)
    scramble(with_heads, 0.3, seed=4)
    adadiff.enable(pipe, "exit:depth=2", exits=with_heads, fused=True)
    got = pipe.transformer(x, timestep=t, class_labels=labels).sample
    rows, cond = ours.embed(x, t.float(), labels)
    for block in ours.blocks[:2]:
        rows = block(rows, cond)
    torch.testing.assert_close(got, with_heads.heads[1](rows, cond, torch.arange(6)), rtol=1e-4, atol=1e-5)


def by_hand(x: Tensor, t: Tensor, label: Tensor, weights: Exits, threshold: float) -> tuple[Tensor, int]:
    """One lane through the transformer's modules: it exits after the first block below the threshold."""
    own = parts()[0]
    rows, t, label = own.pos_embed(x[None]), t[None], label[None]
    time = own.transformer_blocks[0].norm1.emb.timestep_embedder(
        own.transformer_blocks[0].norm1.emb.time_proj(t).to(rows.dtype)
    )
    for layer, block in enumerate(own.transformer_blocks, start=1):
        rows = block(rows, timestep=t, class_labels=label)
        offset = time[0] @ weights.time_weight[layer - 1, 0] + weights.bias[layer - 1]
        if layer < LAYERS and float(torch.sigmoid(rows[0] @ weights.weight[layer - 1, 0] + offset).mean()) < threshold:
            break
    both = own.transformer_blocks[0].norm1.emb(t, label, hidden_dtype=rows.dtype)
    shift, scale = own.proj_out_1(F.silu(both)).chunk(2, dim=1)
    patches = own.proj_out_2(own.norm_out(rows) * (1 + scale[:, None]) + shift[:, None])[0]
    image = torch.empty(8, 6, 6)
    for k, patch in enumerate(patches.view(9, 2, 2, 8)):
        row, column = divmod(k, 3)
        image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.permute(2, 0, 1)
    return image, layer


def test_every_lane_exits_on_its_own(pipe: DiTPipeline) -> None:
    x, t, labels = lanes()
    record = adadiff.enable(pipe, "exit:0.17", exits=exits())
    got = pipe.transformer(x, timestep=t, class_labels=labels).sample
    wanted = [by_hand(*lane, exits(), 0.17) for lane in zip(x, t, labels, strict=True)]
    torch.testing.assert_close(got, torch.stack([image for image, _ in wanted]), rtol=1e-4, atol=1e-5)
    assert record.exit_layer.tolist() == [layer for _, layer in wanted]
    assert len(set(record.exit_layer.tolist())) > 2
    assert record.totals.macs < record.totals.macs_full
    assert torch.equal(pipe.transformer(x, timestep=t, class_labels=labels, return_dict=False)[0], got)


def test_a_fixed_depth_is_a_shorter_transformer(pipe: DiTPipeline) -> None:
    x, t, labels = lanes()
    adadiff.enable(pipe, "exit:depth=2", exits=exits())
    got = pipe.transformer(x, timestep=t, class_labels=labels).sample
    adadiff.disable(pipe)
    blocks = pipe.transformer.transformer_blocks
    pipe.transformer.transformer_blocks = blocks[:2]
    try:
        wanted = pipe.transformer(x, timestep=t, class_labels=labels).sample
    finally:
        pipe.transformer.transformer_blocks = blocks
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_disabled_it_is_as_it_was(pipe: DiTPipeline) -> None:
    plain, forward = draw(pipe), type(pipe.transformer).forward
    adadiff.enable(pipe, "exit:0.5", exits=exits())
    assert not torch.equal(draw(pipe), plain)
    adadiff.disable(pipe)
    assert torch.equal(draw(pipe), plain)
    assert pipe.transformer.forward.__func__ is forward
    adadiff.enable(pipe, "full", exits=exits())  # and once more


def test_the_plain_pipeline_s_report_is_kept_call_by_call(pipe: DiTPipeline) -> None:
    record = adadiff.enable(pipe, "exit:depth=3", exits=exits())
    for _ in range(2):
        draw(pipe)
    assert (record.totals.ticks, record.totals.passes, record.totals.blocks) == (8, 24, 72)
    assert record.exit_layer.tolist() == [3, 3, 3]


# ---- what changes after early exit was enabled ----


def other_weights() -> dict[str, Tensor]:
    return parts(7)[0].state_dict()


def copy_through_data(own: nn.Module) -> None:
    """As averages are swapped in."""
    for value, other in zip(own.parameters(), parts(7)[0].parameters(), strict=True):
        value.data.copy_(other)


def merge(own: nn.Module) -> None:
    """As adapters are merged: one weight, through `.data`."""
    own.transformer_blocks[2].attn1.to_v.weight.data += 0.5


def edit_one_value(own: nn.Module) -> None:
    own.transformer_blocks[3].ff.net[2].weight.data[5, 7] += 30


def step(own: nn.Module) -> None:
    own.proj_out_2.weight.requires_grad_(True).grad = torch.ones_like(own.proj_out_2.weight)
    torch.optim.SGD([own.proj_out_2.weight], 0.1).step()
    own.requires_grad_(False)


def replace_a_parameter(own: nn.Module) -> None:
    own.transformer_blocks[1].attn1.to_q.bias = nn.Parameter(torch.full((24,), 0.7), requires_grad=False)


def replace_a_block(own: nn.Module) -> None:
    own.transformer_blocks[4] = copy.deepcopy(own.transformer_blocks[0])


def put_other_memory(own: nn.Module) -> None:
    for value in own.parameters():
        value.data = value.data * 1.5


def swap_and_back(own: nn.Module) -> None:
    """Twice, so that the first memory may be used again."""
    for _ in range(2):
        put_other_memory(own)


def edit_in_inference_mode(own: nn.Module) -> None:
    with torch.inference_mode():
        own.proj_out_1.weight.mul_(3)


CHANGES = {
    "load_state_dict": lambda own: own.load_state_dict(other_weights()),
    "load_state_dict, assigned": lambda own: own.load_state_dict(other_weights(), assign=True),
    "float64": nn.Module.double,
    "bfloat16": nn.Module.bfloat16,
    "bfloat16 and back": lambda own: own.bfloat16().float(),
    **{
        change.__name__.replace("_", " "): change
        for change in (
            *(copy_through_data, merge, edit_one_value, step, replace_a_parameter, replace_a_block, put_other_memory),
            *(swap_and_back, edit_in_inference_mode),
        )
    },
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_afterwards_counts(change: str, fused: bool) -> None:
    """The transformer without the hook says what is right, before and after."""
    pipe = DiTPipeline(copy.deepcopy(parts()[0]), parts()[1], DDIMScheduler(clip_sample=False))
    own = pipe.transformer
    adadiff.enable(pipe, "full", exits=exits(), fused=fused)

    def predict() -> tuple[Tensor, Tensor]:
        x, t, labels = lanes()
        given = {"hidden_states": x.to(own.dtype), "timestep": t, "class_labels": labels}
        return own(**given).sample, type(own).forward(own, **given).sample

    def right(found: Tensor, wanted: Tensor) -> None:
        # the position embedding, which is not among the weights, is rounded in theirs and exact in ours
        rounded = {torch.bfloat16: 0.1, torch.float32: 0.01}[own.dtype] if "16" in change else 1e-4
        tolerance = {"rtol": rounded, "atol": rounded}
        torch.testing.assert_close(found, wanted, **tolerance)

    before, wanted = predict()
    right(before, wanted)
    with torch.no_grad():
        CHANGES[change](own)
    after, wanted = predict()
    right(after, wanted)
    if "16" not in change and change != "float64":
        assert not torch.allclose(after, before, rtol=0.01, atol=0.01)
    again, _ = predict()
    assert torch.equal(after, again)


def test_a_copy_is_made_once_for_the_same_weights(monkeypatch: pytest.MonkeyPatch, pipe: DiTPipeline) -> None:
    made, of = [], early_exit.from_transformer
    monkeypatch.setattr(early_exit, "from_transformer", lambda *given: made.append(1) or of(*given))
    adadiff.enable(pipe, "full", exits=exits(), fused=True)
    draw(pipe)
    draw(pipe)
    assert len(made) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_exits_with_heads_follow_the_transformer(dtype: torch.dtype) -> None:
    pipe = DiTPipeline(copy.deepcopy(parts()[0]), parts()[1], DDIMScheduler(clip_sample=False))
    ours = from_transformer(pipe.transformer.state_dict(), pipe.transformer.config)
    with_heads = Exits(ours, ExitConfig()).requires_grad_(False)
    scramble(with_heads, 0.3, seed=4)
    adadiff.enable(pipe, "exit:depth=2", exits=with_heads, fused=True)
    x, t, labels = lanes()
    before = pipe.transformer(x, timestep=t, class_labels=labels).sample
    pipe.transformer.to(dtype)
    after = pipe.transformer(x.to(dtype), timestep=t, class_labels=labels).sample
    assert after.dtype == dtype
    torch.testing.assert_close(after.float(), before, rtol=0.1, atol=0.2)
    assert with_heads.weight.dtype == next(with_heads.heads.parameters()).dtype == torch.float32  # left as they were
    with torch.no_grad():
        for value in with_heads.heads[1].parameters():
            value.data.mul_(0)
    assert not pipe.transformer(x.to(dtype), timestep=t, class_labels=labels).sample.any()


def test_an_enabled_transformer_is_not_copied(pipe: DiTPipeline) -> None:
    """Its copy would run with the blocks of the original."""
    adadiff.enable(pipe, "exit:depth=3", exits=exits())
    with pytest.raises(ValueError, match="cannot be copied; call disable first"):
        copy.deepcopy(pipe.transformer)
    with pytest.raises(ValueError, match="cannot be pickled; call disable first"):
        pickle.dumps(pipe.transformer)
    adadiff.disable(pipe)
    assert all(map(torch.equal, copy.deepcopy(pipe.transformer).parameters(), pipe.transformer.parameters()))


def test_another_number_of_blocks_is_refused() -> None:
    pipe = DiTPipeline(copy.deepcopy(parts()[0]), parts()[1], DDIMScheduler(clip_sample=False))
    adadiff.enable(pipe, "full", exits=exits())
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:3]
    x, t, labels = lanes()
    with pytest.raises(ValueError, match="another number of blocks now"):
        pipe.transformer(x, timestep=t, class_labels=labels)


def test_offloaded_weights_cannot_be_copied() -> None:
    pipe = DiTPipeline(copy.deepcopy(parts()[0]).to("meta"), parts()[1], DDIMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="fused=True copies all weights, and some are offloaded"):
        adadiff.enable(pipe, "full", fused=True)


def calibrated() -> adadiff.Model:
    """Exits for the transformer, and thresholds for two shares of the work at three times."""
    network = DiTConfig(6, 4, 2, 24, LAYERS, 2, num_classes=1001)
    model = adadiff.Model(ModelConfig(network, "linear", null_label=1000, exits=SHARED)).requires_grad_(False).eval()
    model.exits.load_state_dict(exits().state_dict())
    model.calibration = calibration(HALF, MOST)
    return model


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["exit:budget=0.5", "exit:budget=0.9", "exit:table=0.5"])
def test_budgets_are_those_of_the_models_calibration(
    policy: str, fused: bool, pipe: DiTPipeline, tmp_path: Path
) -> None:
    """Given the model or its file, lanes exit as by the thresholds in it."""
    (x, t, labels), model = lanes(), calibrated()
    adadiff.save(model, tmp_path / "exits.safetensors")
    kind, share = policy.removeprefix("exit:").split("=")
    by_hand = model.calibration.policy(kind, float(share))
    found = []
    for asked, own in ((by_hand, model.exits), (policy, model), (policy, tmp_path / "exits.safetensors")):
        record = adadiff.enable(pipe, asked, exits=own, fused=fused)
        output = pipe.transformer(x, timestep=t, class_labels=labels).sample
        found.append((output, record.exit_layer.tolist()))
        adadiff.disable(pipe)
    assert found[0][1] == found[1][1] == found[2][1]
    assert min(found[0][1]) < LAYERS
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])
    with pytest.raises(ValueError, match=r"calibrated for budgets 0\.5, 0\.9"):
        adadiff.enable(pipe, "exit:budget=0.7", exits=model)
    with pytest.raises(ValueError, match="is not calibrated"):
        adadiff.enable(pipe, policy, exits=model.exits)
    model.exits = None
    with pytest.raises(ValueError, match="given for exits has none"):
        adadiff.enable(pipe, policy, exits=model)
    with pytest.raises(ValueError, match=r"exits are an adadiff\.Model that has some, or its file, got int"):
        adadiff.enable(pipe, policy, exits=3)


def test_bad_input(pipe: DiTPipeline) -> None:
    with pytest.raises(ValueError, match="object has no transformer"):
        adadiff.enable(object(), "full")
    with pytest.raises(ValueError, match="reads scores; give the exits"):
        adadiff.enable(pipe, "exit:0.5")
    theirs = DiffusersDiT(pipe.transformer)
    theirs.new_head = torch.nn.Identity
    own_heads = Exits(theirs, ExitConfig())
    with pytest.raises(ValueError, match="have their own heads"):
        adadiff.enable(pipe, "exit:0.5", exits=own_heads)
    theirs.blocks = theirs.blocks[:4]
    shallow = Exits(theirs, SHARED)
    with pytest.raises(ValueError, match="these exits are for 4 blocks of 24 channels, the transformer has 5"):
        adadiff.enable(pipe, "exit:0.5", exits=shallow)
    with pytest.raises(ValueError, match="is not enabled"):
        adadiff.disable(pipe)
    with pytest.raises(ValueError, match="object has no transformer"):
        adadiff.disable(object())
    with pytest.raises(ValueError, match="does not take blocks or tied"):
        adadiff.enable(pipe, "exit:0.5", exits=exits(), tied=True)
    adadiff.enable(pipe, "full", exits=exits())
    for policy in ("full", "exit:depth=2", "cache:threshold=0.1"):
        with pytest.raises(ValueError, match="enabled already"):
            adadiff.enable(pipe, policy)
    x, t, _ = lanes()
    with pytest.raises(ValueError, match="takes timestep and class_labels"):
        pipe.transformer(x, timestep=t)
