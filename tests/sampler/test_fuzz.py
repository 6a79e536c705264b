"""Bad input never ends in a traceback, hangs, takes much memory, or touches files that were not named: command lines
and damaged files, as many as there is time for. Longer with ADADIFF_FUZZ=EXAMPLES, as `make test-all` asks."""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from adadiff import cli
from sampler import shell
from sampler.guards import memory_below

tiny = shell.tiny
EXAMPLES = int(os.environ.get("ADADIFF_FUZZ", "60"))
SECONDS = 10
MEMORY = 2 * 10**9  # bytes
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Every example collects garbage; with all that earlier tests have left alive, each collection takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


NUMBERS = "0 -1 1 2 1e3 1e99 nan inf -inf 1,2 1,,2 , 0.5 0.5,0.5 99999999999 null true {} é"
POLICIES = "full exit:0.5 exit: exit:nan exit:depth=2 exit:depth=1e9 exit:budget=0.5 exit:0.5,min_layer=99"
OTHERS = (
    "- -- ddim ddim: ddim:9 ddpm dpm++2m a=b a= =b seed=2 dim=0 depth=1e9 cpu cuda:99 meta float32 digits canvases:n=-1"
)
FILES = "m.safetensors no.safetensors folder folder/x picture.png notes.txt /dev/null / .. m.safetensors/x"
WORDS = st.sampled_from(["", " ", "\x1b[31m", "x" * 300, *" ".join((NUMBERS, POLICIES, OTHERS, FILES)).split()])
OPTIONS = {
    "sample": "n steps solver policy seed batch class-labels guidance-scale guidance-interval t-switch shallow-model "
    "format shard decoder prompt device dtype runner",
    "evaluate": "n steps policy features reference resamples json class-labels guidance-scale",
    "diff": "other seed class-label steps policy picture",
    "calibrate": "budget aim n steps features picture data batch",
    "inspect": "json all picture",
    "convert": "preset dtype served-by",
    "train": "data preset network exit-options init batch lr recipe loss save-every",
}
SMALL = {  # what keeps a command that is right short
    "sample": ["--out", "out", "--n", "2", "--steps", "1"],
    "evaluate": ["--n", "4", "--steps", "1", "--resamples", "2"],
    "diff": ["--other", "seed=1", "--steps", "1"],
    "calibrate": ["--out", "out.safetensors", "--budget", "0.6", "--n", "4", "--steps", "1"],
    "inspect": [],
    "convert": ["out.safetensors"],
    "train": ["--out", "out", "--steps", "1", "--batch", "2"],
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(sorted(OPTIONS)))
    line = [
        command,
        *([] if command == "train" else [draw(st.one_of(st.just("m.safetensors"), WORDS))]),
        *SMALL[command],
    ]
    for option in draw(st.lists(st.sampled_from(OPTIONS[command].split()), max_size=3)):
        line += [f"--{option}", *draw(st.lists(WORDS, max_size=2))]
    return line


@pytest.fixture
def place(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a picture, a text and another folder, to stand in."""
    shutil.copy(tiny, tmp_path / "m.safetensors")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "picture.png")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends_well(line: list[str]) -> int:
    """The exit code; anything but an exit code is a failure, and so is a refusal without a line of its own."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), at_most(SECONDS), memory_below(MEMORY):
        try:
            code = cli.main(line)
        except SystemExit as end:  # argparse
            code = 0 if end.code is None else int(end.code)
    assert code in (0, 2), (line, err.getvalue())
    if code == 2:
        last = err.getvalue().rstrip("\n").splitlines()[-1]
        assert last.startswith("adadiff"), (line, err.getvalue())
        assert "error: " in last
        assert "memory" not in last, (line, last)
    assert "Traceback" not in err.getvalue()
    assert "\x1b" not in out.getvalue() + err.getvalue(), "no terminal, no escape sequences"
    return code


def contents(folder: Path) -> dict[str, bytes | None]:
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


@FUZZ
@given(line=command_lines())
def test_command_lines(line: list[str], place: Path) -> None:
    before = contents(place)
    ends_well(line)
    after = contents(place)
    assert {name: after.get(name) for name in before} == before, line
    named = {word.split("/")[0] for word in line}
    strange = [name for name in after if name not in before and name.split("/")[0] not in named]
    assert not strange, line
    for name in {path.split("/")[0] for path in after} - set(before):
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, int, int]:
    return (
        draw(st.sampled_from(["cut", "flip", "zero", "text"])),
        draw(st.integers(0, 10**6)),
        draw(st.integers(0, 255)),
    )


def damaged(data: bytes, damage: tuple[str, int, int]) -> bytes:
    kind, where, byte = damage
    where %= max(1, len(data))
    if kind == "cut":
        return data[:where]
    if kind == "flip":
        return data[:where] + bytes([data[where] ^ (byte or 1)]) + data[where + 1 :]
    if kind == "zero":
        return data[:where] + bytes(64) + data[where + 64 :]
    return json.dumps({"format_version": byte, "a": [where]}).encode()


COMMANDS = (
    "inspect bad",
    "inspect bad --all",
    "sample bad --out out --n 1 --steps 1",
    "convert bad c.safetensors",
    "evaluate bad --n 4 --steps 1",
)


@FUZZ
@given(damage=damages(), header=st.booleans(), command=st.sampled_from(COMMANDS))
def test_damaged_checkpoints(damage: tuple[str, int, int], header: bool, command: str, place: Path) -> None:
    """header: the damage lies where the file says what it holds."""
    data = (place / "m.safetensors").read_bytes()
    if header:
        damage = (damage[0], damage[1] % 2000, damage[2])
    for name in ("bad.safetensors", "bad.pth"):
        (place / name).write_bytes(damaged(data, damage))
        ends_well(command.replace("bad", name).split())
        shutil.rmtree(place / "out", ignore_errors=True)
        (place / "c.safetensors").unlink(missing_ok=True)


@settings(FUZZ, max_examples=max(1, EXAMPLES // 4))  # each fills a folder twice
@given(damage=damages(), name=st.sampled_from(["report.json", "000001.png", "manifest.json", "shard-00000.npz"]))
def test_damaged_results(damage: tuple[str, int, int], name: str, place: Path) -> None:
    """Of a folder that was filled, and is to be completed or measured."""
    form = "npz" if name.startswith(("manifest", "shard")) else "png"
    line = f"sample m.safetensors --out done --n 4 --steps 1 --format {form}".split()
    shutil.rmtree(place / "done", ignore_errors=True)
    assert ends_well(line) == 0
    path = place / "done" / name
    path.write_bytes(damaged(path.read_bytes(), damage))
    ends_well(line)
    ends_well(["evaluate", "done", "--features", "digits", "--resamples", "2"])


MUCH_MEMORY = """
import numpy as np
import pytest

from sampler.guards import memory_below

with pytest.raises(AssertionError, match="took"), memory_below(2**27):
    np.ones(2**28, np.uint8)
with pytest.raises(MemoryError), memory_below(2**27):
    np.empty(2**30, np.uint8)
with memory_below(2**27):
    np.ones(2**25, np.uint8)
"""


def test_much_memory_is_seen() -> None:
    """In a process of its own: in one with memory of other tests, the kernel may take that away meanwhile."""
    subprocess.run([sys.executable, "-c", MUCH_MEMORY], cwd=Path(__file__).parents[1], check=True)
