"""Compiles the kernels without a GPU, and reads registers, memory and memory accesses from the result.

python -m benchmarks.gpu.resources    writes benchmarks/results/resources.md, under the pinned Triton and nvcc only

Each variant is a launch at a real shape: the launcher runs on tensors without memory, and the kernel that it would
launch is compiled instead.
"""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cuda_resources
from benchmarks.gpu.resource_cases import CASES, ONES

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "resources.md"
PINNED = "3.9.0"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # most bytes of a program: CUDA C++ guide, table of limits
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Variant:
    """A case of resource_cases.py on a chip (its compute capability times ten)."""

    case: str
    chip: int


@dataclass(frozen=True)
class Resources:
    """registers: per thread; shared: bytes per program; local: bytes per thread, to which registers spill; wide,
    narrow: loads and stores in the PTX of 16 bytes and of fewer."""

    registers: int
    shared: int
    local: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int


MODULES = ("residual_uem", "join_skip", "settle_rows", "solver_step")


class Recorder:
    """Replaces a kernel and records its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: self.launches.append((arguments, named))


def launch(case: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel of a case, and the positional and keyword arguments of its launch."""
    name, launcher, arguments = (CASES | ONES)[case]
    modules = [importlib.import_module(f"adadiff_kernels.{module}.kernel") for module in MODULES]
    kept = [
        (module, kernel, getattr(module, kernel))
        for module in modules
        for kernel in vars(module)
        if kernel.endswith("_kernel")
    ]
    recorders = {kernel: Recorder(original) for _, kernel, original in kept}
    for module, kernel, _ in kept:
        setattr(module, kernel, recorders[kernel])
    try:
        launcher(*arguments)
    finally:
        for module, kernel, original in kept:
            setattr(module, kernel, original)
    return (recorders[name].kernel, *recorders[name].launches[0])


def specialise(
    kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]], dict[str, Any]]:
    """Signature, constants, attributes and options, as Triton's own launch derives them from these arguments."""
    names = kernel.arg_names
    given = dict(zip(names, arguments, strict=False)) | {k: v for k, v in named.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = given[name]
        divisible = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if kernel.params[i].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, {k: v for k, v in named.items() if k not in names}


def compile_variant(variant: Variant) -> Resources:
    """Compiles a variant. Needs a process in which Triton does not interpret kernels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, named = launch(variant.case)
    signature, constants, attributes, options = specialise(kernel, arguments, named)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.chip, 32), options=options)
    registers, local = usage(compiled.asm["cubin"])
    wide, narrow = {}, {}
    for kind in ("ld", "st"):
        accesses = re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", compiled.asm["ptx"])
        sizes = [int(vector or 1) * int(bits) // 8 for vector, bits in accesses]
        wide[kind], narrow[kind] = sum(size >= 16 for size in sizes), sum(size < 16 for size in sizes)
    return Resources(registers, compiled.metadata.shared, local, wide["ld"], narrow["ld"], wide["st"], narrow["st"])


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread of the cubin's only kernel, read by Triton's cuobjdump."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return int(registers), int(stack) + int(local)


def variants() -> list[Variant]:
    return [Variant(case, chip) for case in CASES for chip in SHARED]


def compile_all(chosen: list[Variant], workers: int = 2) -> dict[Variant, Resources]:
    """Compiles in new processes, because Triton decides on interpretation when a kernel is defined."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
        return dict(zip(chosen, pool.map(compile_variant, chosen), strict=True))


def _start_worker() -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_num_threads(1)


COLUMNS = ("registers", "shared", "local", "wide loads", "narrow loads", "wide stores", "narrow stores")


def table(found: dict[Variant, Resources]) -> str:
    """Markdown, a line for each variant, so that diffs show each change as a line."""
    lines = [
        "# Resources of the GPU kernels",
        "",
        f"Compiled by Triton {PINNED} without a GPU (`make resources`); another version may differ. Registers and",
        "bytes of local memory per thread; bytes of shared memory per program; loads and stores in the PTX, of 16",
        "bytes (wide) or fewer (narrow).",
        "",
        f"| case | kernel | sm | {' | '.join(COLUMNS)} |",
        f"| --- | --- {'| ---: ' * (1 + len(COLUMNS))}|",
    ]
    for variant, resources in found.items():
        name = CASES[variant.case][0].strip("_")
        lines.append(f"| {variant.case} | {name} | {variant.chip} | {' | '.join(map(str, astuple(resources)))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    installed, nvcc = importlib.metadata.version("triton"), cuda_resources.nvcc()
    if installed != PINNED:
        sys.exit(f"the table is that of Triton {PINNED}, got {installed}: pip install triton=={PINNED}")
    release = None if nvcc is None else cuda_resources.release(nvcc)
    if release != cuda_resources.PINNED:
        sys.exit(f"the table is that of nvcc {cuda_resources.PINNED}, got {release or 'none'}; put it on PATH")
    text = table(compile_all(variants())) + "\n" + cuda_resources.table(cuda_resources.compile_all(nvcc))
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(TABLE)
    print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
