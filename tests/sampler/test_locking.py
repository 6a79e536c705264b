"""Two launches do not fill one folder at once, and none that was killed stands in the way."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adadiff.output import locking
from adadiff.output.locking import only_launch
from sampler import sharded, shell
from sampler.sharded import assert_equal, line, times
from sampler.shell import error_line, run

ctrl_c, tiny, whole = shell.ctrl_c, shell.tiny, sharded.whole

# The file alone: PyTorch would take seconds to import.
HOLDS = f"""
import runpy, sys
from pathlib import Path

only_launch = runpy.run_path({locking.__file__!r})["only_launch"]
with only_launch(Path(sys.argv[1]), *map(int, sys.argv[2:])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other() -> Iterator[list[subprocess.Popen]]:
    begun: list[subprocess.Popen] = []
    yield begun
    for process in begun:
        process.kill()
        process.communicate()


def hold(folder: Path, rank: int = 0, world: int = 1) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder), str(rank), str(world)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_launch_is_refused_until_the_first_is_killed(tiny, whole, tmp_path, other, capsys):
    other.append(hold(tmp_path))
    for more in ("", "--format png"):
        command = line(tiny, tmp_path, more)
        assert run(command if not more else command.replace("--shard 4", "")) == 2
        message = error_line(capsys.readouterr().err)
        assert f"{tmp_path} is being filled by process {other[0].pid} on " in message
        assert [path.name for path in tmp_path.iterdir()] == [".rank-0.lock"]
    other[0].send_signal(signal.SIGKILL)
    other[0].wait()
    assert (tmp_path / ".rank-0.lock").exists()
    assert run(line(tiny, tmp_path)) == 0
    assert_equal(tmp_path, whole)


def test_parts_of_a_rank_that_still_writes_are_left(tiny, tmp_path, other, monkeypatch, capsys):
    """Of a launch of three, rank 2 is late; one process alone would take its shard, and its half-written file."""
    other.append(hold(tmp_path, 2, 3))
    part = tmp_path / "shard-00002.npz.2.part"
    part.touch()
    assert run(line(tiny, tmp_path)) == 2
    assert f"process {other[0].pid} on" in error_line(capsys.readouterr().err)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (0, 1):  # its own launch
        monkeypatch.setenv("RANK", str(rank))
        assert run(line(tiny, tmp_path)) == 0
    assert set(times(tmp_path)) == {"shard-00000.npz", "shard-00001.npz", part.name}
    assert other[0].communicate("")[0] == ""
    assert not [*tmp_path.glob(".rank-*")]


def test_locks_of_killed_launches_of_any_size_are_taken(tiny, whole, tmp_path):
    for rank in (0, 3, 12):
        (tmp_path / f".rank-{rank}.lock").write_text("process 1 on elsewhere\n")
    assert run(line(tiny, tmp_path)) == 0
    assert_equal(tmp_path, whole)


TRAIN = "--steps 2 --batch 2 --warmup 1 --save-every 1 --log-every 1 --network dim=16 depth=2"


def test_training_holds_its_folder(tmp_path, other, capsys):
    """Another launch, of whatever size, is refused, and changes nothing there: neither with nor without --force."""
    assert run(f"train --out {tmp_path} {TRAIN}") == 0
    assert not [*tmp_path.glob(".rank-*")]
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for rank, world in ((0, 1), (1, 2), (0, 4)):
        other.append(hold(tmp_path, rank, world))
        for more in ("", "--force", "--steps 3 --force"):
            assert run(f"train --out {tmp_path} {TRAIN} {more}") == 2
            captured = capsys.readouterr()
            assert f"{tmp_path} is being filled by process {other[-1].pid} on " in error_line(captured.err)
            assert captured.out == ""
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"} == before
        other[-1].kill()
        other[-1].communicate()
    assert run(f"train --out {tmp_path} {TRAIN}") == 0


@pytest.mark.slow
def test_of_three_trainings_at_once_one_runs(tmp_path):
    command = f"-m adadiff train --out {tmp_path / 'run'} {TRAIN} --steps 60"
    begun = [
        subprocess.Popen(
            [sys.executable, *command.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    errors = [process.communicate(timeout=300)[1] for process in begun]
    assert sorted(process.returncode for process in begun)[0] == 0
    for process, error in zip(begun, errors, strict=True):
        assert process.returncode == 0 or "is being filled by" in error
    steps = [json.loads(row)["step"] for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to("kept"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", [*OBSTACLES])
@pytest.mark.parametrize("number", [0, 3])
def test_nothing_is_written_through_the_name_of_a_lock(kind, number, tmp_path):
    (tmp_path / "kept").write_text("kept")
    OBSTACLES[kind](tmp_path / f".rank-{number}.lock")
    words = rf"cannot write to .*: \.rank-{number}\.lock is no regular file"
    with pytest.raises(ValueError, match=words), only_launch(tmp_path):
        pytest.fail("the folder was held")
    assert (tmp_path / "kept").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"kept", f".rank-{number}.lock"}


def test_a_lock_needs_no_room_on_the_disk(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with only_launch(tmp_path):
            assert (tmp_path / ".rank-0.lock").stat().st_size == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "line",
    [
        "train --data canvases",
        "train --init {0}/none.safetensors",
        "train --init {0}/file",
        "train --network depth=10 --data digits --steps 2 --batch 10 --accumulate 10 --init digits",
    ],
)
def test_a_failed_start_leaves_no_folder(line, tmp_path, capsys):
    (tmp_path / "file").write_text("no model")
    (tmp_path / "there").mkdir()
    for out in ("new", "deep/er/new", "there", "there/new"):
        assert run(f"{line.format(tmp_path)} --out {tmp_path / out}") == 2
        error_line(capsys.readouterr().err)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "there"]


def test_file_systems_without_locks_are_no_obstacle(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", none)
    with only_launch(tmp_path):
        assert (tmp_path / ".rank-0.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not [*tmp_path.iterdir()]
