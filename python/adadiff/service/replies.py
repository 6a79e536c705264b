"""Replies to a request whose images have been drawn."""

import base64
import math
import time

import numpy as np
from starlette.responses import Response

from ..sampling.reports import RequestReport
from ..serving.handles import Handle
from .bodies import CompletedDetails, CompletedEvent, ImageData, ImageDetails, ImagesReply, RequestDetails
from .drawing import Drawing
from .pictures import png_of


async def reply(drawing: Drawing, request_id: str) -> Response:
    """All images of a request in one body, or the bytes of its only one."""
    order, handles = drawing.order, drawing.handles
    pictures = [await png_of(order.model, handle.result) for handle in handles]
    details = [details_of(order.seed + i, handle.report) for i, handle in enumerate(handles)]
    headers = {"Server-Timing": server_timing(details, time.perf_counter() - drawing.began)}
    if order.png:
        (one,) = details
        headers |= {
            "X-AdaDiff-Seed": str(one.seed),
            "X-AdaDiff-Mean-Exit-Layer": f"{one.mean_exit_layer:.4g}",
            "X-AdaDiff-Share-Left-Out": f"{one.share_left_out:.4g}",
        }
        return Response(pictures[0], headers=headers, media_type="image/png")
    body = ImagesReply(
        created=int(time.time()),
        data=[
            ImageData(b64_json=base64.b64encode(picture).decode(), adadiff=one)
            for picture, one in zip(pictures, details, strict=True)
        ],
        size=order.model.size,
        adadiff=summary(drawing, details, request_id),
    )
    return Response(body.model_dump_json(exclude_none=True), headers=headers, media_type="application/json")


async def completed(drawing: Drawing, index: int) -> CompletedEvent:
    """The event of one image that is done."""
    handle, order = drawing.handles[index], drawing.order
    picture = await png_of(order.model, handle.result)
    details = details_of(order.seed + index, handle.report)
    return CompletedEvent(
        b64_json=base64.b64encode(picture).decode(),
        created_at=int(time.time()),
        size=order.model.size,
        adadiff=CompletedDetails(index=index, **dict(details)),
    )


def details_of(seed: int, report: RequestReport) -> ImageDetails:
    layers = report.exit_layer[:, 0]
    unconditional = layers[:, 1].tolist()
    return ImageDetails(
        seed=seed,
        steps=len(layers),
        num_layers=report.num_layers,
        mean_exit_layer=round(report.mean_exit_layer, 4),
        share_left_out=round(1 - report.blocks / max(report.blocks_full, 1), 4),
        seconds_waiting=round(max(report.waited, 0.0), 6),
        seconds_running=round(report.seconds, 6),
        exit_layers=layers[:, 0].tolist(),
        exit_layers_unconditional=unconditional if any(unconditional) else None,
    )


def summary(drawing: Drawing, details: list[ImageDetails], request_id: str) -> RequestDetails:
    order = drawing.order
    return RequestDetails(
        request_id=request_id,
        model=order.model.name,
        policy=order.policy,
        solver=order.solver,
        seed=order.seed,
        steps=order.steps,
        guidance_scale=order.guidance_scale,
        num_layers=order.model.model.num_layers,
        mean_exit_layer=round(float(np.mean([one.mean_exit_layer for one in details])), 4),
        share_left_out=round(float(np.mean([one.share_left_out for one in details])), 4),
        seconds_waiting=max(one.seconds_waiting for one in details),
        seconds_running=max(one.seconds_running for one in details),
    )


def server_timing(details: list[ImageDetails], total: float) -> str:
    """As of W3C's Server Timing, in milliseconds: the longest in the queue, the longest of drawing, and all."""
    parts = {
        "queue": max(one.seconds_waiting for one in details),
        "draw": max(one.seconds_running for one in details),
        "total": total,
    }
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in parts.items() if math.isfinite(seconds))


def logged(drawing: Drawing) -> dict[str, object]:
    """What the log tells of a request, whatever has become of it."""
    order, reports = drawing.order, [handle.report for handle in drawing.handles]
    done = [handle.report for handle in drawing.handles if _is_drawn(handle)]
    blocks, full = sum(one.blocks for one in done), sum(one.blocks_full for one in done)
    return {
        "model": order.model.name,
        "images": len(reports),
        "steps": order.steps,
        "policy": order.policy,
        "seed": order.seed,
        "left_out": round(1 - blocks / full, 4) if full else None,
    }


def _is_drawn(handle: Handle) -> bool:
    return handle.over and not handle.cancelled() and handle.exception(0) is None
