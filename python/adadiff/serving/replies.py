"""Replies to completed requests."""

import base64
import math
import time
from statistics import fmean

from starlette.responses import Response

from .bodies import CompletedDetails, CompletedEvent, ImageData, ImageDetails, ImagesReply, RequestDetails
from .drawing import Drawing
from .drawn import Drawn
from .pictures import png_of


async def reply(drawing: Drawing, request_id: str) -> Response:
    """The reply with all images of a request, as JSON or, for a single image, as a PNG file."""
    order, handles = drawing.order, drawing.handles
    pictures = [await png_of(order.model, handle.result) for handle in handles]
    details = [details_of(image) for image in drawing.all_drawn]
    headers = {"Server-Timing": server_timing(details, time.perf_counter() - drawing.began)}
    if order.png:
        (image,) = details
        headers |= {
            "X-AdaDiff-Seed": str(image.seed),
            "X-AdaDiff-Mean-Exit-Layer": f"{image.mean_exit_layer:.4g}",
            "X-AdaDiff-Share-Left-Out": f"{image.share_left_out:.4g}",
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
    """The event of a finished image."""
    handle, order = drawing.handles[index], drawing.order
    picture = await png_of(order.model, handle.result)
    return CompletedEvent(
        b64_json=base64.b64encode(picture).decode(),
        created_at=int(time.time()),
        size=order.model.size,
        adadiff=CompletedDetails(index=index, **dict(details_of(drawing.drawn(index)))),
    )


def details_of(image: Drawn) -> ImageDetails:
    conditional, unconditional = image.layers.T.tolist()
    return ImageDetails(
        seed=image.seed,
        steps=image.steps,
        num_layers=image.num_layers,
        mean_exit_layer=round(image.mean_exit_layer, 4),
        share_left_out=round(image.share_left_out, 4),
        seconds_waiting=round(image.waited, 6),
        seconds_running=round(image.seconds, 6),
        exit_layers=conditional,
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
        mean_exit_layer=round(fmean(one.mean_exit_layer for one in details), 4),
        share_left_out=round(fmean(one.share_left_out for one in details), 4),
        seconds_waiting=max(one.seconds_waiting for one in details),
        seconds_running=max(one.seconds_running for one in details),
    )


def server_timing(details: list[ImageDetails], total: float) -> str:
    """Value of the header Server-Timing (W3C), in milliseconds: the longest wait in the queue, the longest drawing
    time, and the total."""
    parts = {
        "queue": max(one.seconds_waiting for one in details),
        "draw": max(one.seconds_running for one in details),
        "total": total,
    }
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in parts.items() if math.isfinite(seconds))


def logged(drawing: Drawing) -> dict[str, object]:
    """Fields of a request for the log, whether or not it was completed."""
    order, images = drawing.order, drawing.all_drawn
    return {
        "model": order.model.name,
        "images": len(drawing.handles),
        "steps": order.steps,
        "policy": order.policy,
        "seed": order.seed,
        "left_out": round(fmean(one.share_left_out for one in images), 4) if images else None,
    }
