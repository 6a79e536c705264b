"""Shards as Parquet files: every value of the shards, in files that pandas and others read."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet_files

import adadiff
from adadiff.output import parquet, shards
from sampler import sharded, shell
from sampler.sharded import line
from sampler.shell import config, error_line, run, saved

ctrl_c, tiny, whole, copy = shell.ctrl_c, shell.tiny, sharded.whole, sharded.copy


def rows(folder: Path) -> dict[str, list]:
    tables = [parquet_files.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in tables[0].column_names}


def test_a_row_has_all_of_a_sample(whole: Path, tmp_path: Path) -> None:
    """Eleven samples of 3 and 4 steps in turn, with guidance, in shards of four."""
    assert parquet.export(whole, tmp_path / "out") == 3
    found = rows(tmp_path / "out")
    assert list(found) == ["slot", "seed", "label", "image", "exit_layers", "exit_layers_unconditional"]
    arrays = list(shards.read(whole))
    for column, name in {"slot": "slots", "seed": "seeds", "label": "labels"}.items():
        assert found[column] == [value for shard in arrays for value in shard[name].tolist()]
    images = [image for shard in arrays for image in shard["images"]]
    for png, image in zip(found["image"], images, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), image[..., 0])
    layers = [shard["exit_layer"][:, i] for shard in arrays for i in range(len(shard["slots"]))]
    for i, own in enumerate(layers):
        steps = (3, 4)[i % 2]
        assert found["exit_layers"][i] == own[:steps, 0].tolist()
        assert found["exit_layers_unconditional"][i] == own[:steps, 1].tolist()
        assert not own[steps:].any()


def test_latents_are_float32_as_they_were(tmp_path: Path) -> None:
    model = saved(tmp_path / "latents.safetensors", config(channels=4))
    assert run(f"sample {model} -n 3 --steps 2 --shard 2 --out {tmp_path}/a --parquet {tmp_path}/b") == 0
    found = rows(tmp_path / "b")
    assert list(found) == ["slot", "seed", "latent", "exit_layers"]
    expected, _ = adadiff.sample(adadiff.load(model), 3, steps=2)
    for i in (0, 2):
        latent = torch.tensor(found["latent"][i]).reshape(4, 8, 8)
        assert torch.allclose(latent, expected[i], atol=1e-4)
    exact = np.concatenate([shard["latents"] for shard in shards.read(tmp_path / "a")])
    assert np.array_equal(np.array(found["latent"], np.float32), exact.reshape(3, -1))


def test_an_export_goes_on_and_knows_its_own_files(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    parquet.export(copy, out)
    (out / "shard-00001.parquet").unlink()
    (out / "shard-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"shard-00002\.parquet holds other samples"):
        parquet.export(copy, out)
    before = (out / "shard-00000.parquet").stat().st_mtime_ns
    assert parquet.export(copy, out, force=True) == 2
    assert (out / "shard-00000.parquet").stat().st_mtime_ns == before
    assert parquet.export(copy, out) == 0
    found = json.loads(parquet_files.read_schema(out / "shard-00002.parquet").metadata[b"adadiff"])
    assert found["slots"] == [8, 11]
    assert found["configuration"]["steps"] == [3, 4]


def test_another_run_is_refused_before_it_draws(
    tiny: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    parquet.export(whole, tmp_path / "out")
    other = line(tiny, tmp_path / "other", f"--parquet {tmp_path}/out").replace("--seed 5", "--seed 6")
    assert run(other) == 2
    assert "holds other samples" in error_line(capsys.readouterr().err)
    assert not (tmp_path / "other").exists()
    assert run(f"{other} --force") == 0
    assert f"wrote {tmp_path}/out: 3 of 3 Parquet files" in capsys.readouterr().out
    assert rows(tmp_path / "out")["seed"][0] == 6


def test_a_folder_that_lacks_shards_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "shard-00001.npz").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 shards"):
        parquet.export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
