"""Shards hold what Python draws, the reader gives each sample once, and damage is seen and drawn again."""

import json
import tracemalloc

import numpy as np
import pytest
import torch

import adadiff
from adadiff.commands import sample as sample_command
from adadiff.output import shards
from sampler import sharded, shell
from sampler.sharded import assert_equal, line, load, times
from sampler.shell import config, error_line, pixels, run, saved
from sampler.test_writing import NEVER_REPLACED

ctrl_c, tiny, whole, copy = shell.ctrl_c, shell.tiny, sharded.whole, sharded.copy


def drawn(model: str, slots: range) -> tuple[torch.Tensor, adadiff.Report]:
    return adadiff.sample(
        adadiff.load(model),
        len(slots),
        steps=[(3, 4)[slot % 2] for slot in slots],
        solver="ddim:0.5",
        policy="exit:0.4",
        seed=[5 + slot for slot in slots],
        class_labels=[(0, 7, 2)[slot % 3] for slot in slots],
        guidance_scale=2.5,
        tied=True,
        batch=3,
    )


def test_shards_hold_what_python_draws(tiny, whole):
    assert sorted(path.name for path in whole.iterdir()) == [
        "grid.png",
        "manifest.json",
        "report.json",
        *(f"shard-{number:05d}.npz" for number in range(3)),
    ]
    reports = []
    for number, slots in enumerate((range(4), range(4, 8), range(8, 11))):
        images, report = drawn(tiny, slots)
        reports.append(report)
        shard = load(whole / f"shard-{number:05d}.npz")
        np.testing.assert_array_equal(shard["images"], np.stack([pixels(image)[..., None] for image in images]))
        np.testing.assert_array_equal(shard["slots"], slots)
        np.testing.assert_array_equal(shard["seeds"], [5 + slot for slot in slots])
        np.testing.assert_array_equal(shard["labels"], [(0, 7, 2)[slot % 3] for slot in slots])
        np.testing.assert_array_equal(shard["exit_layer"], report.exit_layer)
        assert (shard["macs"], shard["rows_moved"]) == (report.macs, report.rows_moved)

    written = json.loads((whole / "report.json").read_text())
    ends = [int(layer) for report in reports for layer in report.exit_layer.flatten() if layer]
    assert set(ends) == {1, 2, 3}, "without exits at every layer the counts below mean little"
    assert written["exit_layer_histogram"] == [ends.count(layer) for layer in (1, 2, 3)]
    assert written["mean_exit_layer"] == pytest.approx(sum(ends) / len(ends), abs=1e-12)
    assert (written["samples"], written["passes"], written["num_layers"]) == (11, len(ends), 3)
    for name in ("macs", "macs_full", "blocks"):
        assert written[name] == sum(getattr(report, name) for report in reports)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert written["configuration"] == manifest["configuration"]
    assert (manifest["array"], manifest["shape"]) == ("images", [8, 8, 1])


def test_grid_shows_the_first_samples_over_shard_borders(whole):
    cells = shell.grid_cells(shell.read(whole / "grid.png"), 3, 4)
    images = np.concatenate([shard["images"] for shard in shards.read(whole)])[..., 0]
    np.testing.assert_array_equal(cells[:11], np.kron(images, np.ones((1, 8, 8), np.uint8)))
    assert (cells[11] == 255).all()


def test_reader_gives_every_slot_once_or_refuses(whole, copy):
    assert [slot for shard in shards.read(str(whole)) for slot in shard["slots"]] == list(range(11))
    for number in (1, 2):
        (copy / f"shard-{number:05d}.npz").unlink()
    with pytest.raises(ValueError, match=r"lacks 2 of 3 shards, the first of them shard-00001\.npz"):
        shards.read(copy)


def test_latents_are_kept_as_they_are(tmp_path):
    """Without labels, by default as shards, without a grid."""
    model = saved(tmp_path / "latents.safetensors", config(channels=4))
    assert run(f"sample {model} --out {tmp_path / 'o'} --n 5 --shard 3 --steps 2 --policy exit:0.1") == 0
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        "manifest.json",
        "report.json",
        "shard-00000.npz",
        "shard-00001.npz",
    }
    for slots, shard in zip((range(3), range(3, 5)), shards.read(tmp_path / "o"), strict=True):
        latents, _ = adadiff.sample(adadiff.load(model), len(slots), steps=2, policy="exit:0.1", seed=list(slots))
        assert shard["latents"].dtype == np.float32
        np.testing.assert_array_equal(shard["latents"], latents)
        assert "labels" not in shard


def test_colours_come_last(tmp_path):
    model = saved(tmp_path / "rgb.safetensors", config(channels=3))
    assert run(f"sample {model} --out {tmp_path / 'o'} --n 2 --steps 2 --policy full --format npz") == 0
    images, _ = adadiff.sample(adadiff.load(model), 2, steps=2)
    (shard,) = shards.read(tmp_path / "o")
    np.testing.assert_array_equal(shard["images"], np.stack([pixels(image) for image in images]))


def test_batch_invariant_samples_are_the_same_bits_in_other_batches_and_shards(tmp_path):
    """Latents, since pixels hide the last bits; so wide that products of a single lane differ from those of several."""
    model, results = saved(tmp_path / "wide.safetensors", config(channels=4, dim=192, heads=6)), []
    for i, sizes in enumerate(("--batch 3 --shard 4", "--batch 1 --shard 7")):
        alone = line(model, tmp_path / str(i), f"--guidance-scale 1 --batch-invariant {sizes}").replace(" --tied", "")
        assert run(alone) == 0
        parts = list(shards.read(tmp_path / str(i)))
        latents = np.concatenate([part["latents"] for part in parts])
        results.append((latents, np.concatenate([part["exit_layer"] for part in parts], 1)))
    np.testing.assert_equal(*results)


