"""Shared state of a service: models, settings, metrics, requests in flight, and readiness."""

import asyncio
import time
from collections.abc import Sequence

from ..engine.handles import EngineFull
from ..policies.joining import split_parts
from ..sampling.params import SamplingParams
from .allowed import blank_condition, presets_for
from .drawing import Drawing
from .errors import ServiceError
from .logs import log
from .metrics import Metrics
from .orders import Order
from .served import ServedModel
from .settings import Settings

CLOSE_SECONDS = 30.0  # for the running tick of an engine when a service ends


class Service:
    """models: one or more; requests that name none get the first. Raises ValueError for two models of the same name,
    and for a preset that no model can follow."""

    quiet = frozenset({"/health", "/ready", "/metrics", "/page/{name}"})  # paths whose successes are not logged

    def __init__(self, models: Sequence[ServedModel], settings: Settings):
        self.models = {served.name: served for served in models}
        if not models or len(self.models) != len(models):
            raise ValueError(f"a service needs models of different names, got {[served.name for served in models]}")
        self.settings, self.metrics = settings, Metrics(self.models)
        self.presets = {
            name: presets_for(
                served.model, settings.policies, served.engine.shallow_model is not None, settings.max_steps
            )
            for name, served in self.models.items()
        }
        followed = {preset for found in self.presets.values() for preset in found}
        if idle := [name for name in settings.policies if name not in followed]:
            text, limit = settings.policies[idle[0]], ""
            if any(part.startswith("estimate:") for part in split_parts(text)):  # for a certain number of steps
                limit = f" in {settings.max_steps} steps or fewer"
            raise ValueError(f"policy {idle[0]}={text} fits none of {', '.join(self.models)}{limit}")
        self.created = int(time.time())
        self.draining = self.aborted = False
        self._warm: set[str] = set()
        self._drawings: set[Drawing] = set()

    def submit(self, order: Order) -> Drawing:
        """Submits an order, which counts as in flight until `ended`. Raises EngineFull and ServiceError."""
        drawing = Drawing.submit(order)
        self._drawings.add(drawing)
        return drawing

    def full(self, why: EngineFull) -> ServiceError:
        """The error (429, with Retry-After) for a request that a full queue refused."""
        headers = {"Retry-After": str(self.metrics.retry_after())}
        return ServiceError(429, f"too many requests: {why}", "queue_full", headers=headers)

    def ended(self, drawing: Drawing) -> None:
        """To be called when a request has ended for any reason. Cancels unfinished images and counts finished ones."""
        drawing.cancel()
        self._drawings.discard(drawing)
        for image in drawing.all_drawn:
            self.metrics.drawn(drawing.order.model.name, image)

    @property
    def states(self) -> dict[str, str]:
        """State of each model: "warming" until it has drawn its first image, then "ready"; "dead" if its engine has
        died."""

        def state(served: ServedModel) -> str:
            if not served.engine.alive:
                return "dead"
            return "ready" if served.name in self._warm and served.engine.ready else "warming"

        return {name: state(served) for name, served in self.models.items()}

    async def warm_up(self) -> None:
        """Draws an image of one step with each model, so that everything made at first use exists."""

        async def draw(served: ServedModel) -> None:
            params = SamplingParams(seed=0, steps=1, **blank_condition(served.model))
            try:
                await asyncio.wrap_future(served.engine.submit(params))
            except Exception as error:
                log("model failed to warm up", 40, error, model=served.name)
                return
            self._warm.add(served.name)
            log("model is ready", model=served.name, size=served.size, capacity=served.engine.capacity)

        await asyncio.gather(*map(draw, self.models.values()))

    def drain(self) -> None:
        """Refuses new requests; those in flight continue."""
        self.draining = True

    def abort(self) -> None:
        """Refuses new requests and cancels those in flight; their clients get an error."""
        self.draining = True
        if self._drawings:
            self.aborted = True
            log("cancelling requests in flight", 30, requests=len(self._drawings))
        for drawing in list(self._drawings):
            drawing.cancel()

    async def close(self) -> None:
        """Closes the engines."""
        self.draining = True

        def end(served: ServedModel) -> None:
            try:
                served.engine.close(drain=not self._drawings, timeout=CLOSE_SECONDS)
            except TimeoutError as error:
                log("the engine did not end", 40, error, model=served.name)

        await asyncio.gather(*(asyncio.to_thread(end, served) for served in self.models.values()))
