"""Rows: one self-contained JSON object per line: what was measured, on which machine, with which versions, when."""

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import adadiff

Row = dict[str, object]
ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".py", ".h", ".cpp", ".cu", ".txt"}
STARTED = time.monotonic()
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 and ARM names


@cache
def machine() -> Row:
    """The hardware that numbers depend on. bfloat16: whether the CPU supports it natively; else it is emulated."""
    info = _cpuinfo()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": cores(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": bool(BFLOAT16_FLAGS & set((info.get("flags") or info.get("Features") or "").split())),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


@cache
def versions() -> Row:
    python = platform.python_version()
    return {
        "python": python,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "adadiff": adadiff.__version__,
        **{name: metadata.version(name) for name in ("triton",) if find_spec(name)},
    }


@cache
def commit() -> str:
    """Hash of HEAD, with "+dirty" if the worktree differs; outside a repository, a hash of the sources."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"source-{source_digest(ROOT)}"


def source_digest(root: Path) -> str:
    """Twelve digits that identify the measured code without git: a hash of names and contents of the packages' sources
    and of these scripts. The digest of a checkout identifies its commit."""
    digest = hashlib.sha256()
    folders = [root / name for name in ("adadiff_kernels", "benchmarks", "csrc", "python")]
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Rows:
    """The rows of a folder. Each is written when measured, so that an interrupted run keeps what it has."""

    def __init__(self, folder: Path, device: Mapping[str, object] | None = None, at: str | None = None):
        """Opens or creates folder/rows.jsonl. device: entries about the machine besides its CPU; at: the commit, if
        git is not available. Raises ValueError if the file cannot be written."""
        self.folder, self.path = folder, folder / "rows.jsonl"
        self.machine, self.commit = {**machine(), **(device or {})}, at or commit()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("a"):
                pass
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None
        self.rows = read(self.path)
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):  # a run was killed while writing
            print(f"{self.path}: dropped an unfinished last line", file=sys.stderr)
            os.truncate(self.path, whole)

    def write(self, suite: str, kind: str, variant: str, parameters: Mapping[str, object], **results: object) -> Row:
        """Writes a row. suite, kind, variant, parameters: identify it; results: the measurements."""
        row = {
            "suite": suite,
            "kind": kind,
            "variant": variant,
            "parameters": dict(parameters),
            **results,
            "threads": torch.get_num_threads(),
            "machine": self.machine,
            "versions": versions(),
            "commit": self.commit,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        line = json.dumps(row, allow_nan=False)
        with self.path.open("a") as file:
            file.write(line + "\n")
        self.rows.append(json.loads(line))
        return row

    def find(self, suite: str, kind: str, variant: str, parameters: Mapping[str, object]) -> Row | None:
        """The last row with this description, or None."""
        wanted = (suite, kind, variant, json.loads(json.dumps(dict(parameters))))
        return next((row for row in reversed(self.rows) if key(row) == wanted), None)


def key(row: Row) -> tuple[object, ...]:
    return row["suite"], row["kind"], row["variant"], row["parameters"]


def read(path: Path) -> list[Row]:
    """The rows of a file. A last line without newline is ignored; any other invalid line raises ValueError."""
    lines = path.read_text().split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            key(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a row: {error!r}") from None
        rows.append(row)
    return rows


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def say(text: str) -> None:
    """Prints a line of progress on stderr, with minutes and seconds, above progress bars. (stdout is for results.)"""
    minutes, seconds = divmod(int(time.monotonic() - STARTED), 60)
    tqdm.write(f"[{minutes:02}:{seconds:02}] {text}", file=sys.stderr)