def test_no_samples_is_no_error(tiny, tmp_path):
    assert run(line(tiny, tmp_path, "--n 0 --class-labels 1 --steps 3")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "report.json"}
    assert json.loads((tmp_path / "report.json").read_text())["mean_exit_layer"] is None
    assert list(shards.read(tmp_path)) == []


def test_the_default_format_follows_n(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_command, "PNG_MOST", 5)
    for n, file in ((5, "000004.png"), (6, "shard-00000.npz")):
        assert run(f"sample {tiny} --out {tmp_path / str(n)} --n {n} --steps 1") == 0
        assert (tmp_path / str(n) / file).exists()


def test_bar_shows_the_mean_exit_depth(tiny, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("adadiff.commands.sample.with_bars", lambda: True)  # as on a terminal
    assert run(line(tiny, tmp_path)) == 0
    depth = json.loads((whole / "report.json").read_text())["mean_exit_layer"]
    last = capsys.readouterr().err.strip().split("\r")[-1]
    assert "11/11" in last
    assert f"depth={depth:.2f}/3" in last


DAMAGES = {
    "cut": lambda data: data[:-30],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a byte": lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
    "no archive": lambda data: b"\x93NUMPY" + data[6:],
}


@pytest.mark.parametrize("damage", [*DAMAGES])
def test_damaged_shards_are_seen_and_drawn_again(damage, tiny, whole, copy, capsys):
    before = times(copy)
    path = copy / "shard-00001.npz"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    reader = shards.read(copy)
    np.testing.assert_array_equal(next(reader)["slots"], range(4))
    with pytest.raises(ValueError, match=r"shard-00001\.npz is damaged"):
        next(reader)
    assert run(line(tiny, copy)) == 0
    assert "shard-00001.npz is damaged" in capsys.readouterr().out
    assert before.items() - times(copy).items() == {("shard-00001.npz", before["shard-00001.npz"])}
    assert_equal(copy, whole)


def test_every_other_byte_is_damage_or_changes_nothing(copy):
    manifest, path = shards.Manifest.read(copy), copy / "shard-00001.npz"
    data, expected, damaged = path.read_bytes(), load(path), 0
    for at in range(0, len(data), 5):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            shard = shards.read_shard(copy, manifest, 1)
        except ValueError:
            damaged += 1
        else:
            np.testing.assert_equal(shard, expected)
    assert damaged > len(data) / 5 / 2


@pytest.mark.parametrize("shard", [1, 4, 10**9])
@pytest.mark.parametrize("n", [10**7, 10**9, 10**30])
def test_a_manifest_of_any_number_of_samples_costs_nothing(n, shard, tiny, copy, capsys):
    """Whether it is read, evaluated or drawn on."""
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["configuration"] |= {"n": n, "shard": shard}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    before = times(copy)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"lacks \d+ of \d+ shards|n must be at most|damaged"):
            list(shards.read(copy))
        assert run(f"evaluate {copy} --features digits") == 2
        assert run(line(tiny, copy)) == 2
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 10**8 or n == 10**7, "a label each"
    assert most < 10**9
    assert capsys.readouterr().err.count("adadiff: error: ") == 2
    assert times(copy) == before


@pytest.mark.parametrize(
    "change",
    [
        {"array": "pixels"},
        {"array": ["images"]},
        {"shape": "888"},
        {"shape": [8, 8]},
        {"shape": [8, 8, -1]},
        {"shape": [8, 8, 1.5]},
        {"shape": None},
        {"num_layers": "3"},
        {"num_layers": 0},
        {"configuration": None},
        {"configuration": [1]},
        {"configuration": {}},
        {"configuration": {"n": True, "shard": 4}},
        {"configuration": {"n": 11, "shard": 0}},
        {"configuration": {"n": 11, "shard": None}},
    ],
    ids=str,
)
def test_manifests_of_other_types_are_one_line(change, tiny, copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **change}))
    for command in (f"evaluate {copy} --features digits", line(tiny, copy)):
        assert run(command) == 2
        assert "manifest.json is no manifest that" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("kind", [kind for kind in NEVER_REPLACED if kind != "a link to itself"])
@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.npz"])
def test_shards_that_are_pipes_or_devices_are_refused(name, kind, copy, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    (copy / name).unlink()
    NEVER_REPLACED[kind](copy / name)
    with pytest.raises((ValueError, OSError)):
        list(shards.read(copy))
    assert run(f"evaluate {copy} --features digits") == 2
    error_line(capsys.readouterr().err)


def test_shards_of_other_slots_are_damage(tiny, whole, copy):
    (copy / "shard-00000.npz").write_bytes((copy / "shard-00001.npz").read_bytes())
    with pytest.raises(ValueError, match="does not hold the slots 0 to 3"):
        list(shards.read(copy))
    assert run(line(tiny, copy)) == 0
    assert_equal(copy, whole)


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ("--shard 0", {}, "shard must be an integer >= 1"),
        ("--format png", {}, "--shard is for --format npz"),
        ("--format png", {"RANK": "1", "WORLD_SIZE": "2"}, "--format png takes one process"),
        ("", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be a whole number below WORLD_SIZE, got 2 and 2"),
        ("", {"RANK": "0"}, "RANK must be a whole number below WORLD_SIZE"),
        ("--class-labels 0,10", {}, "labels must be in 0..9"),
        ("--steps 0", {}, "steps must be at least 1"),
    ],
)
def test_bad_settings_end_in_one_line_before_work(options, environment, words, tiny, tmp_path, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(line(tiny, tmp_path / "o", options)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in error_line(captured.err)
    assert not (tmp_path / "o").exists()
