"""What a file says is shown and does nothing to the terminal; a file that may not be read is not said to be missing."""

import ctypes
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import adadiff
from adadiff.checkpoint import read_tensors
from adadiff.commands import terminal
from sampler import shell
from sampler.shell import error_line, run
from sampler.tiny import SERVED, scramble

tiny = shell.tiny

ESCAPES = {
    "clear the screen": "\x1b[2J",
    "title of the window": "\x1b]0;mine\x07",
    "link": "\x1b]8;;http://example.org\x1b\\\\",
    "C1": "\x9b2J",
    "back to the start of the line": "all is well\r",
    "one line up": "\n\x1b[A",
    "backspace": "no\b\byes",
    "delete": "\x7f",
    "right to left": "\u202eexe.txt",
    "line separator": "\u2028",
    "nothing at all": "\x00",
    "half a character": "\ud800",
}
TERMINAL_MAKES_BOLD = re.compile(r"\033\[(?:1|1;31|0)m")


def harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in TERMINAL_MAKES_BOLD.sub("", text))


def told(text: str, *lines: str) -> bool:
    return any(text.encode("unicode_escape").decode()[:8] in line for line in lines)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    model = adadiff.Model(SERVED)
    scramble(model, 0.25, seed=3)
    adadiff.save(model, folder / "m.safetensors")
    line = f"calibrate {folder}/m.safetensors --budget 0.6 --n 8 --steps 2 --batch 8"
    assert run(f"{line} --out {folder}/c.safetensors") == 0
    return folder / "c.safetensors"


def with_metadata(source: Path, file: Path, **values: object) -> Path:
    metadata = {"format_version": 2, **read_tensors(source)[1], **values}
    save_file(load_file(source), file, {key: json.dumps(value) for key, value in metadata.items()})
    return file


@pytest.mark.parametrize("kind", [*ESCAPES])
def test_notes_are_shown_and_not_obeyed(kind: str, tiny, tmp_path: Path, capsys) -> None:
    text = ESCAPES[kind]
    notes = {"train": {"data": text, text: [text, {"deep": text}], "batch": text}, text: text}
    file = with_metadata(Path(tiny), tmp_path / "m.safetensors", notes=notes)
    for more in ("", "--all", "--json"):
        assert run(f"inspect {file} {more}") == 0
        captured = capsys.readouterr()
        assert harmless(captured.out + captured.err)
        assert told(text, captured.out) or more == "--json"


@pytest.mark.parametrize("kind", [*ESCAPES])
def test_errors_about_files_are_shown_and_not_obeyed(kind: str, tiny, calibrated, tmp_path: Path, capsys) -> None:
    text = ESCAPES[kind]
    config = read_tensors(Path(tiny))[1]["config"]
    calibration = read_tensors(calibrated)[1]["calibration"]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps({"configuration": {text: text}}))
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "manifest.json").write_text(json.dumps({"format_version": text}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"format_version": 2, text: text}))
    for number, line in enumerate(
        (
            f"inspect {with_metadata(Path(tiny), tmp_path / 'a', config={**config, text: text})}",
            f"inspect {with_metadata(Path(tiny), tmp_path / 'b', config={**config, 'schedule': text})}",
            f"inspect {with_metadata(Path(tiny), tmp_path / 'c', format_version=text)}",
            f"inspect {with_metadata(calibrated, tmp_path / 'd', calibration={**calibration, 'solver': text})}",
            f"inspect {with_metadata(calibrated, tmp_path / 'e', calibration={**calibration, 'aim': text})} --all",
            f"evaluate {tmp_path}/report --features digits",
            f"evaluate {tmp_path}/manifest --features digits",
            f"sample {tiny} --out {tmp_path}/manifest --format npz --n 2",
            f"train --out {tmp_path}/run",
        )
    ):
        code = run(line)
        captured = capsys.readouterr()
        assert harmless(captured.out + captured.err), line
        assert code == 0 if captured.err == "" else code == 2, line
        if number not in (5, 8):
            assert code == 0 or captured.err.count("\n") == 1


def test_every_character_that_is_printable_stays(capsys) -> None:
    text = "Fréchet 距離 ∞ é 🙂 'quoted' \\ back"
    assert terminal.printable(text) == text
    terminal.show({text: text})
    terminal.print_table([{"a": text}])
    printed = capsys.readouterr().out
    assert printed.count(text) == 3


def test_tables_and_lines_are_shown_and_not_obeyed(capsys) -> None:
    for text in ESCAPES.values():
        terminal.show({text: text, "nested": {text: [text]}}, text)
        terminal.print_table([{"name": text, text: text}])
        terminal.show_lines(f"one\n{text}")
        terminal.print_error("error", text)
        captured = capsys.readouterr()
        assert harmless(captured.out + captured.err)


@contextmanager
def without_privilege() -> Iterator[None]:
    """Whoever runs the tests, root even, is stopped by the modes of files: the two capabilities that pass over them
    are put aside."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, before)
    without = type(before)(*before)
    without[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, without)
    try:
        yield
    finally:
        libc.capset(header, before)


@pytest.fixture
def forbidden(tiny, tmp_path: Path) -> Iterator[Path]:
    """A folder with files and a folder that may not be read."""
    folder = tmp_path / "forbidden"
    folder.mkdir()
    for name in ("m.safetensors", "m.pt", "c.json", "c.toml", "stats.npz"):
        (folder / name).write_bytes(Path(tiny).read_bytes())
        (folder / name).chmod(0)
    (folder / "closed").mkdir()
    (folder / "closed" / "m.safetensors").write_bytes(Path(tiny).read_bytes())
    (folder / "closed").chmod(0)
    with without_privilege():
        try:
            (folder / "c.json").read_bytes()
        except PermissionError:
            yield folder
        else:
            pytest.skip("every file can be read here")
    (folder / "closed").chmod(0o755)


@pytest.mark.parametrize(
    "line",
    [
        "inspect {}/m.safetensors",
        "sample {}/m.safetensors --out o",
        "evaluate {}/m.safetensors",
        "evaluate digits --reference {}/stats.npz",
        "convert {}/m.safetensors o",
        "convert {}/m.pt o",
        "train {}/c.json --out o",
        "train {}/c.toml --out o",
        "train --init {}/m.safetensors --out o",
        "inspect {}/closed/m.safetensors",
        "convert {}/closed/m.safetensors o",
    ],
)
def test_a_file_without_permission_is_not_missing(line: str, forbidden: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(forbidden.parent)
    assert run(line.format(forbidden)) == 2
    last = error_line(capsys.readouterr().err)
    assert "Permission denied" in last
    assert "no such file" not in last.lower()
    assert not (forbidden.parent / "o").exists()


@pytest.mark.parametrize("name", ["config.json", "state.safetensors", "log.jsonl", "report.json", "manifest.json"])
def test_a_folder_without_permission_is_one_line(name: str, tiny, tmp_path: Path, capsys) -> None:
    run_, samples = tmp_path / "run", tmp_path / "samples"
    train = f"train --out {run_} --steps 1 --batch 2 --warmup 1 --log-every 1 --network dim=16 depth=2"
    sample = f"sample {tiny} --out {samples} --n 2 --steps 1 --format {'npz' if 'manifest' in name else 'png'}"
    assert run(train) == run(sample) == 0
    capsys.readouterr()
    folder, line = (samples, sample) if name in ("report.json", "manifest.json") else (run_, train)
    (folder / name).chmod(0)
    with without_privilege():
        assert run(line) == 2
    last = error_line(capsys.readouterr().err)
    assert "Permission denied" in last
    (folder / name).chmod(0o644)
    assert run(line) == 0
