"""Others' checkpoints, made here in their layouts: what is converted computes what the authors' modules would."""

import argparse
import dataclasses
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import adadiff
from adadiff.checkpoint import read_tensors, save
from adadiff.config import PRESETS, ModelConfig
from adadiff.conversion import convert as conversion
from adadiff.conversion.convert import convert
from adadiff.forward.forward import forward
from adadiff.models.dit import DiT
from adadiff.models.uvit import Head, UViT
from adadiff.policies.exits import Full, Replay, Threshold
from adadiff.uem import DUODIFF, OFFICIAL
from sampler.shell import error_line, run
from sampler.tiny import BATCH, DIT, UVIT, inputs, plain_layers, scramble

U_VIT = ModelConfig(UVIT, "vp", null_label=4)
DI_T = ModelConfig(DIT, "linear", null_label=4)
EVERY = dataclasses.replace(UVIT, time_divisor=1000)


@pytest.fixture(autouse=True)
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published ones take seconds and gigabytes; these have their kinds."""
    tiny = {"tiny_uvit": U_VIT, "tiny_duodiff": ModelConfig(EVERY, "linear"), "tiny_dit": DI_T}
    monkeypatch.setattr(conversion, "PRESETS", tiny)


def state_of(module: torch.nn.Module, seed: int = 1) -> dict[str, Tensor]:
    scramble(module, 0.15, seed)
    return OrderedDict((key, value.clone()) for key, value in module.state_dict().items())


def uvit_state() -> dict[str, Tensor]:
    return state_of(UViT(UVIT))


def official_state() -> dict[str, Tensor]:
    draw, state = torch.Generator().manual_seed(2), uvit_state()
    for i in range(7):
        state[f"lte_classifer.{i}.lte.weight"] = torch.randn(12, 48, generator=draw)
        state[f"lte_classifer.{i}.lte.bias"] = torch.randn(12, generator=draw)
    return state


HEADS = [*(f"in_blocks_heads.{i}" for i in range(3)), "mid_block_head", *(f"out_blocks_heads.{i}" for i in range(3))]


def duodiff_state() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    state = OrderedDict((f"uvit.{key}", value) for key, value in uvit_state().items())
    for i in range(7):
        state[f"matrix.{i}.classifier.0.weight"] = torch.randn(1, 48, generator=draw)
        state[f"matrix.{i}.classifier.0.bias"] = torch.randn(1, generator=draw)
    for seed, name in enumerate(HEADS):
        state |= {f"{name}.{key}": value for key, value in state_of(Head(UVIT), seed).items()}
    return state


def namespace() -> argparse.Namespace:
    return argparse.Namespace(model="DiT-S/2", lr=1e-4, classes=None)


def saved(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path)
    return path


def network_of(state: dict[str, Tensor], kind: type, config: object) -> torch.nn.Module:
    network = kind(config)
    network.load_state_dict(state)
    return network.requires_grad_(False).eval()


def training_folder(tmp_path: Path) -> Path:
    """As U-ViT writes it; the last step counts, and its average."""
    for step, state in ((9000, state_of(UViT(UVIT), 7)), (50000, uvit_state())):
        saved(tmp_path / "ckpts" / f"{step}.ckpt" / "nnet_ema.pth", state)
        saved(tmp_path / "ckpts" / f"{step}.ckpt" / "nnet.pth", state_of(UViT(UVIT), 8))
    return tmp_path / "ckpts"


SOURCES: dict[str, Callable[[Path], tuple[Path, str]]] = {
    "released": lambda path: (saved(path / "a.pth", uvit_state()), "tiny_uvit"),
    "safetensors": lambda path: (
        save_file(uvit_state(), path / "a.safetensors") or path / "a.safetensors",
        "tiny_uvit",
    ),
    "step": lambda path: (training_folder(path) / "50000.ckpt", "tiny_uvit"),
    "steps": lambda path: (training_folder(path), "tiny_uvit"),
    "old file": lambda path: (path / "old.pth", "tiny_uvit"),
    "duodiff plain": lambda path: (
        saved(path / "b.pth", {"model_state_dict": uvit_state(), "args": namespace(), "step": 3}),
        "tiny_duodiff",
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_plain_uvit_computes_the_same(kind: str, tmp_path: Path) -> None:
    source, preset = SOURCES[kind](tmp_path)
    if kind == "old file":  # of PyTorch before 1.6
        torch.save(uvit_state(), source, _use_new_zipfile_serialization=False)
    done = convert(source, tmp_path / "out" / "model.safetensors", preset)
    model = adadiff.load(tmp_path / "out" / "model.safetensors")
    theirs = network_of(uvit_state(), UViT, UVIT)
    given = inputs(theirs, 3)
    t = given.t * model.config.network.time_divisor
    assert torch.equal(model.backbone(given.x, t, given.context), theirs(*given.all))
    assert model.config == done.config == conversion.PRESETS[preset]
    assert (done.layout, model.exits) == ("plain", None)
    assert done.parameters == sum(value.numel() for value in uvit_state().values())
    notes = read_tensors(tmp_path / "out" / "model.safetensors")[1]["notes"]
    assert notes["converted_from"] == done.source.name
    assert notes["part"] == ("model_state_dict" if kind == "duodiff plain" else None)
    assert len(notes["sha256"]) == 64


@pytest.mark.parametrize("training", [False, True])
def test_a_dit_computes_the_same(training: bool, tmp_path: Path) -> None:
    state = state_of(DiT(DIT))
    values = {"ema": state, "model": state_of(DiT(DIT), 5), "opt": {"step": 3}, "args": namespace()}
    convert(saved(tmp_path / "a.pt", values if training else state), tmp_path / "b")  # one preset alone has the shapes
    model, theirs = adadiff.load(tmp_path / "b"), network_of(state, DiT, DIT)
    given = inputs(theirs, 3)
    assert torch.equal(model.backbone(*given.all), theirs(*given.all))
    assert model.config == DI_T
    assert read_tensors(tmp_path / "b")[1]["notes"]["preset"] == "tiny_dit"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_stored_in_the_dtype_asked_for(stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    """By its name as by itself; without one, as they are."""
    state = {key: value.to(stored) for key, value in state_of(DiT(DIT)).items()}
    source, wanted = saved(tmp_path / "a.pt", state), getattr(torch, dtype)
    for name, given, own in (("b", dtype, wanted), ("c", wanted, wanted), ("d", None, stored)):
        done = convert(source, tmp_path / name, dtype=given)
        assert done.parameters == sum(value.numel() for value in state.values())
        tensors, _ = read_tensors(tmp_path / name)
        assert {value.dtype for value in tensors.values()} == {own}
        assert all(torch.equal(tensors[f"backbone.{key}"], value.to(own)) for key, value in state.items())
        model = adadiff.load(tmp_path / name)
        assert {value.dtype for value in model.parameters()} == {own}
        given = inputs(model.backbone, 2)
        result = forward(model, given.x.to(own), given.t, given.context)
        assert result.prediction.dtype == own
        assert bool(result.prediction.isfinite().all())


@pytest.mark.parametrize("dtype", ["half", torch.float64, torch.int32, 16])
def test_other_dtypes_are_refused(dtype: object, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pt", state_of(DiT(DIT)))
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got "):
        convert(source, tmp_path / "b", dtype=dtype)
    assert not (tmp_path / "b").exists()


def test_official_uems_tell_what_theirs_do(tmp_path: Path) -> None:
    state = official_state()
    convert(saved(tmp_path / "7.ckpt" / "nnet_ema.pth", state).parent, tmp_path / "b", "tiny_uvit")
    model = adadiff.load(tmp_path / "b")
    assert model.config == dataclasses.replace(U_VIT, exits=OFFICIAL)
    given = inputs(model.backbone)
    result = forward(model, *given.all, policy=Threshold(1e-6), record_scores=True)
    layers = plain_layers(network_of(uvit_state(), UViT, UVIT), given)
    for i, rows in enumerate(layers[:-1]):
        weight, bias = (state[f"lte_classifer.{i}.lte.{name}"] for name in ("weight", "bias"))
        certainty = torch.sigmoid(rows[:, 2:] @ weight.T + bias).flatten(1).mean(1)
        torch.testing.assert_close(result.scores[i], 1 - certainty, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.prediction, model.backbone(*given.all))


def test_duodiff_probes_and_heads_are_those_of_the_next_block(tmp_path: Path) -> None:
    """Theirs read what goes into block i, ours what comes out of block i; theirs see t / 1000."""
    state = duodiff_state()
    source = saved(tmp_path / "cifar10_deediff_uvit_last.pth", {"model_state_dict": state, "args": namespace()})
    assert convert(source, tmp_path / "b", "tiny_duodiff", drop_first_exit=True).layout == "duodiff"
    model = adadiff.load(tmp_path / "b")
    assert model.config == ModelConfig(EVERY, "linear", exits=DUODIFF)
    given, theirs = inputs(model.backbone), network_of(uvit_state(), UViT, UVIT)
    layers = plain_layers(theirs, dataclasses.replace(given, t=given.t / 1000))
    scores = forward(model, *given.all, policy=Threshold(1e-6), record_scores=True).scores
    for i in range(1, 7):
        rows = layers[i - 1]  # into block i, counted from 0
        weight, bias = (state[f"matrix.{i}.classifier.0.{name}"] for name in ("weight", "bias"))
        u = torch.sigmoid(rows @ weight.T + bias).mean(1).squeeze(1)  # over all tokens
        torch.testing.assert_close(scores[i - 1], u, rtol=1e-5, atol=1e-5)
        head = network_of(
            {k.removeprefix(f"{HEADS[i]}."): v for k, v in state.items() if k.startswith(HEADS[i])}, Head, UVIT
        )
        at = torch.full((BATCH,), float(i))
        eps = forward(model, *given.all, policy=Replay(), threshold=at).prediction
        torch.testing.assert_close(eps, head(rows[:, 2:]), rtol=1e-4, atol=1e-5)
    full = forward(model, *given.all, policy=Full()).prediction
    assert torch.equal(full, theirs(given.x, given.t / 1000, given.context))


def diffusers_folder(path: Path, pipeline: bool = False, eps: float = 1e-2, **save: object) -> DiTTransformer2DModel:
    """A DiTTransformer2DModel whose blocks all have the embedder of the first, as diffusers' conversion makes them."""
    theirs = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=3,
        out_channels=6,
        num_layers=5,
        sample_size=6,
        num_embeds_ada_norm=4,
        norm_eps=eps,
    ).eval()
    scramble(theirs, 0.15)
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    folder = path / "transformer" if pipeline else path
    theirs.save_pretrained(folder, **save)
    if pipeline:
        (path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
        write_scheduler(path)
    return theirs.requires_grad_(False)


def write_scheduler(path: Path, **changes: object) -> None:
    (path / "scheduler").mkdir(exist_ok=True)
    linear = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000}
    values = {**linear, "prediction_type": "epsilon", "trained_betas": None, **changes}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("pipeline", [False, True], ids=["model", "pipeline"])
