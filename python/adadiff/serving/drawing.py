"""The images of one request while the engine draws them: waiting, previews, and cancelling."""

import asyncio
import time
from dataclasses import dataclass
from functools import lru_cache, partial

from torch import Tensor

from ..engine.handles import EngineClosed, EngineFull, Handle
from ..sampling.arriving import Arriving
from .drawn import Drawn
from .errors import ServiceError
from .orders import Order
from .reading import ClientGone


@dataclass(frozen=True)
class Preview:
    """Preview after `step` of `steps` steps. exit_layers: of the conditional half, as far as known; the last step's is
    not."""

    step: int
    steps: int
    sample: Arriving
    exit_layers: list[int]

    def read(self) -> Tensor:
        return self.sample.read()


class Mailbox:
    """Passes changes and previews from the engine's thread to the event loop. Only the newest preview of each image is
    kept, so a slow reader just misses previews. previews: the most that each image has."""

    def __init__(self, loop: asyncio.AbstractEventLoop, previews: int):
        self._loop, self._previews = loop, previews
        self._newest: dict[int, Preview] = {}
        self._changed = asyncio.Event()
        self._rung = False

    def on_step(self, index: int, handle: Handle) -> None:
        """Called in the engine's thread, which it must not block."""
        step, steps = handle.progress  # of a cascade not always those that were asked for
        if step in due_steps(steps, self._previews):
            layers = handle.report.exit_layer[:, 0, 0].tolist()
            self._newest[index] = Preview(step, steps, handle.predicted_x0_later(), layers)
            self.ring()

    def ring(self, *_: object) -> None:
        """Wakes the reader. Thread-safe."""
        if self._rung:
            return
        self._rung = True
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:  # the loop is closed, so there is no reader
            return

    async def changed(self, timeout: float | None = None) -> bool:
        """Waits for the next change; False after `timeout` seconds without one. Call it in the event loop."""
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        self._rung = False  # before the reader looks at the changes, so that it misses none
        return True

    def take(self, index: int) -> Preview | None:
        return self._newest.pop(index, None)


class Drawing:
    """The images of one request, made by `submit`. began: time of submission, on `time.perf_counter`."""

    def __init__(self, order: Order, mailbox: Mailbox):
        self.order, self.mailbox = order, mailbox
        self.handles: list[Handle] = []
        self._drawn: dict[int, Drawn] = {}
        self.began = time.perf_counter()

    @staticmethod
    def submit(order: Order) -> "Drawing":
        """Submits all images of a request, or none. Raises EngineFull, and ServiceError if the engine is closed or
        refuses the parameters."""
        mailbox = Mailbox(asyncio.get_running_loop(), order.previews)
        drawing, engine = Drawing(order, mailbox), order.model.engine
        try:
            for i, params in enumerate(order.params):
                on_step = partial(mailbox.on_step, i) if order.previews else None
                drawing.handles.append(engine.submit(params, on_step=on_step))
        except EngineFull:
            drawing.cancel()
            raise EngineFull(f"{engine.queue} images wait already, the most that the queue holds") from None
        except EngineClosed as closed:
            drawing.cancel()
            raise ServiceError(503, f"{order.model.name} is not available: {closed}", "engine_closed") from closed
        except ValueError as error:  # a limit that only the engine knows
            drawing.cancel()
            raise ServiceError(400, " ".join(str(error).split()), "invalid_value") from None
        except BaseException:
            drawing.cancel()
            raise
        for handle in drawing.handles:
            handle.add_done_callback(mailbox.ring)
        return drawing

    def cancel(self) -> None:
        """Cancels all images that are not finished; their lanes are free at the next tick."""
        for handle in self.handles:
            handle.cancel()

    def drawn(self, index: int) -> Drawn | None:
        """How image `index` was drawn; None if it is not finished, or has failed."""
        if index not in self._drawn:
            handle = self.handles[index]
            if not handle.over or handle.cancelled() or handle.exception(0) is not None:
                return None
            self._drawn[index] = Drawn.of(self.order.seed + index, handle.report)
        return self._drawn[index]

    @property
    def all_drawn(self) -> list[Drawn]:
        """How the finished images were drawn."""
        found = (self.drawn(i) for i in range(len(self.handles)))
        return [drawn for drawn in found if drawn is not None]

    @property
    def over(self) -> bool:
        return all(handle.over for handle in self.handles)

    def check(self) -> None:
        """Raises ServiceError if an image has failed or was cancelled."""
        for handle in self.handles:
            if handle.over:
                check_done(handle, self.order)

    async def done(self, away: asyncio.Future[None] | None = None) -> None:
        """Waits for all images. Raises ServiceError as soon as one fails, and ClientGone if `away` is done before them
        (it must ring the mailbox then); cancels the other images."""
        try:
            while not self.over:
                await self.mailbox.changed()
                self.check()
                if away is not None and away.done() and not self.over:
                    raise ClientGone
            self.check()
        finally:
            self.cancel()


def check_done(handle: Handle, order: Order) -> None:
    """ServiceError if a finished handle has no image."""
    if handle.cancelled():
        raise ServiceError(503, "the service is stopping and has cancelled this request", "aborted")
    if (error := handle.exception(0)) is None:
        return
    if isinstance(error, FloatingPointError) and order.guidance_scale != 1:
        message = f"{error}; a guidance_scale nearer to 1 may help"
        raise ServiceError(422, message, "not_finite", "guidance_scale") from error
    if isinstance(error, FloatingPointError):
        raise ServiceError(500, f"the model failed: {error}", "not_finite") from error
    raise ServiceError(500, "drawing failed; the log of the service says why", "drawing_failed") from error


@lru_cache(maxsize=256)
def due_steps(steps: int, previews: int) -> frozenset[int]:
    """Steps at which previews are made: at most `previews`, evenly spread over 1..steps - 1 (the last step gives the
    image itself)."""
    count = min(previews, steps - 1)
    return frozenset((k + 1) * steps // (count + 1) for k in range(count))
