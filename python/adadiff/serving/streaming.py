"""Server-sent events of a request while it is drawn, and handling of clients that disconnect."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .bodies import PartialImageEvent, PreviewDetails
from .drawing import Drawing, Preview, check_done
from .errors import ServiceError, json_response
from .pictures import png_of
from .reading import ClientGone
from .replies import completed

SILENCE = 15.0  # seconds after which a comment keeps proxies from closing the connection


async def gone(receive: Receive) -> None:
    """Returns when the client has disconnected. Call it after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        continue


class EventStream(Response):
    """Streams previews and images. Ends early if the client disconnects or reads nothing for write_seconds.

    ended: called once at the end, with the error that was sent or raised, or None.
    """

    media_type = "text/event-stream"

    def __init__(self, drawing: Drawing, write_seconds: float, ended: Callable[[BaseException | None], None]):
        super().__init__(None, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._drawing, self._write_seconds, self._ended = drawing, write_seconds, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        away, sending = asyncio.create_task(gone(receive)), asyncio.create_task(self._send_all(send))
        error: BaseException | None = None
        try:
            await asyncio.wait((away, sending), return_when=asyncio.FIRST_COMPLETED)
            error = sending.result() if sending.done() else ClientGone()
        except BaseException as other:
            error = other
            raise
        finally:
            away.cancel()
            sending.cancel()
            self._ended(error)
            await asyncio.gather(away, sending, return_exceptions=True)

    async def _send_all(self, send: Send) -> BaseException | None:
        """Sends all events. Returns the error that ended the stream, or None; the client has been sent it."""

        async def out(body: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self._write_seconds):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except TimeoutError:
                raise ClientGone from None

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        failure: BaseException | None = None
        try:
            async for chunk in events(self._drawing):
                await out(chunk)
        except ClientGone as error:
            return error
        except ServiceError as error:
            failure = error
            await out(_event("error", json_response({"type": "error", **error.body}).body))
        await out(b"", more=False)
        return failure


async def events(drawing: Drawing) -> AsyncIterator[bytes]:
    """Yields server-sent events until all images are done. Raises ServiceError as soon as one fails."""
    mailbox, order = drawing.mailbox, drawing.order
    left, sent = set(range(len(drawing.handles))), [0] * len(drawing.handles)
    while left:
        if not await mailbox.changed(SILENCE):
            yield b": drawing\n\n"
        for index in sorted(left):
            handle = drawing.handles[index]
            if handle.over:
                check_done(handle, order)
                left.discard(index)
                yield _message(await completed(drawing, index))
            elif (preview := mailbox.take(index)) is not None:
                try:
                    event = await _partial(drawing, index, preview, sent[index])
                except ServiceError:  # an early prediction may be infinite though the final image is not
                    continue
                sent[index] += 1
                yield _message(event)


async def _partial(drawing: Drawing, index: int, preview: Preview, number: int) -> PartialImageEvent:
    order = drawing.order
    picture = await png_of(order.model, preview.read)
    return PartialImageEvent(
        b64_json=base64.b64encode(picture).decode(),
        partial_image_index=number,
        created_at=int(time.time()),
        size=order.model.size,
        adadiff=PreviewDetails(
            index=index,
            seed=order.seed + index,
            step=preview.step,
            steps=preview.steps,
            exit_layers=preview.exit_layers,
        ),
    )


def _message(event: BaseModel) -> bytes:
    return _event(event.type, event.model_dump_json(exclude_none=True).encode())  # type: ignore[attr-defined]


def _event(name: str, data: bytes | memoryview) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + bytes(data) + b"\n\n"