@pytest.mark.parametrize("served_by", ["diffusers", "dit"])
def test_a_dit_of_diffusers_computes_what_it_was_served_to(served_by: str, pipeline: bool, tmp_path: Path) -> None:
    theirs = diffusers_folder(tmp_path / "folder", pipeline)
    done = convert(tmp_path / "folder", tmp_path / "b", served_by=served_by)
    assert (done.layout, done.preset, done.served_by) == ("diffusers", "tiny_dit", served_by)
    model = adadiff.load(tmp_path / "b")
    changed = {"frequency_shift": 1, "mlp_norm_eps": 1e-2} if served_by == "diffusers" else {}
    assert model.config == dataclasses.replace(DI_T, network=dataclasses.replace(DIT, **changed))
    if served_by == "dit":  # what facebookresearch trains with, put into theirs
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
    given = inputs(model.backbone, 4)
    want = theirs(given.x, timestep=given.t, class_labels=given.context).sample
    torch.testing.assert_close(model.backbone(*given.all), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    result = forward(model, *given.all, policy=Full())
    found = torch.cat([result.prediction, result.variance], 1)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert want.std() > 0.1


def test_a_pipeline_s_autoencoder_tells_the_scale_of_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers_folder(tmp_path / "folder", pipeline=True)
    (tmp_path / "folder" / "vae").mkdir()
    (tmp_path / "folder" / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.25}))
    with pytest.raises(ValueError, match=r"scaling_factor is 0\.25, that of preset tiny_dit None"):
        convert(tmp_path / "folder", tmp_path / "b", served_by="dit")
    monkeypatch.setattr(conversion, "PRESETS", {"latents": dataclasses.replace(DI_T, latent_scale=0.25)})
    assert convert(tmp_path / "folder", tmp_path / "b", served_by="dit").config.latent_scale == 0.25
    monkeypatch.setattr(conversion, "PRESETS", {})
    convert(tmp_path / "folder", tmp_path / "c", served_by="dit")
    assert adadiff.load(tmp_path / "c").config == dataclasses.replace(DI_T, latent_scale=0.25)


