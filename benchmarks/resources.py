"""Compiles the kernels for GPUs that need not be there, and reads registers, memory and loads from what comes out.

python benchmarks/resources.py            writes benchmarks/results/resources.md, under the pinned Triton and nvcc only

Each variant is what a launcher asks for at a real shape: the launcher runs on tensors without memory, and what it
would have launched is compiled instead.
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

import cuda_resources
import torch

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "resources.md"
PINNED = "3.9.0"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have: CUDA C++ guide, table of limits
FUSED = "_residual_uem_kernel"
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
    """A case below on one chip (compute capability times ten)."""

    case: str
    chip: int


@dataclass(frozen=True)
class Resources:
    """registers a thread; shared: bytes a program; local: bytes a thread, where registers spill to; wide, narrow:
    loads and stores of 16 bytes and of fewer, in the PTX."""

    registers: int
    shared: int
    local: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def fused(T: int, D: int, P: int, kind: str, x: torch.dtype, branch: torch.dtype | None = None) -> None:
    """residual_uem for 64 rows; kind: the norm, with a gate where it is modulated; none: no norm follows."""
    from adadiff_kernels.residual_uem import Norm, Score
    from adadiff_kernels.triton_residual_uem import launch_residual_uem

    branch, n = branch or x, 64
    by_lane = tensor(n, 6 * D, dtype=branch)
    affine = (tensor(D, dtype=branch), tensor(D, dtype=branch))
    norm = {
        "none": None,
        "affine": Norm(1e-5, *affine),
        "modulated": Norm(1e-6, None, None, by_lane[:, :D], by_lane[:, D : 2 * D]),
    }[kind]
    launch_residual_uem(
        tensor(n, T, D, dtype=x),
        tensor(n, T, D, dtype=branch),
        lanes=tensor(n, dtype=torch.int32),
        gate=by_lane[:, 2 * D : 3 * D] if kind == "modulated" else None,
        bias=tensor(D, dtype=branch),
        score=Score(tensor(P, D), tensor(n, P), T % 256) if P else None,
        norm=norm,
    )


def swaps(T: int, D: int, dtype: torch.dtype) -> None:
    from adadiff_kernels.triton_rows import launch_swap_rows

    launch_swap_rows(tensor(32, 2, dtype=torch.int32), tensor(64, T, D, dtype=dtype))


def joins(T: int, D: int, dtype: torch.dtype) -> None:
    from adadiff_kernels.triton_rows import launch_join_skip

    rows, index = tensor(64, T, D, dtype=dtype), tensor(64, dtype=torch.int32)
    launch_join_skip(rows, rows, index, index)


def saves(T: int, D: int, dtype: torch.dtype) -> None:
    from adadiff_kernels.triton_save_rows import launch_save_rows

    rows, index = tensor(64, T, D, dtype=dtype), tensor(64, dtype=torch.int32)
    launch_save_rows(rows, rows, index, index, 7)


def step(size: int, dtype: torch.dtype, everything: bool) -> None:
    """A solver step of 64 samples of [4, size, size]: guided in some channels, noisy, with history; or of DDIM."""
    from adadiff_kernels.solver_step import Guidance, Noise, SolverState, StepRows
    from adadiff_kernels.triton_solver_step import launch_solver_step

    shape, whole = (64, 4, size, size), tensor(64, dtype=torch.int64)
    eps = tensor(*shape, dtype=dtype)
    flags = [everything] * 4  # data, history, inner, noise
    rows = StepRows(tensor(64, 8), whole, tensor(64, dtype=torch.bool), *flags)
    if not everything:
        launch_solver_step(SolverState(tensor(*shape)), eps, rows)
        return
    state = SolverState(tensor(*shape), tensor(*shape), tensor(64, 2, *shape[1:]))
    guidance, noise = Guidance(eps, whole, tensor(64), whole), Noise(whole, whole, 1)
    launch_solver_step(state, eps, rows, whole, variance=eps, guidance=guidance, noise=noise)


SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# name -> kernel, launcher, its arguments
CASES: dict[str, tuple[str, Callable[..., None], tuple[Any, ...]]] = {
    "U-ViT-S/2, bf16": (FUSED, fused, (257, 512, 1, "affine", BRAIN)),
    "U-ViT-L/2, bf16": (FUSED, fused, (257, 1024, 1, "affine", BRAIN)),
    "U-ViT-L/2, bf16, no norm": (FUSED, fused, (257, 1024, 1, "none", BRAIN)),
    "U-ViT-L/2, bf16, no score": (FUSED, fused, (257, 1024, 0, "affine", BRAIN)),
    "U-ViT-L/2, bf16, map of 16": (FUSED, fused, (257, 1024, 16, "affine", BRAIN)),
    "U-ViT-H/2, mixed": (FUSED, fused, (258, 1152, 1, "affine", SINGLE, BRAIN)),
    "U-ViT-H/2, float32": (FUSED, fused, (258, 1152, 1, "affine", SINGLE)),
    "U-ViT-H/2, float32, map of 16": (FUSED, fused, (258, 1152, 16, "affine", SINGLE)),
    "DiT-XL/2, bf16": (FUSED, fused, (256, 1152, 1, "modulated", BRAIN)),
    "DiT-XL/2, fp16, map of 16": (FUSED, fused, (256, 1152, 16, "modulated", HALF)),
    "D = 1536, bf16, map of 64": (FUSED, fused, (334, 1536, 64, "affine", BRAIN)),
    "D = 1536, float32": (FUSED, fused, (334, 1536, 1, "modulated", SINGLE)),
    "partial scores, T = 1024": ("_mean_kernel", fused, (1024, 512, 1, "none", BRAIN)),
    "swap, U-ViT-H/2, bf16": ("_swap_rows_kernel", swaps, (258, 1152, BRAIN)),
    "save, U-ViT-L/2, bf16": ("_save_rows_kernel", saves, (257, 1024, BRAIN)),
    "join, U-ViT-L/2, bf16": ("_join_skip_kernel", joins, (257, 1024, BRAIN)),
    "join, U-ViT-H/2, float32": ("_join_skip_kernel", joins, (258, 1152, SINGLE)),
    "step, 32x32 latents, everything": ("_solver_step_kernel", step, (32, BRAIN, True)),
    "step, 32x32 latents, DDIM": ("_solver_step_kernel", step, (32, SINGLE, False)),
}
MODULES = ("triton_residual_uem", "triton_rows", "triton_save_rows", "triton_solver_step")


class Recorder:
    """Stands in a kernel's place and notes what would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: self.launches.append((arguments, named))


def launch(case: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel of a case, and the arguments with which its launcher launches it."""
    name, launcher, arguments = CASES[case]
    modules = [importlib.import_module(f"adadiff_kernels.{module}") for module in MODULES]
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
    """Signature, constants, attributes and options, as Triton's launch derives them from the same arguments."""
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
    """For a process in which kernels are not interpreted."""
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
    """Registers and bytes of local memory a thread of the one kernel in it, read by Triton's cuobjdump."""
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
    """In processes of their own: whether kernels are interpreted is settled where they are defined."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
        return dict(zip(chosen, pool.map(compile_variant, chosen), strict=True))


def _start_worker() -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_num_threads(1)


COLUMNS = ("registers", "shared", "local", "wide loads", "narrow loads", "wide stores", "narrow stores")


def table(found: dict[Variant, Resources]) -> str:
    """Markdown, one line a variant, so that a change shows as a line of a diff."""
    lines = [
        "# What the kernels take of a GPU",
        "",
        f"Compiled by Triton {PINNED} without a GPU (`make resources`); another version may differ. Registers and",
        "bytes of local memory a thread, bytes of shared memory a program; loads and stores of the PTX, wide ones of",
        "16 bytes.",
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
