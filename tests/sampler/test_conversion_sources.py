"""Others' checkpoints: what a source says of itself is heard, what wraps its weights is understood, and what is
damaged, or means harm, is refused in one line that names the file."""

import argparse
import dataclasses
import json
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adadiff
from adadiff.checkpoint import read_tensors
from adadiff.config import ModelConfig
from adadiff.conversion import convert as conversion
from adadiff.conversion.convert import convert
from adadiff.conversion.describing import describe
from adadiff.models.dit import DiT
from adadiff.models.uvit import UViT
from sampler import test_conversion as theirs
from sampler.shell import error_line, run
from sampler.test_conversion import diffusers_folder, duodiff_state, edit, official_state, saved, uvit_state
from sampler.test_weights import little_memory
from sampler.tiny import DIT, UVIT

presets = theirs.presets  # an autouse fixture: tiny ones


def dit_state() -> dict[str, Tensor]:
    return theirs.state_of(DiT(DIT))


MAKES = {"uvit": (uvit_state, "tiny_uvit"), "dit": (dit_state, "tiny_dit"), "official": (official_state, "tiny_uvit")}


def named(change: Callable[[str], str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {change(key): value for key, value in state.items()}


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"n_averaged": torch.tensor(3), **named(lambda key: f"module.{key}", state)}


def compiled_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return named(lambda key: re.sub(r"((?:in_|out_)?blocks\.\d+)\.", r"\1._orig_mod.", key), state)


WRAPPED: dict[str, tuple[Callable[[dict], object], str | None]] = {
    "parallel": (lambda state: named(lambda key: f"module.{key}", state), None),
    "compiled": (lambda state: named(lambda key: f"_orig_mod.{key}", state), None),
    "parallel, compiled": (lambda state: named(lambda key: f"module._orig_mod.{key}", state), None),
    "compiled, parallel": (lambda state: named(lambda key: f"_orig_mod.module.{key}", state), None),
    "compiled blocks": (compiled_blocks, None),
    "averaged": (averaged, None),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, "state_dict"),
    "model": (lambda state: {"model": state, "optimizer": {"lr": 1}}, "model"),
    "model_state_dict": (lambda state: {"model_state_dict": state}, "model_state_dict"),
    "nested": (lambda state: {"model": {"state_dict": averaged(state)}}, "model.state_dict"),
    "lightning": (lambda state: {"state_dict": named(lambda key: f"model.{key}", state)}, "state_dict"),
    "the average first": (lambda state: {"model": {"a": torch.zeros(1)}, "ema": state}, "ema"),
    "the average, parallel": (
        lambda state: {"ema": named(lambda key: f"module.{key}", state), "model": {}, "args": theirs.namespace()},
        "ema",
    ),
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("kind", MAKES)
def test_what_wraps_the_weights_is_understood(kind: str, wrap: str, tmp_path: Path) -> None:
    make, preset = MAKES[kind]
    change, part = WRAPPED[wrap]
    convert(saved(tmp_path / "plain.pth", make()), tmp_path / "wanted", preset)
    source = saved(tmp_path / "a.pth", change(make()))
    done = convert(source, tmp_path / "b", preset)
    assert done.part == part
    assert describe(source)["layout"] == done.layout
    found, wanted = load_file(tmp_path / "b"), load_file(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_duodiff_and_diffusers_are_understood_wrapped_as_well(tmp_path: Path) -> None:
    state = named(lambda key: f"module.{key}", compiled_blocks(duodiff_state()))
    convert(saved(tmp_path / "a.pth", {"model_state_dict": state}), tmp_path / "b", drop_first_exit=True)
    diffusers_folder(tmp_path / "folder", pipeline=True)
    weights = tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(named(lambda key: f"_orig_mod.{key}", load_file(weights)), weights)
    convert(tmp_path / "folder", tmp_path / "c", served_by="dit")
    compiled = nn.Module.state_dict(torch.compile(DiT(DIT)))
    assert all(key.startswith("_orig_mod.") for key in compiled)
    convert(saved(tmp_path / "d.pth", compiled), tmp_path / "d")


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    state = uvit_state()
    source = saved(tmp_path / "a.pth", {**state, "_orig_mod.pos_embed": state["pos_embed"]})
    with pytest.raises(ValueError, match=r"a\.pth holds tensors compiled and not compiled under one name"):
        convert(source, tmp_path / "b", "tiny_uvit")


def said(tmp_path: Path, state: dict[str, Tensor], how: str, **settings: object) -> Path:
    """A training file with these settings."""
    values = {"lr": 1e-4, **settings}
    arguments = argparse.Namespace(**values)
    if how == "metadata":
        path = tmp_path / "a.safetensors"
        save_file(state, path, {f"modelspec.{name}": str(value) for name, value in values.items()})
        return path
    content = {
        "namespace": {"model": state, "args": arguments},
        "table": {"model": state, "args": values},
        "config": {"model": state, "config": values},
        "lightning": {"model": state, "hyper_parameters": values},
        "tables": {"model": state, "cfg": {"seed": 1, "diffusion": {"loss": {**values}}}},
        "namespace in a table": {"model": state, "hparams": {"args": arguments}},
        "beside the inner one": {"state_dict": {"model": state, "args": arguments}},
    }
    return saved(tmp_path / "a.pt", content[how])


HOW = [
    "namespace",
    "table",
    "config",
    "lightning",
    "tables",
    "namespace in a table",
    "beside the inner one",
    "metadata",
]


PREDICTS_NOISE = "networks of this configuration predict the noise"


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        *(("dit", {"prediction": v}, PREDICTS_NOISE) for v in ("velocity", "score", "v", "x0")),
        ("dit", {"prediction_type": "v_prediction"}, PREDICTS_NOISE),
        ("dit", {"objective": "pred_x0"}, PREDICTS_NOISE),
        ("dit", {"model": "SiT-XL/2"}, "which has another time input"),
        ("dit", {"path_type": "Linear", "prediction": "noise"}, "a setting of SiT"),
        ("dit", {"predict_xstart": True}, "the network predicts the image"),
        ("dit", {"num_timesteps": 4000}, "there are 1000 timesteps"),
        ("dit", {"diffusion_steps": 500}, "there are 1000 timesteps"),
        ("dit", {"noise_schedule": "cosine"}, "the configuration has schedule linear"),
        ("dit", {"beta_schedule": "sigmoid"}, "the configuration has schedule linear"),
        ("dit", {"rescale_betas_zero_snr": True}, "the noise schedule is rescaled"),
        ("dit", {"learn_sigma": False}, "the configuration has learned_variance True"),
        ("dit", {"num_heads": 6}, "the configuration has heads 3"),
        ("uvit", {"num_heads": 6}, "the configuration has heads 3"),
        *(("uvit", {"parametrization": f"predict_{v}"}, "predict the noise") for v in ("original", "previous")),
    ],
)
def test_settings_that_contradict_are_refused(kind: str, settings: dict, message: str, how: str, tmp_path: Path):
    make, preset = MAKES[kind]
    source = said(tmp_path, make(), how, **settings)
    for given in (preset, None):  # without one, no preset of its shapes is left
        with pytest.raises(ValueError, match=message) as refused:
            convert(source, tmp_path / "b", given)
        name, value = next(iter(settings.items()))
        assert f"{name} is {(str(value) if how == 'metadata' else value)!r}" in str(refused.value)
        assert str(source) in str(refused.value)
    with pytest.raises(ValueError, match=message):
        describe(source)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dit", {"prediction": "noise", "model": "DiT-XL/2", "num_classes": 1000, "image_size": 256}),
        ("dit", {"objective": "pred_noise", "learn_sigma": True, "num_heads": 3, "noise_schedule": "linear"}),
        ("dit", {"path_type": None, "predict_xstart": False, "num_timesteps": 1000, "prediction": None}),
        ("uvit", {"parametrization": "predict_noise", "num_heads": 3, "depth": 7}),
        ("dit", {3: "velocity", "prediction": ["velocity"], "num_heads": torch.zeros(3)}),
    ],
)
def test_settings_that_agree_are_accepted(kind: str, settings: dict, tmp_path: Path) -> None:
    make, preset = MAKES[kind]
    source = saved(tmp_path / "a.pt", {"model": make(), "args": settings})
    convert(source, tmp_path / "b", preset)


