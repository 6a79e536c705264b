"""CUDA graphs that the device itself launches, by a small CUDA program (tail_launch.cu)."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adadiff_kernels import Score, residual_uem
from benchmarks.gpu.session import Call, Session

SOURCE = Path(__file__).with_suffix(".cu")
LAUNCHES = 100  # in one chain


@dataclass(frozen=True)
class Probe:
    """calls: chains of one launch and of `launches`; accepts: part of a network -> "yes", or CUDA's error for a graph
    of it."""

    calls: Mapping[str, Call]
    launches: int
    accepts: Mapping[str, str]


def compile_library(folder: Path, architecture: str = "native") -> Path:
    """Compiles tail_launch.cu into the folder. Raises RuntimeError with the reason if that fails."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise RuntimeError("there is no nvcc")
    target = folder / "tail_launch.so"
    options = ("-O2", f"-arch={architecture}", "-rdc=true", "-shared", "-Xcompiler", "-fPIC", "-lcudadevrt")
    done = subprocess.run([nvcc, *options, "-o", str(target), str(SOURCE)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {(done.stderr or done.stdout).strip().splitlines()[0]}")
    return target


def probe(session: Session) -> Probe:
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(compile_library(Path(folder))))
    library.error_name.restype = ctypes.c_char_p
    library.accepts.argtypes = [ctypes.c_void_p]
    library.make_chain.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)]
    library.launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def done(error: int) -> None:
        if error:
            raise RuntimeError(f"CUDA: {library.error_name(error).decode()}")

    left, chain = torch.zeros(1, dtype=torch.int32, device=session.device), ctypes.c_void_p()
    done(library.make_chain(left.data_ptr(), ctypes.byref(chain)))

    def run(launches: int) -> None:
        left.fill_(launches)
        done(library.launch(chain, torch.cuda.current_stream().cuda_stream))

    run(LAUNCHES)
    torch.cuda.synchronize()
    if int(left) != 0:
        raise RuntimeError(f"a chain of {LAUNCHES} launches stopped {int(left)} before its end")
    accepts = {}
    for name, call in parts(session).items():
        error = library.accepts(captured_graph(call))
        accepts[name] = "yes" if not error else library.error_name(error).decode()
    return Probe({"a chain of 1": lambda: run(1), f"a chain of {LAUNCHES}": lambda: run(LAUNCHES)}, LAUNCHES, accepts)


def parts(session: Session) -> dict[str, Call]:
    """The operations of a block, each as a call."""
    n, T, D = 8, 258, 1024
    x, branch, w = (session.normal(*shape, dtype=torch.bfloat16) for shape in ((n, T, D), (n, T, D), (D, D)))
    q = session.normal(n, 16, T, D // 16, dtype=torch.bfloat16)
    lanes = torch.arange(n, dtype=torch.int32, device=session.device)
    score = Score(w[:1], torch.zeros(n, 1, device=session.device), 2)

    def attention(backend: SDPBackend) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, q, q)

        return call

    return {
        "product": lambda: F.linear(x, w),
        "cuDNN attention": attention(SDPBackend.CUDNN_ATTENTION),
        "flash attention": attention(SDPBackend.FLASH_ATTENTION),
        "GELU": lambda: F.gelu(x),
        "fused pass": lambda: residual_uem(x, branch, row_to_lane=lanes, score=score),
    }


def captured_graph(call: Call) -> int:
    """Address of the call's graph, which is kept until the process ends."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
        call()
    _kept.append(graph)
    return graph.raw_cuda_graph()


_kept: list[torch.cuda.CUDAGraph] = []
