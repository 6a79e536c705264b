"""Time of exits (decision and moves of rows), with and without a synchronisation, compared with plain PyTorch.

Rows are those of U-ViT-L/2. "Known to the host": the call ends when the host knows the number of remaining rows; the
other calls are only queued.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from adadiff_kernels import settle_rows
from benchmarks.gpu.session import Call, Session, Task
from benchmarks.gpu.tail_launch import probe
from benchmarks.rows import say

SUITE = "gpu-decision"
BRAIN = torch.bfloat16
ROWS = (258, 1024)


def tasks(session: Session) -> Iterator[Task]:
    for B in (3,) if session.dry else (8, 64):
        for exiting in ("nobody", "every other"):
            given = {"batch": B, "exiting": exiting}
            yield Task("decision", given, partial(decisions, session, given))
    yield Task("tail launch", {}, partial(tail_launch, session))


def decisions(session: Session, parameters: dict[str, object]) -> None:
    from adadiff_kernels import DeviceSet
    from adadiff_kernels.compaction.device_set import kernel_missing

    B, device = parameters["batch"], session.device
    u = torch.arange(B, device=device) % 2 * 0.5 + 0.25  # 0.25, 0.75, 0.25, ...
    threshold = torch.full((B,), 0.5 if parameters["exiting"] == "every other" else 0.1, device=device)
    wanted = int((u >= threshold).sum())
    rows = session.normal(B, *((5, 8) if session.dry else ROWS), dtype=BRAIN)
    saved, active = torch.empty_like(rows), DeviceSet(B, device)
    if (missing := kernel_missing(device)) is not None:
        say(f"decisions are made by PyTorch: {missing}")

    def exit_rows() -> Tensor:
        active.start()
        return active.exit_rows(u, threshold, 1, bound=B)

    def settle() -> None:
        settle_rows(exit_rows(), rows, saved)

    def known() -> int:
        settle()
        return active.wait(1)

    def pytorch() -> int:
        mask = u < threshold
        count = int((~mask).sum())
        saved[mask] = rows[mask]
        rows[:count] = rows[~mask]
        return count

    calls: dict[str, Call] = {
        "start": active.start,
        "start and exit": exit_rows,
        "start, exit and settle": settle,
        "the same, count known to the host": known,
        "PyTorch, count known to the host": pytorch,
    }
    for name in list(calls)[-2:]:
        if (count := calls[name]()) != wanted:
            raise RuntimeError(f"{name} counts {count} remaining rows, expected {wanted}; not measured")
    measured = session.compare(calls)
    results = {name: {"over_start": measured.ratio(name, "start").median} for name in calls}
    session.write(SUITE, "decision", parameters, measured, results, torch.float32)


def tail_launch(session: Session) -> None:
    """Whether the device could launch the next CUDA graph itself: which parts of a network such a graph may contain,
    and how long a launch takes."""
    if session.device.type != "cuda":
        return
    try:
        found = probe(session)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        say(f"tail launches are not measured: {str(error).splitlines()[0]}")
        return
    measured = session.compare(found.calls)
    results = {name: {"launches": found.launches, "accepts": found.accepts} for name in found.calls}
    session.write(SUITE, "tail launch", {}, measured, results, torch.float32)
