"""PyTorch's attention by each of its backends: time of a call on the device and on the host, and time of the first
call with a number of rows.

The engine's number of rows changes from block to block, so work that a backend does once for each number of rows (such
as cuDNN's plans) occurs often.
"""

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.session import Call, Session, Task, teraflops

SUITE = "gpu-attention"
BRAIN = torch.bfloat16
BACKENDS = {
    "default": None,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SHAPES = {"U-ViT-L/2": (16, 258, 64), "DiT-XL/2": (16, 256, 72)}  # heads, tokens, channels of a head
HOST_CALLS = 50


def tasks(session: Session) -> Iterator[Task]:
    shapes = {"tiny": (2, 5, 8)} if session.dry else SHAPES
    for shape, sizes in shapes.items():
        for n in (1, 2) if session.dry else (8, 9, 64):
            given = {"shape": shape, "rows": n}
            yield Task("attention", given, partial(measure, session, sizes, given))


def measure(session: Session, sizes: tuple[int, int, int], parameters: dict[str, object]) -> None:
    heads, T, d = sizes
    n = parameters["rows"]
    qkv = session.normal(n, T, 3, heads, d, dtype=BRAIN).permute(2, 0, 3, 1, 4)  # strided, as the networks call it
    calls: dict[str, Call] = {}
    results: dict[str, dict[str, object]] = {}
    with torch.inference_mode():
        for name, backend in BACKENDS.items():
            call = attention(qkv, backend)
            try:
                first = seconds_of(session, call)
            except RuntimeError as error:  # no kernel of this backend for these shapes, or on a CPU
                print(f"{name} attention is left out: {str(error).splitlines()[0]}", flush=True)
                continue
            calls[name] = call
            results[name] = {"first_seconds": first, "host_seconds": host_seconds(session, call)}
        measured = session.compare(calls)
    for name, own in results.items():
        own["tflops"] = teraflops(measured.median(name), 2 * n * heads * T * T * d)
    session.write(SUITE, "attention", parameters, measured, results, BRAIN)


def attention(qkv: Tensor, backend: SDPBackend | None) -> Call:
    def call() -> Tensor:
        return F.scaled_dot_product_attention(*qkv)

    def chosen() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv)

    return call if backend is None else chosen


def seconds_of(session: Session, call: Call) -> float:
    """Seconds of one call, from its start on the host to its end on the device."""
    session.synchronize()
    started = time.perf_counter()
    call()
    session.synchronize()
    return time.perf_counter() - started


def host_seconds(session: Session, call: Call) -> float:
    """Seconds of the host per call, with calls queued one after another."""
    session.synchronize()
    started = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    taken = time.perf_counter() - started
    session.synchronize()
    return taken / HOST_CALLS