@pytest.mark.parametrize("save", [{"max_shard_size": "100KB"}, {"safe_serialization": False}], ids=["shards", "pickle"])
def test_diffusers_other_ways_of_saving_are_read(save: dict, tmp_path: Path) -> None:
    theirs = diffusers_folder(tmp_path / "folder", **save)
    assert len(list((tmp_path / "folder").glob("*-of-*"))) >= (2 if "max_shard_size" in save else 0)
    convert(tmp_path / "folder", tmp_path / "b", served_by="diffusers")
    own = adadiff.load(tmp_path / "b").state_dict()
    block = theirs.transformer_blocks[2].attn1
    assert torch.equal(own["backbone.blocks.2.attn.qkv.weight"][36:72], block.to_k.weight)


def test_without_a_preset_a_configuration_in_a_file_will_do(tmp_path: Path) -> None:
    other = dataclasses.replace(UVIT, depth=2, heads=6)
    state = state_of(UViT(other))
    config = ModelConfig(other, "cosine", null_label=4)
    (tmp_path / "mine.json").write_text(json.dumps(config.to_dict()))
    convert(saved(tmp_path / "a.pth", state), tmp_path / "b", str(tmp_path / "mine.json"))
    assert adadiff.load(tmp_path / "b").config == config


def drop(key: str) -> Callable[[dict], dict]:
    return lambda state: {k: v for k, v in state.items() if k != key}


