"""Weights on their way to disk and back: what cannot be right is refused, what is saved can be loaded, and nothing that
is set for the whole process, or drawn by it, makes a difference."""

import dataclasses
import json
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import adadiff
from adadiff import checkpoint
from adadiff.checkpoint import load, read_tensors, save, write_tensors
from adadiff.config import ModelConfig
from adadiff.conversion import convert as conversion
from adadiff.conversion.convert import convert
from adadiff.conversion.describing import describe
from adadiff.metrics import features
from adadiff.model import Model
from adadiff.models.dit import DiTConfig
from adadiff.uem import PAPER
from sampler.settings import default_device, default_dtype
from sampler.test_calibration import HALF, made
from sampler.test_conversion import DI_T, saved, state_of
from sampler.tiny import DIT, SERVED, UVIT, scramble

UVIT_CONFIG = ModelConfig(dataclasses.replace(UVIT, depth=2), "cosine", null_label=4, exits=PAPER)
DIT_CONFIG = ModelConfig(DIT, "linear", null_label=4, exits=PAPER)
CONFIGS = {"uvit": UVIT_CONFIG, "dit": DIT_CONFIG}
WEIGHT = "exits.weight"


def model_of(config: ModelConfig) -> Model:
    model = Model(config).eval()
    scramble(model, 0.2)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(model_of(UVIT_CONFIG), tmp_path / "model.safetensors", {"by": "hand"})
    return tmp_path / "model.safetensors"


def rewrite(file: Path, tensors: dict[str, Tensor] | None = None, **header: object) -> None:
    """The file with other tensors, and other entries of its header, as JSON."""
    own, _ = read_tensors(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    save_file({**own, **(tensors or {})}, file, metadata=metadata)


def refused(file: Path, message: str, **settings: object) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(file, **settings)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [WEIGHT, "exits.heads.0.decoder_pred.weight", "backbone.pos_embed"])
@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn],
    ids=str,
)
def test_weights_that_are_not_floating_point_are_refused(file: Path, key: str, dtype: torch.dtype) -> None:
    rewrite(file, {key: read_tensors(file)[0][key].to(dtype)})
    refused(file, f"{key} in .* is {dtype}; weights are floating point")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", [WEIGHT, "exits.bias", "exits.heads.1.norm.weight", "backbone.mid_block.norm1.bias"])
def test_weights_that_are_not_finite_are_refused(file: Path, key: str, bad: float) -> None:
    """A UEM that gives NaN lets nobody exit."""
    value = read_tensors(file)[0][key]
    value.view(-1)[-1] = bad
    rewrite(file, {key: value})
    refused(file, f"{key} in .* holds NaN or infinity")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        describe(file)


def test_weights_beyond_the_range_of_a_dtype_are_refused(file: Path, tmp_path: Path) -> None:
    rewrite(file, {WEIGHT: read_tensors(file)[0][WEIGHT] * 1e6})
    load(file, dtype="bfloat16")
    refused(file, f"{WEIGHT} in .* has values beyond the range of torch.float16", dtype="float16")
    source = saved(tmp_path / "a.pth", {key: value * 1e6 for key, value in state_of(model_of(DI_T).backbone).items()})
    with pytest.raises(ValueError, match=r"beyond the range of torch\.float16"):
        convert(source, tmp_path / "b", config_file(tmp_path, DI_T), dtype="float16")
    assert not (tmp_path / "b").exists()


def config_file(folder: Path, config: ModelConfig) -> str:
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return str(folder / "config.json")