@pytest.mark.parametrize(
    ("kind", "settings", "is_told"),
    [
        ("dit", {}, True),
        ("dit", {"lr": 1e-4, "num_heads": 3}, True),
        ("dit", {"prediction": "noise"}, False),
        ("dit", {"model": "DiT-XL/2"}, False),
        ("uvit", {}, False),
    ],
)
def test_what_is_taken_for_granted_is_told(kind: str, settings: dict, is_told: bool, tmp_path: Path, capsys) -> None:
    """The tensors of a SiT are those of a DiT."""
    make, preset = MAKES[kind]
    source = saved(tmp_path / "a.pt", {"model": make(), "args": settings} if settings else make())
    assert run(f"convert {source} {tmp_path}/b --preset {preset}") == 0
    assert ("taken for" in capsys.readouterr().out) == is_told


@pytest.mark.parametrize(("normalized", "preset"), [(True, "tiny_duodiff"), (False, "tiny_duodiff_index")])
def test_a_file_of_duodiff_tells_its_time(normalized: bool, preset: str, tmp_path: Path, monkeypatch) -> None:
    """Its networks read t / 1000 or t; of the presets with its shapes, the one that agrees is taken."""
    both = {**conversion.PRESETS, "tiny_duodiff_index": ModelConfig(UVIT, "linear")}
    monkeypatch.setattr(conversion, "PRESETS", both)
    for name, state in (("plain", uvit_state()), ("exits", duodiff_state())):
        settings = {"parametrization": "predict_noise", "normalize_timesteps": normalized, "num_timesteps": 1000}
        source = said(tmp_path, state, "namespace", **settings)
        exits = name == "exits"
        done = convert(source, tmp_path / name, drop_first_exit=exits)
        assert done.preset == preset
        assert done.config.network.time_divisor == (1000 if normalized else 1)
        assert describe(source)["presets"] == [preset]
        other = next(own for own in ("tiny_duodiff", "tiny_duodiff_index") if own != preset)
        for wrong in (other, "tiny_uvit"):
            with pytest.raises(ValueError, match=rf"is not of preset {wrong}: .*(time_divisor|with linear, not)"):
                convert(source, tmp_path / "c", wrong, drop_first_exit=exits)


