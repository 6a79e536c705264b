"""The device's highest rates of copying and of bfloat16 matrix products."""

from collections.abc import Iterator

import torch

from benchmarks.gpu.session import Session, Task, copy_of, gigabytes, teraflops

SUITE = "gpu-ceilings"


def tasks(session: Session) -> Iterator[Task]:
    size, side = (2**12, 64) if session.dry else (2**31, 8192)
    yield Task("copy", {"bytes": size}, lambda: copy(session, size))
    yield Task("product", {"side": side}, lambda: product(session, side))


def copy(session: Session, size: int) -> None:
    call, moved = copy_of(session, size)
    measured = session.compare({"copy": call}, turn=0.1)
    rate = gigabytes(measured.median("copy"), moved)
    session.write(SUITE, "copy", {"bytes": size}, measured, {"copy": {"gb_per_second": rate}}, torch.int8)


def product(session: Session, side: int) -> None:
    """A product of normally distributed values, as zeros would run faster."""
    a, b = (session.normal(side, side, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    measured = session.compare({"product": lambda: torch.mm(a, b, out=out)}, turn=0.1)
    rate = teraflops(measured.median("product"), side**3)
    session.write(SUITE, "product", {"side": side}, measured, {"product": {"tflops": rate}}, torch.bfloat16)