NETWORKS = {kind: dataclasses.asdict(config.network) for kind, config in CONFIGS.items()}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *(
            ("uvit", name, value)
            for name in ("conv", "qkv_bias", "mlp_time_embed")
            for value in ("false", "no", 0, None)
        ),
        *(("dit", "learned_variance", value) for value in ("false", "True", 1, None, [])),
        *(("dit", "frequency_shift", value) for value in (True, "0", 1.0, 2)),
        *(("dit", "mlp_norm_eps", value) for value in ("1e-6", 1, True, float("nan"), None)),
        *(
            (kind, "depth", value)
            for kind in CONFIGS
            for value in ("2", 2.0, True, None, [2], {"a": 2}, 10**9, 10**400)
        ),
        *((kind, "heads", value) for kind in CONFIGS for value in ("3", 3.0, 0, -3, 10**9)),
        *((kind, "image_size", value) for kind in CONFIGS for value in ("8", 1e400, 2**40)),
        *((kind, "num_classes", value) for kind in CONFIGS for value in ("5", False, 10**12)),
    ],
)
def test_network_settings_of_the_wrong_type_or_size_are_refused(kind: str, name: str, value: object, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save(model_of(CONFIGS[kind]), file)
    config = CONFIGS[kind].to_dict()
    rewrite(file, config={**config, "network": {**NETWORKS[kind], name: value}})
    refused(file, f"cannot use .*: {name} must be ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"null_label": value}, "null_label must be") for value in (4.0, "4", True, [4], 3)),
        *(({"guided_channels": value}, "guided_channels must") for value in ("2", 2.5, True, 0, 4)),
        *(({"latent_scale": value}, "latent_scale must be") for value in ("1", True, [], 0, -1, 1e400, 10**400)),
        *(({"schedule": value}, "no noise schedule") for value in (None, 3, ["linear"], {})),
        *(({"family": value}, "unknown network family") for value in (None, 3, ["uvit"], {"uvit": 1}, "UVIT")),
        *(({"network": value}, "network must be a table") for value in (None, 3, "uvit", [])),
        *(({"exits": value}, "exits must be a table") for value in (3, "paper", [], True)),
        *(({"exits": {"head": value}}, "exits.head must be") for value in (None, 3, ["mlp"], {})),
        *(({"exits": {"time": value}}, "exits.time must be") for value in (None, 1, ["bias"], {})),
    ],
)
def test_model_settings_of_the_wrong_type_are_refused(file: Path, changes: dict, message: str) -> None:
    rewrite(file, config={**UVIT_CONFIG.to_dict(), **changes})
    refused(file, message)


@pytest.mark.parametrize(
    "config", [None, 3, "text", [], [1], {}, {"family": "uvit"}, "[" * 100000, '{"a":1' + "0" * 5000]
)
def test_configurations_that_are_none_are_refused(file: Path, config: object) -> None:
    rewrite(file, config=config)
    refused(file, "cannot use|is not a readable safetensors file|lacks")


@pytest.mark.parametrize("version", [None, 3, "2", [2], {"2": 2}, "[" * 100000])
def test_format_versions_that_are_none_are_refused(file: Path, version: object) -> None:
    rewrite(file, format_version=json.dumps(version) if not str(version).startswith("[[") else version)
    refused(file, "has format version|is not a readable safetensors file")


@pytest.mark.parametrize("notes", [None, 3, "text", [["by", "hand"]]])
def test_notes_that_are_no_table_are_refused(file: Path, notes: object) -> None:
    rewrite(file, notes=json.dumps(notes))
    refused(file, "notes must be a table")


CALIBRATION = made(HALF).to_dict()
BUDGET = CALIBRATION["budgets"][0]