@pytest.mark.parametrize(
    ("make", "preset", "message"),
    [
        (
            official_state,
            "tiny_duodiff",
            "networks of layout official are trained with schedule vp or stable_diffusion",
        ),
        (official_state, "vp_fraction", "networks of layout official read the timestep itself"),
        (official_state, "cosine", "networks of layout official are trained with"),
        (duodiff_state, "tiny_uvit", "networks of layout duodiff are trained with schedule linear, not vp"),
        (duodiff_state, "cosine", "networks of layout duodiff are trained with schedule linear"),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_presets_of_another_kind_are_refused(make, preset: str, message: str, as_file: bool, tmp_path, monkeypatch):
    own = {
        **conversion.PRESETS,
        "cosine": ModelConfig(UVIT, "cosine"),
        "vp_fraction": ModelConfig(theirs.EVERY, "vp"),
    }
    monkeypatch.setattr(conversion, "PRESETS", own)
    if as_file:
        (tmp_path / "own.json").write_text(json.dumps(own[preset].to_dict()))
        preset = str(tmp_path / "own.json")
    source = saved(tmp_path / "a.pth", make())
    with pytest.raises(ValueError, match=f"a.pth is not of preset .*: {message}"):
        convert(source, tmp_path / "b", preset, drop_first_exit=make is duodiff_state)
    assert not (tmp_path / "b").exists()


def test_the_exit_before_block_0_is_not_dropped_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = saved(tmp_path / "a.pth", duodiff_state())
    with pytest.raises(ValueError, match=r"a\.pth has an exit before block 0.* --drop-first-exit"):
        convert(source, tmp_path / "b")
    assert run(f"convert {source} {tmp_path}/b") == 2
    assert "matrix.0 and in_blocks_heads.0 would be lost" in error_line(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert run(f"convert {source} {tmp_path}/b --drop-first-exit") == 0
    assert re.search(r"^left out +the exit before block 0: matrix\.0 and", capsys.readouterr().out, re.MULTILINE)
    assert read_tensors(tmp_path / "b")[1]["notes"]["dropped"].startswith("the exit before block 0")
    for make in (uvit_state, official_state, dit_state):
        other = saved(tmp_path / "other.pth", make())
        with pytest.raises(ValueError, match=r"other\.pth has no exit before block 0"):
            convert(other, tmp_path / "c", "tiny_dit" if make is dit_state else "tiny_uvit", drop_first_exit=True)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr of the scheduler must be False"),
        ("scheduler", {"use_flow_sigmas": True}, "use_flow_sigmas of the scheduler"),
        ("scheduler", {"snr_shift_scale": 3.0}, "snr_shift_scale of the scheduler"),
        ("scheduler", {"timestep_type": "continuous"}, "timestep_type of the scheduler"),
        ("scheduler", {"trained_betas": [0.1]}, "trained_betas of the scheduler"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type of the scheduler"),
        ("scheduler", {"num_train_timesteps": [1000]}, "num_train_timesteps of the scheduler"),
        ("scheduler", {"beta_schedule": {"a": 1}}, "is no schedule of ours"),
        ("vae", {"shift_factor": 0.1}, "shift_factor of the autoencoder"),
        ("vae", {"latents_mean": [0.1]}, "latents_mean of the autoencoder"),
        ("vae", {"scaling_factor": "1"}, "scaling_factor of the autoencoder must be a number"),
        ("vae", {"scaling_factor": [1]}, "scaling_factor of the autoencoder must be a number"),
        ("transformer", {"interpolation_scale": 2}, "interpolation_scale is 2"),
        ("transformer", {"cross_attention_dim": 768}, "cross_attention_dim is 768"),
        ("transformer", {"num_vector_embeds": 9}, "num_vector_embeds is 9"),
        ("transformer", {"brand_new": "yes"}, "brand_new is 'yes'"),
        *(
            ("transformer", {name: value}, f"{name} must be a positive integer")
            for name in ("sample_size", "num_layers", "num_attention_heads", "num_embeds_ada_norm", "patch_size")
            for value in ("6", 6.0, True, [6], {"a": 6}, -6, 0)
        ),
        *(("transformer", {"out_channels": value}, "out_channels must be") for value in ("6", [6], 5, 6.0)),
        *(("transformer", {"norm_eps": value}, "norm_eps must be") for value in ("1e-5", [1], 1, 1e400)),
        *(("transformer", {name: 10**9}, f"{field} must be at most") for name, field in (
            ("num_layers", "depth"), ("sample_size", "image_size"), ("attention_head_dim", "dim"),
            ("num_embeds_ada_norm", "num_classes"))),
        ("transformer", {"num_layers": 1000}, "does not fit this model"),
        ("transformer", {"sample_size": 65536}, "does not fit this model"),
        ("transformer", {"activation_fn": ["gelu-approximate"]}, "activation_fn must be"),
        ("transformer", {"_class_name": ["DiTTransformer2DModel"]}, "of diffusers; read are DiTTransformer2DModel"),
    ],
)  # fmt: skip
def test_configurations_of_diffusers_are_heard(file: str, changes: dict, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    diffusers_folder(folder, pipeline=True)
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    path = folder / file / ("scheduler_config.json" if file == "scheduler" else "config.json")
    edit(path, **changes)
    with little_memory(), pytest.raises(ValueError, match=message) as refused:
        convert(folder, tmp_path / "b", served_by="diffusers")
    assert "\n" not in str(refused.value)


def test_settings_without_effect_are_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    diffusers_folder(folder, pipeline=True)
    changes = {"_class_name": "Transformer2DModel", "_name_or_path": "x", "dropout": 0.1, "interpolation_scale": None}
    changes |= {"only_cross_attention": False, "attention_type": "default", "cross_attention_dim": None}
    edit(folder / "transformer" / "config.json", **changes)
    theirs.write_scheduler(folder, rescale_betas_zero_snr=False, clip_sample=False, steps_offset=1, _class_name="DDIM")
    convert(folder, tmp_path / "b", served_by="dit")


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    "weight_map",
    [
        *(None, 3, "text", [], {}, ["a.safetensors"]),
        *(
            {"pos_embed": name}
            for name in (3, None, ["a"], {"a": 1}, "/dev/zero", "../a.safetensors", "absent", "", ".")
        ),
        *({"pos_embed": name} for name in ("pipe", "folder", "link", "a/../b", "x" * 300)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_index_names_files_beside_it(weight_map: object, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    diffusers_folder(folder)
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("/dev/zero")
    (tmp_path / "a.safetensors").write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with little_memory(), pytest.raises(ValueError, match=rf"{re.escape(INDEX)} (names|has no table weight_map)"):
        convert(folder, tmp_path / "b", served_by="dit")


def test_an_index_that_says_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    diffusers_folder(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="has no table weight_map"):
        convert(folder, tmp_path / "b", served_by="dit")
    twice = {"a": "a.safetensors", "b": "b.safetensors"}
    for name in twice.values():
        save_file({"pos_embed.proj.bias": torch.zeros(36)}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": twice}))
    with pytest.raises(ValueError, match=r"pos_embed\.proj\.bias is in two of the files"):
        convert(folder, tmp_path / "b", served_by="dit")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '"text"',
        "null",
        "[" * 100000,
        '{"a":' * 100000,
        "\x00",
        '{"a": 1' + "0" * 5000 + "}",
        "\xff",
    ],
    ids=lambda text: text[:6],
)
@pytest.mark.parametrize("file", ["preset.json", "config.json", "scheduler_config.json", INDEX])
def test_json_that_is_none_is_refused(file: str, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    diffusers_folder(folder, pipeline=True)
    places = {"config.json": "transformer", "scheduler_config.json": "scheduler", INDEX: "transformer"}
    path = folder / places[file] / file if file in places else tmp_path / file
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{re.escape(file)} (is not JSON|must hold a JSON object)"):
        convert(folder, tmp_path / "b", str(path) if file == "preset.json" else None, served_by="dit")


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_presets_that_are_no_files_are_refused(make: Callable, tmp_path: Path) -> None:
    make(tmp_path / "own.json")
    source = saved(tmp_path / "a.pth", uvit_state())
    with pytest.raises(ValueError, match=r"own\.json is no regular file"):
        convert(source, tmp_path / "b", str(tmp_path / "own.json"))


def zipped(tmp_path: Path) -> Path:
    """A file of kilobytes whose archive holds gigabytes, if it were unpacked."""
    source = saved(tmp_path / "plain.pth", uvit_state())
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as made:
        for name in plain.namelist():
            with made.open(name, "w", force_zip64=True) as part:
                part.write(plain.read(name))
                for _ in range(64 if name.endswith("data.pkl") else 0):
                    part.write(bytes(2**24))
    return tmp_path / "a.pth"


def recursive() -> dict:
    values: dict = {"epoch": 1}
    values["model"] = values
    return values


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "integer keys": (lambda path: {**uvit_state(), 3: torch.zeros(2)}, "names of tensors are text"),
    "only integer keys": (lambda path: {0: torch.zeros(2)}, "names of tensors are text"),
    "tuples": (lambda path: {("a", "b"): torch.zeros(2)}, "names of tensors are text"),
    "line breaks": (lambda path: {**uvit_state(), "a\nb": torch.zeros(2)}, r"holds a tensor of the name 'a\\nb'"),
    "escapes": (lambda path: {**uvit_state(), "\033[2J": torch.zeros(2)}, "holds a tensor of the name"),
    "keys of bytes": (lambda path: {b"pos_embed": torch.zeros(2)}, "names of tensors are text"),
    "no keys": (lambda path: {}, "are in no layout known here"),
    "a tensor": (lambda path: torch.zeros(2), "holds a Tensor, not a state dict"),
    "a number": (lambda path: 3, "holds a int, not a state dict"),
    "nothing": (lambda path: None, "holds a NoneType, not a state dict"),
    "nested lists": (lambda path: {"model": [uvit_state()]}, "a state dict holds tensors only"),
    "itself": (lambda path: recursive(), "a state dict is expected"),
    "integers": (lambda path: {key: value.long() for key, value in uvit_state().items()}, "weights are floating point"),
    "booleans": (lambda path: {**uvit_state(), "norm.bias": torch.ones(48) > 0}, "norm.bias in .* is torch.bool"),
    "complex": (lambda path: {**uvit_state(), "norm.bias": torch.ones(48) * 1j}, "norm.bias in .* is torch.complex64"),
    "float8": (
        lambda path: {**uvit_state(), "norm.bias": torch.ones(48).to(torch.float8_e4m3fn)},
        "norm.bias in .* is torch.float8",
    ),
    "sparse": (
        lambda path: {**uvit_state(), "norm.bias": torch.ones(48).to_sparse()},
        "norm.bias in .* is not a dense",
    ),
    "quantised": (
        lambda path: {**uvit_state(), "norm.bias": torch.quantize_per_tensor(torch.ones(48), 0.1, 0, torch.quint8)},
        "norm.bias in .* is not a dense",
    ),
    "without values": (lambda path: {**uvit_state(), "norm.bias": torch.ones(48, device="meta")}, "is not a dense"),
    "NaN": (lambda path: {**uvit_state(), "norm.bias": torch.full((48,), torch.nan)}, "norm.bias in .* holds NaN"),
    "infinity": (lambda path: {**uvit_state(), "norm.bias": torch.full((48,), torch.inf)}, "norm.bias in .* holds NaN"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, message = ODD[kind]
    source = saved(tmp_path / "a.pth", make(tmp_path))
    with pytest.raises(ValueError, match=message.replace(".bias in", r"\.bias in")) as refused:
        convert(source, tmp_path / "b", "tiny_uvit")
    assert str(source) in str(refused.value) or kind == "no keys"
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "b").exists()
    if kind not in ("NaN", "infinity"):
        with pytest.raises(ValueError, match=message.replace(".bias in", r"\.bias in")):
            describe(source)


def test_small_files_do_not_become_large(tmp_path: Path) -> None:
    source = zipped(tmp_path)
    assert source.stat().st_size < 2**23
    with little_memory(), pytest.raises(ValueError, match=r"a\.pth is not a readable PyTorch file: it is compressed"):
        convert(source, tmp_path / "b", "tiny_uvit")
    wide = dataclasses.replace(UVIT, dim=48 * 256, num_classes=2**20, mlp_ratio=64)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UViT(wide).state_dict().items()}
    source = saved(
        tmp_path / "c.pth", OrderedDict((key, torch.zeros(()).expand(shape)) for key, shape in shapes.items())
    )
    assert source.stat().st_size < 2**20
    (tmp_path / "wide.json").write_text(json.dumps(ModelConfig(wide, "vp").to_dict()))
    with little_memory(), pytest.raises(ValueError, match=r"c\.pth does not fit this model: it holds .* bytes, for"):
        convert(source, tmp_path / "b", str(tmp_path / "wide.json"))


def test_folders_in_folders_end(tmp_path: Path) -> None:
    inner = tmp_path
    for _ in range(300):
        inner = inner / "1.ckpt"
    inner.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"1\.ckpt holds no nnet_ema\.pth"):
        convert(tmp_path, tmp_path / "b", "tiny_uvit")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "model_index.json").write_text("{}")
    (tmp_path / "loop" / "transformer").symlink_to(".")
    with pytest.raises(ValueError, match=r"no such file: .*config\.json"):
        convert(tmp_path / "loop", tmp_path / "b", "tiny_uvit")


def test_the_command_line_says_all_this_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for kind, (make, _) in ODD.items():
        source = saved(tmp_path / "a.pth", make(tmp_path))
        assert run(f"convert {source} {tmp_path}/b --preset tiny_uvit") == 2, kind
        error_line(capsys.readouterr().err)
    assert not (tmp_path / "b").exists()


def test_a_model_that_was_wrapped_draws_what_the_plain_one_does(tmp_path: Path) -> None:
    images = []
    for name, state in (("plain", uvit_state()), ("wrapped", {"state_dict": averaged(uvit_state())})):
        convert(saved(tmp_path / f"{name}.pth", state), tmp_path / name, "tiny_uvit")
        images.append(adadiff.sample(adadiff.load(tmp_path / name), 2, steps=3, class_labels=[0, 1])[0])
    assert torch.equal(*images)
