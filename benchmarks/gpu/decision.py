"""What it costs to know, on the host or not at all, how many rows stay after a block.

A decision reads u and thresholds of B lanes. Queued: the host learns nothing. The others end when it knows the count.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from rows import say
from torch import Tensor

import adadiff
from gpu.session import Call, Session, Task

SUITE = "gpu-decision"
BRAIN = torch.bfloat16
PRESETS = ("cifar10_uvit_small", "imagenet256_uvit_large")


def tasks(session: Session) -> Iterator[Task]:
    for B in (3,) if session.dry else (8, 64, 256):
        yield Task("decision", {"batch": B}, partial(decisions, session, B))
    for preset in ("digits",) if session.dry else PRESETS:
        for B in (3,) if session.dry else (1, 8, 64):
            yield Task("layer", {"preset": preset, "batch": B}, partial(layers, session, preset, B))
    yield Task("if", {}, partial(conditions, session))


def decisions(session: Session, B: int) -> None:
    from adadiff_kernels.device_set import DeviceSet, kernel_missing
    from gpu.kernels import PostedCount

    compaction = "compact.cu" if kernel_missing(session.device) is None else "DeviceSet in PyTorch"
    u, threshold = lane_values(session, B)
    wanted = int((u >= threshold).sum())
    posted, active = PostedCount(u, threshold), DeviceSet(B, session.device)

    def compact() -> None:
        active.start()
        active.leave(u, threshold, 1, bound=B)

    def compacted() -> int:
        compact()
        return active.wait(1)

    calls: dict[str, Call] = {
        "queued: PyTorch": lambda: staying(u, threshold),
        "queued: Triton": posted.post,
        f"queued: {compaction}": compact,
        ".item()": lambda: int(staying(u, threshold).item()),
        "event on a pinned copy": copied(session, lambda: staying(u, threshold)),
        "polled word, Triton": lambda: posted.after(posted.post),
        f"polled word, {compaction}": compacted,
    }
    for name, call in calls.items():
        if not name.startswith("queued") and call() != wanted:
            raise RuntimeError(f"{name} counts {call()} rows, {wanted} stay; not measured")
    measured = session.compare(calls)
    results = {name: {"over_queued": measured.ratio(name, "queued: Triton").median} for name in calls}
    session.write(SUITE, "decision", {"batch": B}, measured, results, torch.float32)


def lane_values(session: Session, B: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(B, device=session.device), torch.full((B,), 0.5, device=session.device)


def staying(u: Tensor, threshold: Tensor) -> Tensor:
    return (u >= threshold).sum(dtype=torch.int32)


def copied(session: Session, count: Callable[[], Tensor]) -> Callable[[], int]:
    """Waits for an event behind an asynchronous copy of the count to pinned memory."""
    cuda = session.device.type == "cuda"
    target = torch.zeros((), dtype=torch.int32, pin_memory=cuda)
    event = torch.cuda.Event() if cuda else None

    def call() -> int:
        target.copy_(count(), non_blocking=True)
        if event is not None:
            event.record()
            event.synchronize()
        return int(target)

    return call


def layers(session: Session, preset: str, B: int) -> None:
    """One block by itself: launched kernel by kernel, as a graph, and as a graph that decides, then known to the host
    before the next one is launched."""
    from adadiff_kernels.device_set import DeviceSet

    torch.manual_seed(0)
    backbone = adadiff.build(preset).backbone.to(session.device, BRAIN)
    x = session.normal(B, backbone.tokens, backbone.dim, dtype=BRAIN)
    u, threshold = lane_values(session, B)
    active, block = DeviceSet(B, session.device), backbone.blocks[0]

    def decide() -> None:
        block(x)
        active.start()
        active.leave(u, threshold, 1, bound=B)

    deciding = session.captured(decide)

    def decided() -> int:
        deciding()
        if not session.dry:
            active.replayed()
        return active.wait(1)

    with torch.inference_mode():
        if (count := decided()) != int(staying(u, threshold)):
            raise RuntimeError(f"the captured decision counts {count} rows, {int(staying(u, threshold))} stay")
        calls = {"eager": lambda: block(x), "graph": session.captured(lambda: block(x)), "graph, decided": decided}
        measured = session.compare(calls)
    results = {name: {"over_graph": measured.ratio(name, "graph").median} for name in calls}
    session.write(SUITE, "layer", {"preset": preset, "batch": B}, measured, results, BRAIN)


def conditions(session: Session) -> None:
    """A graph of one small kernel, and that kernel behind an IF node whose condition the device sets."""
    from gpu.conditional import conditional_graphs

    if session.device.type != "cuda":
        return
    try:
        calls = conditional_graphs()
    except (ImportError, AttributeError, RuntimeError) as error:
        say(f"IF nodes are left out: {error}")
        return
    measured = session.compare(calls)
    results = {name: {"over_no_if": measured.ratio(name, "no IF").median} for name in calls}
    session.write(SUITE, "if", {}, measured, results, torch.float32)