@pytest.mark.parametrize(
    "change",
    [
        *({"t": value} for value in (["9", "5", "1"], [900, None, 100], "abc", 3, [9, 5, 1e400], [9, 5, 10**400])),
        *({"weights": value} for value in ([1, 2, "3"], [True, 1, 1], None)),
        *({"num_layers": value} for value in ("5", 5.0, None, True, 4)),
        *({"steps": value} for value in ("3", 3.5, None)),
        *({"aim": 3}, {"solver": ["ddim"]}, {"refit": "no"}, {"guidance_scale": "1"}, {"seed": 10**400}),
        *({"budgets": value} for value in (None, 3, [3], ["a"], {}, [{}], [[BUDGET]])),
        *({"budgets": [{**BUDGET, "share": value}]} for value in ("0.5", None, float("nan"))),
        *({"budgets": [{**BUDGET, "depths": value}]} for value in ([2.0, 3.0, 5.0], ["2", "3", "5"], 3)),
        *({"budgets": [{**BUDGET, "adaptive": value}]} for value in (3, [], {}, {**BUDGET["adaptive"], "psnr": "30"})),
        *({"budgets": [{**BUDGET, "ratio": value}]} for value in (3, "abc", [1, 2, [3]])),
    ],
    ids=lambda change: json.dumps(change)[:60],
)  # fmt: skip
def test_calibrations_of_the_wrong_types_are_refused(tmp_path: Path, change: dict) -> None:
    file = tmp_path / "model.safetensors"
    model = model_of(SERVED)
    model.calibration = made(HALF)
    save(model, file)
    load(file)
    rewrite(file, calibration={**CALIBRATION, **change})
    refused(file, "calibrat")


def test_a_calibration_for_another_depth_is_refused(tmp_path: Path) -> None:
    model = model_of(UVIT_CONFIG)
    model.calibration = made(HALF)
    save_file(
        model.state_dict(),
        tmp_path / "m",
        metadata={
            "format_version": "2",
            "config": json.dumps(UVIT_CONFIG.to_dict()),
            "calibration": json.dumps(CALIBRATION),
        },
    )
    refused(tmp_path / "m", "calibrated for 5 blocks, its network has 3")


@contextmanager
def little_memory(most: int = 2**28) -> Iterator[None]:
    """No more is to be had than the process has already, and `most` bytes."""
    pages, limits = int(Path("/proc/self/statm").read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("uvit", {"depth": 1024}),
        ("uvit", {"dim": 65520, "heads": 1}),
        ("uvit", {"image_size": 65536, "patch": 1}),
        ("uvit", {"image_size": 65536, "patch": 1024, "channels": 1024, "dim": 65520}),
        ("uvit", {"num_classes": 2**24}),
        ("dit", {"depth": 512}),
        ("dit", {"dim": 65520, "heads": 1, "image_size": 65536, "patch": 1}),
        ("dit", {"mlp_ratio": 1024, "dim": 65520, "heads": 1}),
        ("dit", {"num_classes": 2**24}),
    ],
    ids=str,
)
def test_sizes_are_compared_before_anything_is_allocated(
    kind: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of kilobytes that speaks of terabytes."""
    config, file = CONFIGS[kind], tmp_path / "model.safetensors"
    save(model_of(config), file)
    network = {**NETWORKS[kind], **changes}
    asked = {**config.to_dict(), "network": network, "null_label": network["num_classes"] - 1}
    asked["exits"] |= {"map": True, "time": "bias"}
    rewrite(file, config=asked)
    source = saved(tmp_path / "a.pth", state_of(Model(config).backbone))
    (tmp_path / "config.json").write_text(json.dumps({**asked, "exits": None}))
    with little_memory():
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "read_all", lambda file: pytest.fail("tensors were read"))
            refused(file, "does not fit this model")
        with pytest.raises(ValueError, match="does not fit this model"):
            convert(source, tmp_path / "b", str(tmp_path / "config.json"))


class Parallel(nn.Module):
    """As DistributedDataParallel holds a module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


def wrap_all(model: Model) -> nn.Module:
    model.backbone = torch.compile(model.backbone)
    return Parallel(torch.compile(model))


def compile_a_block(model: Model) -> Model:
    blocks = model.backbone.in_blocks if hasattr(model.backbone, "in_blocks") else model.backbone.blocks
    blocks[0] = torch.compile(blocks[0])
    return model


def compile_the_backbone(model: Model) -> Model:
    model.backbone = torch.compile(model.backbone)
    return model


def tie_heads(model: Model) -> Model:
    model.exits.heads[1] = model.exits.heads[0]
    return model


def tie_parameters(model: Model) -> Model:
    for head in model.exits.heads:
        for name, parameter in head.named_parameters(recurse=False):
            setattr(head, name, parameter)
    first, second = model.exits.heads[:2]
    name = next(name for name, _ in first.named_parameters())
    owner, _, last = name.rpartition(".")
    setattr(second.get_submodule(owner), last, first.get_parameter(name))
    return model


def tie_views(model: Model) -> Model:
    """Two parameters that overlap in one memory."""
    count = model.exits.bias.numel()
    memory = torch.arange(2.0 * count)
    model.exits.bias.data = memory[:count].view_as(model.exits.bias)
    model.exits.weight.data.view(-1)[:count] = memory[count:]
    model.backbone.pos_embed.data = torch.cat([memory, memory.new_zeros(model.backbone.pos_embed.numel())])[
        : model.backbone.pos_embed.numel()
    ].view_as(model.backbone.pos_embed)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        Parallel,
        compile_a_block,
        compile_the_backbone,
        wrap_all,
        tie_heads,
        tie_parameters,
        tie_views,
    ],
)
def test_saved_is_loadable(kind: str, wrap: Callable[[Model], nn.Module], tmp_path: Path) -> None:
    model = model_of(CONFIGS[kind])
    wrapped = wrap(model)
    wanted = {key.replace("_orig_mod.", ""): value.clone() for key, value in model.state_dict().items()}
    save(wrapped, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert again.config == CONFIGS[kind]
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())
    assert len({value.data_ptr() for value in again.parameters()}) == len(list(again.parameters()))
    assert set(read_tensors(tmp_path / "m.safetensors")[0]) == set(Model(CONFIGS[kind]).state_dict())


