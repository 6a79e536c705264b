"""Models on disk: what is written comes back, and what cannot be read or written says so and leaves nothing behind."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adadiff import checkpoint
from adadiff.checkpoint import dtype_from, load, read_tensors, save, write_tensors
from adadiff.config import PRESETS, ModelConfig
from adadiff.model import Model, build
from adadiff.uem import OFFICIAL, PAPER
from sampler.test_step_selector import selecting
from sampler.tiny import UVIT, inputs, scramble

CONFIG = ModelConfig(dataclasses.replace(UVIT, depth=2), "cosine", null_label=4, exits=PAPER)


@pytest.fixture
def model() -> Model:
    made = Model(CONFIG).eval()
    scramble(made, 0.2)
    return made


@pytest.fixture
def file(model: Model, tmp_path: Path) -> Path:
    save(model, tmp_path / "model.safetensors", {"by": "hand"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("exits", [PAPER, OFFICIAL, None], ids=str)
def test_what_is_written_comes_back(exits, tmp_path: Path) -> None:
    model = Model(dataclasses.replace(CONFIG, exits=exits)).eval()
    scramble(model, 0.2)
    save(model, tmp_path / "new" / "folder" / "model.safetensors")
    again = load(tmp_path / "new" / "folder" / "model.safetensors")
    assert again.config == model.config
    assert not again.training
    own, theirs = model.state_dict(), again.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own)
    given = inputs(model.backbone, 3)
    assert torch.equal(model.backbone(*given.all), again.backbone(*given.all))
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["model.safetensors"]


def test_other_programs_can_read_it(file: Path, model: Model) -> None:
    with safe_open(file, framework="pt") as opened:
        keys, header = set(opened.keys()), {k: json.loads(v) for k, v in opened.metadata().items()}
    assert {key.removeprefix("backbone.") for key in keys if key.startswith("backbone.")} == set(
        model.backbone.state_dict()
    )
    assert header["format_version"] == 2
    assert header["notes"] == {"by": "hand"}
    assert header["config"]["network"]["dim"] == 48
    assert header["config"]["family"] == "uvit"


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, 2000, -1])
def test_a_truncated_file_is_named(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file \(truncated"):
        load(file)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not tensors, however long this text may be")
    with pytest.raises(ValueError, match=r"notes\.txt is not a readable safetensors file"):
        load(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["absent.safetensors", ".", "no such name"])
def test_where_there_is_no_file_the_shipped_names_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"neither a file nor one of canvases, .*digits"):
        load(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        read_tensors(tmp_path / name)


def rewrite(file: Path, change: Callable[[dict, dict], None]) -> None:
    """`change` edits tensors and header in place."""
    tensors, _ = read_tensors(file)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    change(tensors, header)
    save_file(tensors, file, metadata=header)


def config_with(header: dict, **changes: object) -> None:
    header["config"] = json.dumps({**json.loads(header["config"]), **changes})


NETWORK = dataclasses.asdict(CONFIG.network)
QKV = "backbone.in_blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t.pop(QKV), f"missing {QKV}"),
        (lambda t, h: t.update(surplus=torch.zeros(1)), "unexpected surplus"),
        (lambda t, h: t.update({QKV: torch.zeros(3, 48)}), rf"{QKV} is \(3, 48\), expected \(144, 48\)"),
        (lambda t, h: (t.pop(QKV), t.update(surplus=torch.zeros(1))), f"missing {QKV}; unexpected surplus"),
        (lambda t, h: t.clear(), r"missing backbone\.pos_embed;.* and \d+ more"),
        (lambda t, h: config_with(h, exits=None), r"unexpected exits\.bias"),
        (lambda t, h: config_with(h, network={**NETWORK, "depth": 4}), r"missing backbone\.in_blocks\.1"),
        (lambda t, h: config_with(h, network={**NETWORK, "breadth": 4}), "unknown key breadth in network"),
        (lambda t, h: config_with(h, colour="red"), "unknown key colour in model"),
        (lambda t, h: config_with(h, network={"dim": 48}), "network lacks image_size"),
        (lambda t, h: config_with(h, network=[1]), r"network must be a table of values, got \[1\]"),
        (lambda t, h: config_with(h, exits={"map": 1}), "exits.map must be true or false"),
        (lambda t, h: config_with(h, family="unet"), "unknown network family 'unet'"),
        (lambda t, h: config_with(h, schedule="none"), "no noise schedule 'none'"),
        (lambda t, h: config_with(h, null_label=3), "null_label must be the last of 5 classes, got 3"),
        (lambda t, h: h.pop("config"), "no model configuration"),
        (lambda t, h: h.update(config="{"), "not a readable safetensors file"),
        (lambda t, h: h.update(format_version="3"), r"has format version 3, this release reads 2$"),
        (lambda t, h: h.pop("format_version"), "format version None, .*; adadiff convert reads other formats$"),
    ],
)
def test_what_does_not_fit_is_named(file: Path, change: Callable, message: str) -> None:
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        load(file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_dtype_asked_for(file: Path, model: Model, dtype: str) -> None:
    for given in (dtype, getattr(torch, dtype)):
        again = load(file, dtype=given)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value.to(getattr(torch, dtype)))
    save(again, file.with_name("again.safetensors"))
    stored, own = load(file.with_name("again.safetensors")).state_dict(), again.state_dict()
    assert {value.dtype for value in stored.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(stored[key], own[key]) for key in own)


@pytest.mark.parametrize("stored", ["float16", torch.bfloat16])
def test_a_file_of_half_the_size_is_loaded_in_the_models_dtype(stored: object, file: Path, model: Model) -> None:
    half = file.with_name("half.safetensors")
    save(model, half, stored=stored)
    assert half.stat().st_size < 0.6 * file.stat().st_size
    assert {value.dtype for value in read_tensors(half)[0].values()} == {dtype_from(stored)}
    again = load(half)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value.to(dtype_from(stored)).float())
    assert next(load(half, dtype="bfloat16").parameters()).dtype == torch.bfloat16
    save(again, half)  # a loaded model forgets how it was stored
    assert half.stat().st_size == pytest.approx(file.stat().st_size, rel=0.01)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_file_of_rounded_weights_keeps_any_dtype(dtype: str, file: Path) -> None:
    """Also beside a step selector, which is always float32."""
    model = selecting().to(getattr(torch, dtype))
    save(model, file, stored="float16")
    assert {value.dtype for value in load(file).state_dict().values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", ["float8", 16, ["float16"]])
def test_an_unknown_dtype_in_a_file_is_named(dtype: object, file: Path) -> None:
    rewrite(file, lambda _, metadata: metadata.update(dtype=json.dumps(dtype)))
    with pytest.raises(ValueError, match=r"model\.safetensors: dtype must be one of"):
        load(file)


def test_weights_of_several_dtypes_are_loaded_in_one_that_holds_them(file: Path, model: Model) -> None:
    """Nothing is rounded, and the products of a network are of one dtype."""
    rewrite(file, lambda tensors, _: tensors.update({QKV: tensors[QKV].bfloat16()}))
    own = load(file).state_dict()
    assert {value.dtype for value in own.values()} == {torch.float32}
    assert torch.equal(own[QKV], model.state_dict()[QKV].bfloat16().float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'$"),
        ({"dtype": torch.float64}, "dtype must be one of float32, bfloat16, float16, got torch.float64$"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"dtype": 32}, "dtype must be one of .*, got 32$"),
        ({"device": "tpu9"}, "cannot use device 'tpu9': "),
        ({"device": "cuda:77"}, "cannot use device 'cuda:77': "),
        ({"device": torch.device("cuda:77")}, "cannot use device 'cuda:77': "),
        ({"device": ""}, "cannot use device '': "),
    ],
)
def test_unknown_dtypes_and_devices_are_refused(file: Path, settings: dict, message: str) -> None:
    """In one line, and before the file is looked for."""
    for given in (file, file.with_name("absent")):
        with pytest.raises(ValueError, match=message) as refused:
            load(given, **settings)
        assert "\n" not in str(refused.value)


def test_the_device_is_where_the_weights_are(file: Path) -> None:
    for device in ("cpu", torch.device("cpu")):
        assert load(file, device).device == torch.device("cpu")
    assert load(file, "meta").device == torch.device("meta")


def test_loading_that_fails_changes_nothing(model: Model) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = {key: value + 1 for key, value in before.items()}
    given.pop("backbone.norm.bias")
    with pytest.raises(ValueError, match=r"here does not fit this model: missing backbone\.norm\.bias"):
        checkpoint.load_strictly(model, given, "here")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_unwritable_target_leaves_nothing_behind(model: Model, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for target in (tmp_path / "taken" / "model.safetensors", tmp_path / "folder"):
        with pytest.raises((OSError, ValueError), match=r"taken|folder"):
            save(model, target)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "folder",
        "folder/inside",
        "taken",
    ]
    assert (tmp_path / "taken").read_text() == "a file, not a folder"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_what_was_there_survives_a_write_that_fails(file: Path, model: Model, monkeypatch, error) -> None:
    before = file.read_bytes()

    def half(tensors, path, metadata) -> None:
        Path(path).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(type(error)):
        save(model, file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_tensors_need_not_be_contiguous_or_of_one_dtype(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "t", tensors, {"step": 7})
    again, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"step": 7}
    for key, value in tensors.items():
        assert again[key].dtype == value.dtype
        assert torch.equal(again[key], value)


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name: str) -> None:
    config = PRESETS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_building_by_name() -> None:
    assert build("digits").config == PRESETS["digits"]
    with torch.device("meta"):
        model = build("cifar10_uvit_small", OFFICIAL)
    assert model.config.exits == OFFICIAL
    assert model.exits.weight.shape == (13, 12, 512)
    with pytest.raises(ValueError, match="unknown preset 'cifar', known: cifar10_uvit_small"):
        build("cifar")
