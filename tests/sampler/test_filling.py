"""A folder is filled with the same bits by any number of processes, after any interruption, or refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import adadiff
from adadiff.output import shards
from adadiff.output.filling import Process, ShardFolder
from sampler import sharded, shell
from sampler.sharded import assert_equal, line, times
from sampler.shell import config, error_line, interrupt_call, run, saved

ctrl_c, tiny, whole, copy = shell.ctrl_c, shell.tiny, sharded.whole, sharded.copy


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (4, 3, 2, 0, 1)], ids=str)
def test_any_number_of_processes_in_any_order_write_the_same(order, tiny, whole, tmp_path, monkeypatch, capsys):
    """Of five processes two have nothing to do."""
    monkeypatch.setenv("WORLD_SIZE", str(len(order)))
    monkeypatch.setattr("adadiff.commands.sample.with_bars", lambda: True)  # as on a terminal
    done = set()
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        assert run(line(tiny, tmp_path)) == 0
        done |= set(range(rank, 3, len(order)))
        assert set(times(tmp_path)) == {f"shard-{number:05d}.npz" for number in done}
        assert (tmp_path / "report.json").exists() == (len(done) == 3)
        printed = capsys.readouterr()
        last = rank < 3 and len(done) == 3
        assert ("wrote" in printed.out) == last
        assert ("image/s" in printed.err) == (rank == 0)
        if rank:
            assert "policy" not in printed.out
            assert printed.err == ""
    assert_equal(tmp_path, whole)


def launched(words: list[str]) -> None:
    """Python in a process of its own, with one thread, as the tests have."""
    subprocess.run([sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120)


DIGITS = "sample digits -n 23 --shard 5 --format npz --steps 4 --class-labels 3,1,4 --policy exit:0.1 --batch 4 --out"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "one"
    assert run(f"{DIGITS} {folder}") == 0
    return folder


@pytest.mark.slow
def test_torchrun_draws_the_same_as_one_process(digits, tmp_path):
    launched(f"-m torch.distributed.run --standalone --nproc_per_node 2 -m adadiff {DIGITS} {tmp_path}".split())
    assert_equal(tmp_path, digits)


KILLED = """
import os, signal, sys
import numpy as np
from adadiff import cli

save = np.savez