def put(**tensors: Tensor) -> Callable[[dict], dict]:
    return lambda state: {**state, **{k.replace("__", "."): v for k, v in tensors.items()}}


@pytest.mark.parametrize(
    ("make", "change", "preset", "message"),
    [
        (uvit_state, drop("mid_block.norm2.bias"), "tiny_uvit", r"missing mid_block\.norm2\.bias$"),
        (uvit_state, put(in_blocks__3__norm=torch.zeros(2)), "tiny_uvit", r"unexpected in_blocks\.3\.norm$"),
        (uvit_state, put(pos_embed=torch.zeros(1, 5, 48)), "tiny_uvit", r"d is \(1, 5, 48\), expected \(1, 18, 48\)"),
        (uvit_state, put(step=torch.zeros(2).long()), "tiny_uvit", r"step in .*a\.pth is torch\.int64"),
        (uvit_state, put(step=3), "tiny_uvit", r"step in .*a\.pth is a int; a state dict holds tensors only"),
        (uvit_state, dict, "tiny_dit", r"x_embedder.* more; its shapes are those of tiny_uvit and tiny_duodiff$"),
        (uvit_state, dict, None, "tiny_uvit and tiny_duodiff have the shapes of .*name the preset"),
        (uvit_state, drop("norm.bias"), None, "no preset has the shapes"),
        (uvit_state, dict, "tiny", "unknown preset 'tiny', known: tiny_uvit, tiny_duodiff, tiny_dit; or name a JSON"),
        (uvit_state, dict, "absent.json", r"no such file: absent\.json"),
        (official_state, drop("lte_classifer.5.lte.weight"), "tiny_uvit", r"missing lte_classifer\.5\.lte\.weight$"),
        (official_state, put(lte_classifer__0__lte__bias=torch.zeros(3)), "tiny_uvit", r"\(3,\), expected \(12,\)"),
        (official_state, put(lte_classifer__7__lte__bias=torch.zeros(12)), "tiny_uvit", r"unexpected lte_classifer\.7"),
        (duodiff_state, drop("matrix.0.classifier.0.bias"), "tiny_duodiff", r"missing matrix\.0\.classifier\.0\.bias$"),
        (duodiff_state, drop("out_blocks_heads.2.norm.bias"), "tiny_duodiff", r"missing out_blocks_heads\.2\.norm"),
        (duodiff_state, drop("in_blocks_heads.0.norm.bias"), "tiny_duodiff", r"missing in_blocks_heads\.0\.norm"),
        (duodiff_state, drop("uvit.norm.bias"), "tiny_duodiff", r"missing uvit\.norm\.bias$"),
        (duodiff_state, put(matrix__0__q=torch.zeros(3)), "tiny_duodiff", r"x\.0\.q is no probe .*mlp_probe_per_layer"),
        (duodiff_state, put(matrix__999__classifier__0__bias=torch.zeros(1)), "tiny_duodiff", "no probe of"),
        (dict, put(encoder__weight=torch.zeros(1)), None, r"names such as encoder\.weight are in no layout"),
        (dict, put(transformer_blocks__0=torch.zeros(1)), None, "give the folder that holds its config.json"),
        (uvit_state, lambda state: list(state), None, "holds a list, not a state dict"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(make, change, preset, message, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pth", change(make()))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "b", preset)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


class Harmful:
    def __reduce__(self) -> tuple:
        return eval, ("open('harm', 'w')",)


def test_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = saved(tmp_path / "a.pth", {**uvit_state(), "extra": Harmful()})
    with pytest.raises(ValueError, match=r"a\.pth is not a readable PyTorch file: it holds a .*eval, and only tensors"):
        convert(source, tmp_path / "b", "tiny_uvit")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_truncated_and_foreign_files_are_named(keep: int, tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        path = saved(tmp_path / name, uvit_state())
        if name == "a.safetensors":
            save_file(uvit_state(), path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=rf"{name} is not a readable"):
            convert(path, tmp_path / "b", "tiny_uvit")
    (tmp_path / "text.pth").write_text("no tensors at all")
    with pytest.raises(ValueError, match=r"text\.pth is not a readable PyTorch file"):
        convert(tmp_path / "text.pth", tmp_path / "b", "tiny_uvit")


def test_safetensors_are_read_by_whatever_name_they_have(tmp_path: Path) -> None:
    save_file(uvit_state(), tmp_path / "renamed.pth")
    convert(tmp_path / "renamed.pth", tmp_path / "b", "tiny_uvit")
    convert(saved(tmp_path / "a.pth", uvit_state()), tmp_path / "c", "tiny_uvit")
    renamed, straight = load_file(tmp_path / "b"), load_file(tmp_path / "c")
    assert renamed.keys() == straight.keys()
    assert all(torch.equal(renamed[key], straight[key]) for key in straight)


def test_files_and_folders_that_will_not_do(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pth", uvit_state())
    convert(source, tmp_path / "ours.safetensors", "tiny_uvit")
    (tmp_path / "empty").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text('{"_class_name": "AdaDiffTransformer"}')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    for given, message in (
        (tmp_path / "absent.pth", "no such file or folder"),
        (tmp_path / "empty", r"holds no nnet_ema\.pth"),
        (tmp_path / "vae", "holds a AutoencoderKL of diffusers"),
        (tmp_path / "ours", r"ours is of a pipeline of ours already; AdaDiffPipeline\.from_pretrained opens it"),
        (tmp_path / "bare", r"holds no diffusion_pytorch_model\.safetensors"),
        (tmp_path / "ours.safetensors", "a checkpoint of ours already"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(given, tmp_path / "b", "tiny_uvit")
    with pytest.raises(ValueError, match=r"ours\.safetensors exists"):
        convert(source, tmp_path / "ours.safetensors", "tiny_uvit")
    with pytest.raises(ValueError, match="served_by is for folders of diffusers"):
        convert(source, tmp_path / "b", "tiny_uvit", "dit")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_diffusers_folders_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    diffusers_folder(folder, pipeline=True)
    config, weights = (
        folder / "transformer" / "config.json",
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    before, tensors = config.read_text(), load_file(weights)

    def refused(message: str, served_by: str | None = "dit", preset: str | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "b", preset, served_by)

    refused("say how a DiT of diffusers is to be run", None)
    refused("say how a DiT of diffusers is to be run", "me")
    refused("is not of preset tiny_uvit: it is a DiT", preset="tiny_uvit")
    for changes, message in (
        ({"norm_type": "ada_norm"}, "norm_type must be 'ada_norm_zero'"),
        ({"attention_bias": False}, "attention_bias must be True"),
        ({"num_embeds_ada_norm": None}, "lacks num_embeds_ada_norm"),
        ({"out_channels": 5}, "out_channels must be 3 or 6, got 5"),
        ({"num_layers": 4}, "unexpected transformer_blocks.4"),
        ({"num_attention_heads": 6, "attention_head_dim": 6}, "heads is 6, not 3"),
    ):
        edit(config, **changes)
        refused(message, preset="tiny_dit" if "heads is" in message else None)
        config.write_text(before)
    for changes, message in (
        ({"beta_schedule": "scaled_linear"}, "is no schedule of ours"),
        ({"beta_end": 0.012}, "is no schedule of ours"),
        ({"prediction_type": "v_prediction"}, "prediction_type of the scheduler must be 'epsilon'"),
        ({"num_train_timesteps": 500}, "num_train_timesteps of the scheduler must be 1000"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "schedule is cosine, that of preset tiny_dit linear"),
    ):
        write_scheduler(folder, **changes)
        refused(message)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    monkeypatch.setattr(conversion, "PRESETS", {})
    refused("tells the schedule; name a preset")
    write_scheduler(folder)
    for key, value, message in (
        (
            "transformer_blocks.3.norm1.emb.class_embedder.embedding_table.weight",
            torch.zeros(5, 36),
            "differs from that of block 0",
        ),
        ("transformer_blocks.1.attn1.to_v.bias", None, r"missing transformer_blocks\.1\.attn1\.to_v\.bias$"),
        ("proj_out_2.weight", torch.zeros(24, 35), r"proj_out_2\.weight is \(24, 35\), expected \(24, 36\)"),
        ("norm_out.weight", torch.zeros(36), r"unexpected norm_out\.weight$"),
    ):
        save_file({k: v for k, v in {**tensors, key: value}.items() if v is not None}, weights)
        refused(message)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = saved(tmp_path / "a.pth", official_state())
    assert run(f"convert {source} {tmp_path}/b.safetensors --preset tiny_uvit") == 0
    out = capsys.readouterr().out
    for name, value in (("layout", "official"), ("network.heads", "3"), ("exits.shared_head", "True")):
        assert re.search(rf"^{re.escape(name)} +{value}$", out, re.MULTILINE)
    assert f"wrote {tmp_path}/b.safetensors" in out
    assert run(f"inspect {tmp_path}/b.safetensors --all") == 0
    assert re.search(r"^notes\.layout +official$", capsys.readouterr().out, re.MULTILINE)
    assert run(f"convert {source} {tmp_path}/half.safetensors --preset tiny_uvit --dtype bfloat16") == 0
    assert adadiff.load(tmp_path / "half.safetensors").backbone.pos_embed.dtype == torch.bfloat16
    capsys.readouterr()
    assert run(f"convert {source} {tmp_path}/c --preset tiny_dit") == 2
    assert "missing x_embedder" in error_line(capsys.readouterr().err)


def test_published_presets_are_told_apart_by_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """U-ViTs that DuoDiff trains again have those of the originals, and no two others are alike."""
    monkeypatch.setattr(conversion, "PRESETS", PRESETS)
    plain = {name: dataclasses.replace(config, exits=None) for name, config in PRESETS.items()}
    every = {name: conversion.shapes(config) for name, config in plain.items()}
    built: list[ModelConfig] = []
    monkeypatch.setattr(conversion, "shapes", lambda own: built.append(own) or every[names[own]])
    names = {config: name for name, config in plain.items()}
    for name, own in every.items():
        tensors = {key.removeprefix("backbone."): torch.empty(shape, device="meta") for key, shape in own.items()}
        built.clear()
        fitting = conversion._fitting("plain", tensors)
        assert fitting == [other for other, theirs in every.items() if theirs == own]
        assert len({other.removeprefix("duodiff_").split("_")[0] for other in fitting}) == 1, name
        assert len(built) <= 4, "a network is built only where position embedding and blocks are those in the file"


def test_what_is_written_is_what_save_writes(tmp_path: Path) -> None:
    convert(saved(tmp_path / "a.pth", duodiff_state()), tmp_path / "b", "tiny_duodiff", drop_first_exit=True)
    model = adadiff.load(tmp_path / "b")
    save(model, tmp_path / "c")
    mine, theirs = (read_tensors(tmp_path / name) for name in "bc")
    assert mine[1]["config"] == theirs[1]["config"]
    assert mine[0].keys() == theirs[0].keys()
    assert all(torch.equal(value, theirs[0][key]) for key, value in mine[0].items())