@pytest.mark.parametrize("wrap", [torch.compile, compile_a_block, compile_the_backbone, wrap_all, tie_heads])
def test_saved_by_a_pipeline_is_loadable(wrap: Callable[[Model], nn.Module], tmp_path: Path) -> None:
    model = model_of(UVIT_CONFIG)
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    if wrap is tie_heads:
        wanted |= {key: wanted[key.replace("heads.1", "heads.0")] for key in wanted if key.startswith("exits.heads.1")}
    adadiff.AdaDiffPipeline(wrap(model)).save_pretrained(tmp_path)
    again = adadiff.AdaDiffPipeline.from_pretrained(tmp_path).transformer.model.state_dict()
    assert again.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in again.items())


def test_files_that_were_saved_compiled_are_loaded(file: Path) -> None:
    """As before names were made plain."""
    tensors, metadata = read_tensors(file)
    names = {key: f"_orig_mod.{key.replace('mid_block.', 'mid_block._orig_mod.')}" for key in tensors}
    write_tensors(file, {names[key]: value for key, value in tensors.items()}, metadata)
    again = load(file).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in tensors.items())
    write_tensors(file, {**{names[key]: value for key, value in tensors.items()}, **tensors}, metadata)
    refused(file, "holds tensors compiled and not compiled under one name")


def test_weights_come_back_into_a_compiled_backbone(file: Path) -> None:
    model = compile_the_backbone(model_of(UVIT_CONFIG))
    tensors = {key: value + 1 for key, value in read_tensors(file)[0].items()}
    checkpoint.load_strictly(model, tensors, "it")
    assert torch.equal(model.backbone._orig_mod.pos_embed, tensors["backbone.pos_embed"])


def set_nan(model: Model) -> Model:
    model.exits.weight.data[0, 0, 0] = torch.nan
    return model


