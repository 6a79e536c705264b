"""`make install`: what a person sees of it, and that a failed one stays one; `make docs` does without it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = """Collecting torch
  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (190.2 MB)
  Downloading six-1.17.0-py2.py3-none-any.whl (11 kB)
  Building editable for adadiff_kernels (pyproject.toml): started
  Building editable for adadiff_kernels (pyproject.toml): finished with status 'done'
Installing collected packages: torch, six"""
PYTHON = f"""#!/bin/sh
if [ "$2" = venv ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
elif [ "$2" = pip ]; then
    cat <<END
{PIP}
END
    echo "ERROR: a reason" >&2
    exit "$STATUS"
else
    echo "ran $*"
fi
"""


@pytest.fixture
def make(tmp_path: Path):
    """Runs make with a python that says what pip says and ends as it is told to."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / "fake").write_text(PYTHON)
    (tmp_path / "fake").chmod(0o755)

    def run(target: str, status: int) -> subprocess.CompletedProcess[str]:
        command = ["make", "--no-print-directory", target, "PYTHON=./fake", "VENV=venv", "ARGS="]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        environment["STATUS"] = str(status)
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_an_installation_is_a_few_lines_on_stderr(make) -> None:
    done = make("bench", 0)
    assert (done.returncode, done.stdout) == (0, "ran benchmarks/run.py\n")
    first, *rest = done.stderr.splitlines()
    assert "a few minutes" in first
    assert sorted(rest) == sorted(
        ["ERROR: a reason", "  downloading torch, 190.2 MB", "  building the C++ extension", "  unpacking"]
    )
    assert make("bench", 1).stderr == ""  # it is there


def test_a_failed_installation_fails_every_time(make) -> None:
    for _ in range(2):
        done = make("install", 1)
        assert done.returncode != 0
        assert "ERROR: a reason" in done.stderr
    assert make("bench", 1).stdout == ""


def test_the_site_is_built_without_an_installation(make, tmp_path: Path) -> None:
    done = make("docs", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ran -m mkdocs build --strict"
    assert "a few minutes" not in done.stderr
    assert not (tmp_path / "venv" / ".installed").exists()
    assert "a few minutes" in make("install", 0).stderr
