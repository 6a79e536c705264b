"""Files are written whole, and nothing is replaced that a command was not asked to replace."""

import errno
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adadiff import writing
from adadiff.checkpoint import write_tensors
from adadiff.output.pictures import write_json
from adadiff.writing import check_outputs, check_replaceable, check_space, drop_parts, replace_file


def link(path: Path) -> None:
    (path.parent / "kept").write_text("kept")
    path.symlink_to("kept")


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(path.parent)  # such a name has at most 107 bytes
        bound.bind(path.name)


NEVER_REPLACED: dict[str, Callable[[Path], object]] = {
    "a link": link,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/null"),
    "a link to a folder": lambda path: path.symlink_to("."),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": bind,
}


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every entry: what kind it is, and what it holds."""
    return {
        path.name: (path.lstat().st_mode, path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else b"")
        for path in folder.iterdir()
    }


@pytest.mark.parametrize("kind", [*NEVER_REPLACED])
def test_what_is_no_regular_file_is_never_replaced(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "out"
    NEVER_REPLACED[kind](path)
    before = state(tmp_path)
    for force in (False, True):
        with pytest.raises(ValueError, match=r"cannot write .*out: it is a (link|folder|pipe|socket)"):
            check_outputs(force, path)
        with pytest.raises(ValueError, match="cannot write"):
            replace_file(path, lambda temporary: temporary.write_text("new"), force=force)
    for write in (lambda: write_json(path, {}), lambda: write_tensors(path, {"a": torch.ones(1)}, {})):
        with pytest.raises(ValueError, match="cannot write"):
            write()
    assert state(tmp_path) == before


def test_devices_are_never_replaced() -> None:
    for force in (False, True):
        with pytest.raises(ValueError, match="cannot write /dev/null: it is a device"):
            check_outputs(force, Path("/dev/null"))
    with pytest.raises(ValueError, match="it is a device"):
        check_replaceable(Path("/dev/full"))


def test_files_that_exist_take_force(tmp_path: Path) -> None:
    path = tmp_path / "out"
    check_outputs(False, path, None)
    path.write_text("old")
    with pytest.raises(ValueError, match="out: it exists; --force replaces it"):
        check_outputs(False, path)
    check_outputs(True, path)


def test_two_results_take_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path)
    (tmp_path / "a").write_text("old")
    os.link(tmp_path / "a", tmp_path / "b")
    for one, two in (
        ("x", "x"),
        ("x", "./x"),
        ("x", str(tmp_path / "x")),
        ("x", "alias/x"),
        ("alias/../x", "alias/../x"),
        ("a", "b"),
    ):
        with pytest.raises(ValueError, match="cannot write two results to"):
            check_outputs(True, Path(one), Path(two))
    check_outputs(True, Path("x"), Path("y"))


def test_what_a_command_reads_it_does_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_text("weights")
    (tmp_path / "link").symlink_to("model")
    os.link("model", "hard")
    for read in ("model", "./model", str(tmp_path / "model"), "link", Path("hard")):
        with pytest.raises(ValueError, match="this command reads it"):
            check_outputs(True, Path("model"), inputs=["digits", None, read])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none/out", "there is no folder none"),
        ("file/out", "there is no folder file"),
        ("file/deep/out", "there is no folder file/deep"),
        ("x" * 250, "its name is too long"),
        (".", "it is a folder"),
        ("..", "it is a folder"),
    ],
)
def test_what_could_not_be_written_is_refused(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for force in (False, True):
        with pytest.raises(ValueError, match=words):
            check_outputs(force, Path(name))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_longest_name_that_is_not_refused_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * (os.pathconf(tmp_path, "PC_NAME_MAX") - writing.NAME_MARGIN))
    check_outputs(False, path)
    replace_file(path, lambda temporary: write_tensors(temporary, {"a": torch.ones(1)}, {}), force=False)
    with pytest.raises(ValueError, match="its name is too long"):
        check_outputs(False, path.with_name(path.name + "x"))


def test_folders_without_permission_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"no permission to write in {tmp_path}"):
        check_outputs(True, tmp_path / "out")


def fail(number: int) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("NaN")])
def test_a_failure_leaves_the_old_file_and_no_other(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)) as raised:
        replace_file(path, write)
    if isinstance(error, OSError):
        assert str(raised.value) == f"[Errno 28] No space left on device: '{path}'"
    assert state(tmp_path).keys() == {"out"}
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_after_writing_leaves_the_old_file_and_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a disk on the network that is full: it says so when it has to store what was written."""
    path = tmp_path / "out"
    path.write_text("old")
    monkeypatch.setattr(os, name, fail(errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left on device: .*out'$"):
        replace_file(path, lambda temporary: temporary.write_text("new"))
    assert state(tmp_path).keys() == {"out"}
    assert path.read_text() == "old"


def test_errors_about_other_files_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*source"):
        replace_file(tmp_path / "out", lambda _: (tmp_path / "source").read_bytes())


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And their names before the next file is begun."""
    done: list[str] = []

    def of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    fsync, replace, linked = os.fsync, os.replace, os.link
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(f"fsync {of(descriptor)}"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"rename to {Path(b).name}"), replace(a, b)))
    monkeypatch.setattr(os, "link", lambda a, b: (done.append(f"rename to {Path(b).name}"), linked(a, b)))
    for force in (True, False):
        done.clear()
        replace_file(tmp_path / f"out-{force}", lambda temporary: temporary.write_text("new"), rank=3, force=force)
        assert done == [f"fsync out-{force}.3.part", f"rename to out-{force}", f"fsync {tmp_path.name}"]
    write_tensors(tmp_path / "tensors", {"a": torch.ones(1)}, {})
    assert "rename to tensors" in done
    assert done[-1] == f"fsync {tmp_path.name}"


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_came_up_meanwhile_is_kept(
    hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", fail(errno.EPERM))
    path = tmp_path / "out"

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        path.write_text("of another program")

    with pytest.raises(FileExistsError, match="out"):
        replace_file(path, write, force=False)
    assert state(tmp_path).keys() == {"out"}
    assert path.read_text() == "of another program"
    replace_file(path, write, force=True)
    assert path.read_text() == "new"
    path.unlink()
    replace_file(path, lambda temporary: temporary.write_text("new"), force=False)
    assert path.read_text() == "new"
    assert state(tmp_path).keys() == {"out"}


def test_temporary_files_take_no_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "out.0.part").symlink_to("kept")
    (tmp_path / "out.1.part").write_text("kept, too")
    for rank in (0, 1, None):
        replace_file(tmp_path / "out", lambda temporary: temporary.write_text("new"), rank)
    assert state(tmp_path).keys() == {"kept", "out", "out.0.part", "out.1.part"}
    assert (tmp_path / "kept").read_text() == "kept"
    assert (tmp_path / "out.1.part").read_text() == "kept, too"


def test_two_that_write_one_file_do_not_mix(tmp_path: Path) -> None:
    """The second begins and ends while the first writes."""
    path = tmp_path / "out"

    def first(temporary: Path) -> None:
        temporary.write_text("first")
        replace_file(path, lambda other: other.write_text("second"))
        assert temporary.read_text() == "first"

    replace_file(path, first)
    assert path.read_text() == "first"
    assert state(tmp_path).keys() == {"out"}


def test_files_have_the_mode_that_the_umask_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "tensors", {"a": torch.ones(1)}, {})
        write_json(tmp_path / "json", {})
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("tensors", "json")] == [0o640, 0o640]


def test_only_own_parts_are_dropped(tmp_path: Path) -> None:
    ours = {"report.json.0.part", "a.safetensors.0123456789abcdef.part"}
    theirs = {"notes.0.part", "report.json", "report.json.part", "report.json.x.part", "xreport.json.0.part"}
    for name in ours | theirs:
        (tmp_path / name).touch()
    drop_parts(tmp_path, r"report\.json|a\.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == theirs


def test_space_is_checked_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path / "out", 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 999))
    with pytest.raises(OSError, match=r"No space left on device \(0\.0 MB are needed\): '.*out'"):
        check_space(tmp_path / "out", 1000)
    monkeypatch.undo()
    monkeypatch.setattr(writing.resource, "getrlimit", lambda _: (999, -1))
    with pytest.raises(OSError, match="File too large"):
        check_space(tmp_path / "out", 1000)
