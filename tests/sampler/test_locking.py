"""Two launches do not fill one folder at once, and none that was killed stands in the way."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
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


def test_file_systems_without_locks_are_no_obstacle(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", none)
    with only_launch(tmp_path):
        assert (tmp_path / ".rank-0.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not [*tmp_path.iterdir()]