def add_a_parameter(model: Model) -> Model:
    model.backbone.adapter = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (set_nan, "exits.weight in the model to save holds NaN or infinity"),
        (lambda model: model.to("meta"), "not a dense tensor with values"),
        (lambda model: model.to(torch.complex64), "is torch.complex64; weights are floating point"),
        (add_a_parameter, r"the model to save does not fit this model: unexpected backbone\.adapter\.weight"),
        (lambda model: model.backbone, "this takes an adadiff.Model, got UViT"),
        (lambda model: model.state_dict(), "this takes an adadiff.Model, got OrderedDict"),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_what_could_not_be_loaded_is_not_saved(spoil: Callable, message: str, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        save(spoil(model_of(UVIT_CONFIG)), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@contextmanager
def everything() -> Iterator[None]:
    with default_dtype(torch.float16), default_device("meta"), torch.inference_mode():
        yield


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "device meta": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "everything": everything,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_process_wide_settings_make_no_difference(kind: str, setting: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[kind])
    source = saved(tmp_path / "a.pth", state_of(model.backbone))
    plain = config_file(tmp_path, dataclasses.replace(CONFIGS[kind], exits=None))
    convert(source, tmp_path / "wanted", plain)
    with SETTINGS[setting]():
        save(model, tmp_path / "m.safetensors")
        again = load(tmp_path / "m.safetensors")
        convert(source, tmp_path / "converted", plain)
        opened = load(tmp_path / "converted")
        told = describe(tmp_path / "m.safetensors")
    for found, wanted in ((again, model), (opened, load(tmp_path / "wanted"))):
        own = wanted.state_dict()
        for key, value in found.state_dict().items():
            assert (value.dtype, value.device.type, value.is_inference()) == (torch.float32, "cpu", False)
            assert torch.equal(value, own[key])
    assert told == describe(tmp_path / "m.safetensors")
    x, t = torch.randn(2, *again.backbone.sample_shape), torch.tensor([3.0, 400.0])
    again.backbone(x, t, torch.tensor([0, 1])).sum().backward()  # it can be trained
    assert again.backbone.blocks[0].mlp.fc2.weight.grad is not None


@pytest.mark.parametrize("preset", ["digits", "dit_s_8_256"])
@pytest.mark.parametrize("setting", ["float64", "inference mode", "no grad"])
def test_building_under_process_wide_settings(preset: str, setting: str) -> None:
    """A default dtype is followed by all weights, as PyTorch's own modules do; the mode makes no difference."""
    torch.manual_seed(1)
    with SETTINGS[setting]():
        model = adadiff.build(preset, PAPER)
    dtype = torch.float64 if setting == "float64" else torch.float32
    assert {(value.dtype, value.is_inference()) for value in model.state_dict().values()} == {(dtype, False)}
    assert model.backbone.blocks[0].mlp.fc2.weight.requires_grad


def state_of_all() -> tuple:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002 (is untouched)


def test_nothing_is_drawn_from_the_global_generators(file: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pth", state_of(Model(DIT_CONFIG).backbone))
    plain = config_file(tmp_path, dataclasses.replace(DIT_CONFIG, exits=None))
    model = load(file)
    actions = {
        "load": lambda: load(file),
        "load by name": lambda: load("digits"),
        "load in another dtype": lambda: load(file, dtype="bfloat16"),
        "save": lambda: save(model, tmp_path / "again.safetensors"),
        "describe": lambda: describe(file),
        "describe another's": lambda: describe(source),
        "convert": lambda: convert(source, tmp_path / "b", plain),
        "shapes": lambda: conversion.shapes(ModelConfig(DiTConfig(8, 1, 4, 24, 3, 2, num_classes=3), "linear")),
        "features of the digits": features.load,
    }
    for name, action in actions.items():
        before = state_of_all()
        action()
        assert state_of_all() == before, name


def test_a_file_that_may_not_be_read_is_not_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so that the refusal is made here."""
    original = Path.open

    def denied(self: Path, *arguments: object, **options: object) -> object:
        if self == file:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    for read in (load, describe, read_tensors):
        with pytest.raises(PermissionError, match=r"Permission denied: .*model\.safetensors"):
            read(file)