def killed(file, **arrays):
    if arrays["slots"][0] == 10:
        file.write(b"PK, and that was it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, **arrays)

np.savez = killed
cli.main(sys.argv[1:])
"""


def test_a_kill_while_writing_loses_and_repeats_nothing(digits, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as death:
        launched(["-c", KILLED, *f"{DIGITS} {tmp_path}".split()])
    assert death.value.returncode == -signal.SIGKILL
    there = times(tmp_path)
    assert there.pop("shard-00002.npz.0.part")
    assert set(there) == {"shard-00000.npz", "shard-00001.npz"}
    assert run(f"{DIGITS} {tmp_path}") == 0
    assert there.items() <= times(tmp_path).items()
    assert_equal(tmp_path, digits)


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_tells_what_is_on_disk(rank, tiny, whole, tmp_path, monkeypatch, capsys):
    undo = interrupt_call(monkeypatch, ShardFolder, "write", 2)
    if rank:  # says nothing, for rank 0 does
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(line(tiny, tmp_path)) == 0
        (tmp_path / "shard-00001.npz").unlink()
        with pytest.raises(SystemExit) as end:
            run(line(tiny, tmp_path))
        assert end.value.code == 130
        assert capsys.readouterr() == ("", "")
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")
    else:
        assert run(line(tiny, tmp_path)) == 130
        last = error_line(capsys.readouterr().err)
        assert last == f"adadiff: interrupted; 4 of 11 samples are in {tmp_path}; the same command goes on"
    undo()
    assert run(line(tiny, tmp_path)) == 0
    assert ("4 of 11 samples are in" in capsys.readouterr().out) == (rank == 0)
    assert_equal(tmp_path, whole)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)], ids=str)
def test_an_error_while_writing_leaves_no_half_a_shard(error, code, tiny, whole, tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"PK")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fail)
        assert run(line(tiny, tmp_path)) == code
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert run(line(tiny, tmp_path)) == 0
    assert_equal(tmp_path, whole)


def test_stale_parts_go_with_the_process_that_owns_their_rank(tiny, tmp_path, monkeypatch):
    ours = ("shard-00001.npz.0.part", "report.json.6.part"), ("manifest.json.1.part", "grid.png.3.part")
    theirs = ("shard.npz.0.part", "notes.part")
    for name in (*ours[0], *ours[1], *theirs):
        (tmp_path / name).touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, left in ((0, {*ours[1], *theirs}), (1, {*theirs})):
        monkeypatch.setenv("RANK", str(rank))
        assert run(line(tiny, tmp_path)) == 0
        assert {path.name for path in tmp_path.glob("*.part")} == left


def test_samples_with_nan_are_refused_by_number(tiny, whole, tmp_path, monkeypatch, capsys):
    original = adadiff.SamplerRun.__iter__

    def poisoned(self):
        for slots, images in original(self):
            images[self.samples.seeds[slots] == 5 + 6, :, 2] = torch.nan
            yield slots, images

    with monkeypatch.context() as patch:
        patch.setattr(adadiff.SamplerRun, "__iter__", poisoned)
        assert run(line(tiny, tmp_path)) == 2
    assert "sample 6 holds NaN" in error_line(capsys.readouterr().err)
    assert set(times(tmp_path)) == {"shard-00000.npz"}
    assert run(line(tiny, tmp_path)) == 0
    assert_equal(tmp_path, whole)


def test_a_full_folder_grows_and_another_does_not(tiny, whole, tmp_path, capsys):
    assert run(line(tiny, tmp_path, "--n 8")) == 0
    before = times(tmp_path)
    assert len(before) == 2
    assert run(line(tiny, tmp_path)) == 0
    assert before.items() <= times(tmp_path).items()
    assert_equal(tmp_path, whole)
    capsys.readouterr()
    for n, words in ((12, "holds n = 11 samples and cannot grow"), (8, "drawn with another n;")):
        assert run(line(tiny, tmp_path, f"--n {n}")) == 2
        assert words in error_line(capsys.readouterr().err)
        assert_equal(tmp_path, whole)


def test_other_configurations_are_refused(tiny, copy, tmp_path, capsys):
    other = saved(tmp_path / "other.safetensors", config(dim=48))
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    changes = {
        "--seed 6": "seed",
        "--shard 5": "shard",
        "--batch 4 --class-labels 1": "batch, class_labels",
        "--batch-invariant": "batch_invariant",
        "--steps 3": "steps",
        "--seed 6 --n 12": "n, seed",
    }
    for change, names in changes.items():
        assert run(line(tiny, copy, change)) == 2
        assert f"holds samples drawn with another {names};" in error_line(capsys.readouterr().err)
    assert run(line(other, copy)) == 2
    assert "model_sha256" in error_line(capsys.readouterr().err)
    assert run(line(tiny, copy, "--format png").replace("--shard 4", "")) == 2
    assert "holds shards" in error_line(capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_folders_that_hold_something_else_are_refused(tiny, copy, tmp_path, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    bad = {
        "{": "Expecting",
        "[3]": "has no attribute",
        json.dumps({**manifest, "format_version": 1}): "format version is 1, this release reads 2",
        json.dumps({**manifest, "colour": 1}): "unknown key colour",
        json.dumps({**manifest, "configuration": {"n": "7", "shard": 4}}): "n must be an integer >= 0, got '7'",
    }
    for text, words in bad.items():
        (copy / "manifest.json").write_text(text)
        assert run(line(tiny, copy)) == 2
        assert words in error_line(capsys.readouterr().err)
        with pytest.raises(ValueError, match=r"manifest\.json is no manifest"):
            shards.read(copy)
    (copy / "manifest.json").unlink()
    pictures = tmp_path / "pictures"
    assert run(f"sample {tiny} --out {pictures} --n 2 --steps 1") == 0
    capsys.readouterr()
    for folder in (copy, pictures):
        assert run(line(tiny, folder)) == 2
        assert "holds samples but no manifest.json" in error_line(capsys.readouterr().err)
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        shards.read(copy)
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        assert run(line(tiny, folder)) == 2
        assert f"cannot write to {folder}" in error_line(capsys.readouterr().err)


def test_processes_are_told_apart_under_every_launcher():
    assert Process.of({}) == Process(0, 1)
    assert Process.of({"RANK": "3", "WORLD_SIZE": "8", "PMI_RANK": "0", "PMI_SIZE": "1"}) == Process(3, 8)
    assert Process.of({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}) == Process(1, 2)
    assert Process.of({"PMI_RANK": "0", "PMI_SIZE": "2"}) == Process(0, 2)
