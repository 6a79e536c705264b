"""Graphs with IF nodes, by a small CUDA program: PyTorch records them from 2.12 on, Triton cannot set a condition."""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from gpu.session import Call

SOURCE = Path(__file__).with_suffix(".cu")
SEGMENTS = 4
SHAPES = {"no IF": 0, "IFs": 1, "nested IFs": 2}


def compile_library(folder: Path, architecture: str = "native") -> Path:
    """RuntimeError with the reason where it cannot be compiled."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise RuntimeError("there is no nvcc")
    target = folder / "conditional.so"
    command = [nvcc, "-O2", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC", "-o", str(target), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {(done.stderr or done.stdout).strip().splitlines()[0]}")
    return target


def conditional_graphs() -> dict[str, Call]:
    """name -> replay of SEGMENTS segments, without IF nodes, with those hit, and with those missed.

    Each has run once, and done as much work as its condition lets it. RuntimeError where there are no IF nodes.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(compile_library(Path(folder))))
    library.error_name.restype = ctypes.c_char_p
    library.replay_graph.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.make_graph.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]

    def done(error: int) -> None:
        if error:
            raise RuntimeError(f"CUDA: {library.error_name(error).decode()}")

    calls: dict[str, Call] = {}
    for name, shape in SHAPES.items():
        for flag in (1,) if shape == 0 else (1, 0):
            memory = torch.tensor([flag, 0, 0], dtype=torch.int32, device="cuda")
            graph = ctypes.c_void_p()
            done(library.make_graph(SEGMENTS, shape, memory.data_ptr(), ctypes.byref(graph)))

            def replay(graph: ctypes.c_void_p = graph, memory: torch.Tensor = memory) -> None:
                done(library.replay_graph(graph, torch.cuda.current_stream().cuda_stream))

            replay()
            if (work := int(memory[1])) != flag * SEGMENTS:
                raise RuntimeError(f"{name} with the flag {flag} did the work of {work} of {SEGMENTS} segments")
            calls[name if shape == 0 else f"{name} {'hit' if flag else 'missed'}"] = replay
    return calls
