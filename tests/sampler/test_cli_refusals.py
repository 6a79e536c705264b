"""What commands refuse by name, and help that they offer with it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from adadiff import cli, reading
from adadiff.metrics.references import open_reference
from adadiff.output.locking import only_launch
from adadiff.output.pictures import write_png
from sampler import shell
from sampler.shell import error_line, run

tiny = shell.tiny


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    page = capsys.readouterr().out
    assert run("") == 2
    captured = capsys.readouterr()
    assert captured.out == page
    assert captured.err == "adadiff: error: name one of these commands\n"


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("sample digits --out o --polcy full", "--policy"),
        ("sample digits --out o --class-label=3", "--class-labels"),
        ("train --batch-sise 3", "--batch"),
        ("evaluate digits --guidence-scale 2", "--guidance-scale"),
        ("diff digits --other seed=1 --step 3", "--steps"),
        ("convert a b --drop-first-exits", "--drop-first-exit"),
        ("--verison", None),
        ("sample digits --out o --zzz", None),
        ("sample digits --out o 3 4", None),
    ],
)
def test_misspelt_options_are_told_the_right_one(line: str, meant: str | None, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run(line)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("adadiff: error: ")
    assert last.endswith(f"did you mean {meant}?") if meant else "did you mean" not in last


@pytest.mark.parametrize("depth", ["3.5", "4", "20", "1e9"])
@pytest.mark.parametrize(
    "line",
    [
        "sample {} --out {}/o --n 2 --steps 1 --policy {}",
        "evaluate {} --json {}/q.json --n 4 --steps 1 --policy full --policy {}",
        "diff {} --picture {}/p.png --steps 1 --other policy={}",
    ],
)
def test_depths_that_the_network_lacks_are_refused(line: str, depth: str, tiny, tmp_path: Path, capsys) -> None:
    assert run(line.format(tiny, tmp_path, f"exit:depth={depth}")) == 2
    assert f"'exit:depth={depth}': this network has 3 blocks" in error_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    assert run(line.format(tiny, tmp_path, "exit:depth=3")) == 0


def test_pictures_of_samples_wait_for_no_disk(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later run finds damaged ones. What is flushed does not grow with their number, but other files are."""
    flushed: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    for n in (2, 11):
        flushed.clear()
        assert run(f"sample {tiny} --out {tmp_path}/{n} --n {n} --steps 1 --batch 16") == 0
        assert {name for name in flushed if name.endswith(".part")} == {"report.json.0.part", "grid.png.0.part"}
        assert len(flushed) <= 8
    write_png(tmp_path / "p.png", np.zeros((4, 4), np.uint8))
    assert "p.png.0.part" in flushed


LINES = {
    "png": "sample {} -n 2 --steps 1 --out",
    "npz": "sample {} -n 2 --steps 1 --format npz --out",
    "train": "train --preset digits --data digits --network depth=2 dim=32 heads=2 --steps 1 --batch 2 --out",
}


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", ["a/b/" + "x" * 256, "a/" + "y" * 255 + "/z/" + "x" * 300 + "/d", "x" * 256])
def test_folders_that_cannot_be_leave_no_others(name: str, line: str, tiny, tmp_path: Path, capsys) -> None:
    assert cli.main([*LINES[line].format(tiny).split(), f"{tmp_path}/{name}"]) == 2
    assert "File name too long" in error_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_folders_may_lie_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper than Python calls itself."""
    monkeypatch.chdir(tmp_path)
    deep = Path("/".join(["y"] * 1100))
    with only_launch(deep):
        assert deep.is_dir()
    assert list(tmp_path.iterdir()) == []


ESCAPE = "\x1b]0;title\x07\x9b31m"


@pytest.mark.parametrize(
    "line",
    [
        "sample {0}.safetensors -n 2 --steps 1 --out {0}",
        "sample {0}.safetensors -n 2 --steps 1 --format npz --out {0}",
        "evaluate {0}.safetensors -n 4 --steps 1 --resamples 2 --json {0}.json",
        "diff {0}.safetensors --other seed=1 --steps 1 --picture {0}.png",
        "train --preset digits --data digits --network depth=2 dim=32 heads=2 --steps 1 --batch 2 --out {0}",
        "inspect {0}.safetensors",
    ],
)
def test_names_are_printed_without_escape_sequences(line: str, tiny, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny, f"{ESCAPE}.safetensors")
    for _ in range(2):  # the second time for lines on what is there already
        code = cli.main(line.format(ESCAPE).split())
    assert code == 0 or "it exists" in capfd.readouterr().err
    printed = "".join(capfd.readouterr())
    assert not {"\x1b", "\x07", "\x9b"} & set(printed)


def test_errors_end_somewhere(capsys) -> None:
    """Names in files of others, and what somebody typed, may have any length."""
    assert run(f"inspect {'x' * 5000}") == 2
    assert len(capsys.readouterr().err) < 2100


@pytest.mark.parametrize("command", ["inspect {}", "convert {} {}.out", "sample {} -n 1 --steps 1 --out {}.out"])
def test_files_of_very_many_tensors_are_refused(command: str, tmp_path: Path, capsys) -> None:
    """A megabyte of header may name as many as take minutes to look at."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": empty for i in range(2**16 + 1)} | {"__metadata__": {"format_version": "2"}}).encode()
    file = tmp_path / "many.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert run(command.format(file, file)) == 2
    assert "holds 65,537 tensors; at most 65,536 are read" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("sigma", [-np.eye(32), np.eye(32) + np.eye(32, k=1), np.diag([1.0] * 31 + [-1e-3])])
def test_statistics_that_are_no_covariance_are_refused(sigma: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "right.npz", mu=np.zeros(32), sigma=np.eye(32) + 1e-8 * np.eye(32, k=1))
    assert open_reference(tmp_path / "right.npz").statistics is not None
    np.savez(tmp_path / "r.npz", mu=np.zeros(32), sigma=sigma)
    with pytest.raises(ValueError, match=r"r\.npz: sigma is no covariance"):
        open_reference(tmp_path / "r.npz")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("c.json", "train {}/c.json"),
        ("c.toml", "train {}/c.toml"),
        ("report.json", "evaluate {} --features digits"),
        ("manifest.json", "evaluate {} --features digits"),
        ("config.json", "convert {} {}.out --served-by dit"),
    ],
)
def test_texts_of_others_have_a_limit(name: str, line: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(reading, "MOST_TEXT", 1000)
    (tmp_path / name).write_text(" " * 1001)
    assert run(line.format(tmp_path, tmp_path)) == 2
    assert "it has more than 1,000 bytes" in error_line(capsys.readouterr().err)
