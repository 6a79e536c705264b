"""Compiles csrc/compaction.cu without a GPU, and reads the resources of its kernels: the second table of
benchmarks/results/resources.md."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "compaction.cu"
PINNED = "13.0"
KERNELS = ("compact_kernel", "start_kernel")
CHIPS = (80, 90, 100)
THREADS, FILE = 1024, 65536  # most threads of a block of either kernel; registers of a multiprocessor


@dataclass(frozen=True)
class Taken:
    """registers: per thread; stack, spill_stores, spill_loads: bytes per thread; shared: bytes per block."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


COLUMNS = ("registers", "shared", "stack", "spill stores", "spill loads")
Found = dict[tuple[str, int], Taken]  # by kernel and chip


def nvcc() -> str | None:
    """Path of the compiler, or None."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def release(command: str) -> str:
    """The compiler's release, such as "13.0"."""
    text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def compile_all(command: str) -> Found:
    """The resources of each kernel on each of CHIPS that this compiler knows."""
    known = subprocess.run([command, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    chips = [chip for chip in CHIPS if f"sm_{chip}" in known]
    targets = [f"--generate-code=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "compaction.o"
        call = [command, "-std=c++17", "-O3", "-Xptxas=-v", "--threads=0", *targets, "-c", str(SOURCE), "-o", str(to)]
        text = subprocess.run(call, capture_output=True, text=True, check=True).stderr
    return {(kernel, chip): _taken(text, kernel, chip) for kernel in KERNELS for chip in chips}


def _taken(text: str, kernel: str, chip: int) -> Taken:
    """Parses the assembler's report of a kernel (whose name is mangled in it)."""
    begins = rf"Compiling entry function '\w*\d{kernel}\w*' for 'sm_{chip}'"
    ((stack, stores, loads, registers, rest),) = re.findall(
        rf"{begins}.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        text,
        flags=re.DOTALL,
    )
    shared = re.search(r"(\d+) bytes smem", rest)
    return Taken(int(registers), int(shared[1]) if shared else 0, int(stack), int(stores), int(loads))


def table(found: Found) -> str:
    """Markdown, a line for each kernel and chip."""
    lines = [
        "## csrc/compaction.cu",
        "",
        f"Compiled by nvcc {PINNED}. Registers, and bytes of stack and spills, per thread; bytes of shared memory per",
        f"block of up to {THREADS} threads.",
        "",
        f"| kernel | sm | {' | '.join(COLUMNS)} |",
        f"| --- {'| ---: ' * (1 + len(COLUMNS))}|",
    ]
    for (kernel, chip), taken in found.items():
        lines.append(f"| {kernel} | {chip} | {' | '.join(map(str, astuple(taken)))} |")
    return "\n".join(lines) + "\n"
