"""The FastAPI application, served by uvicorn (`adadiff serve`) or by Ray Serve."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..engine.handles import EngineFull
from .bodies import ImageRequest, ImagesReply, parse
from .drawing import Drawing
from .errors import ServiceError, json_response
from .gate import GONE, Gate, Passing, passing
from .orders import model_of, order_of
from .reading import ClientGone, read_json
from .replies import logged, reply
from .served import ServedModel
from .service import Service
from .settings import Settings
from .streaming import EventStream, gone
from .web_page import add_page

GENERATIONS = "/v1/images/generations"
_BODY = {"content": {"application/json": {"schema": ImageRequest.model_json_schema()}}, "required": True}


def create_app(models: Sequence[ServedModel], settings: Settings | None = None) -> FastAPI:
    """The application for one or more models; requests that name none get the first. The application's lifespan closes
    their engines. `app.state.service` is the `Service`. Raises ValueError for models or settings that do not fit."""
    service = Service(models, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(service.warm_up())
        try:
            yield
        finally:
            warming.cancel()
            await service.close()

    app = FastAPI(
        title="adadiff",
        docs_url=None,  # these pages load scripts from another site
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers={HTTPException: _not_served},
    )
    app.state.service = service
    app.add_middleware(Gate, service=service)
    _add_images(app, service)
    _add_models(app, service)
    _add_health(app, service)
    add_page(app)
    return app


class _RequestRoute(APIRoute):
    """A route whose endpoint takes only the request, which spares FastAPI's parsing of parameters."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        return self.endpoint


def _add_images(app: FastAPI, service: Service) -> None:
    async def generate(request: Request) -> Response:
        record = passing(request.scope)
        try:
            asked = parse(await read_json(request, service.settings))
            served = model_of(asked.model, service.models)
            accept = request.headers.get("accept")
            order = await order_of(asked, served, service.settings, service.presets[served.name], accept)
            drawing = service.submit(order)
        except ClientGone:
            return _nobody(record)
        except EngineFull as full:
            raise service.full(full) from None
        if not order.stream:
            return await _whole(service, drawing, request, record)

        def ended(error: BaseException | None) -> None:
            _finish(service, drawing, record, error)

        return EventStream(drawing, service.settings.write_seconds, ended)

    app.router.add_api_route(
        GENERATIONS,
        generate,
        methods=["POST"],
        response_model=ImagesReply,
        openapi_extra={"requestBody": _BODY},
        route_class_override=_RequestRoute,
    )


async def _whole(service: Service, drawing: Drawing, request: Request, record: Passing) -> Response:
    """Waits until all images are drawn and replies, unless the client disconnects first."""
    away = asyncio.create_task(gone(request.receive))
    away.add_done_callback(drawing.mailbox.ring)
    error: BaseException | None = None
    try:
        await drawing.done(away)
        return await reply(drawing, record.id)
    except ClientGone as left:
        error = left
        return _nobody(record)
    except BaseException as other:
        error = other
        raise
    finally:
        away.cancel()
        _finish(service, drawing, record, error)
        await asyncio.wait((away,))


def _finish(service: Service, drawing: Drawing, record: Passing, error: BaseException | None) -> None:
    """Records the end of a request in metrics and log."""
    service.ended(drawing)
    record.fields |= logged(drawing)
    if error is None:
        service.metrics.replied(drawing.order.model.name, record.began)
    elif isinstance(error, ServiceError):
        record.reason = error.code
    elif isinstance(error, ClientGone):
        _nobody(record)


def _nobody(record: Passing) -> Response:
    """The reply for a client that has disconnected; only its status is logged."""
    record.reason = "client_gone"
    return Response(status_code=GONE)


def _add_models(app: FastAPI, service: Service) -> None:
    def entry(name: str) -> dict[str, Any]:
        return service.models[name].describe(service.settings, service.presets[name], service.created)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [entry(name) for name in service.models]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return json_response(entry(model_of(name, service.models).name))


def _add_health(app: FastAPI, service: Service) -> None:
    async def health() -> Response:
        """503 if an engine has died, so that the service needs a restart."""
        states = service.states
        dead = "dead" in states.values() and not service.draining
        return json_response({"status": "dead" if dead else "alive", "models": states}, 503 if dead else 200)

    async def ready() -> Response:
        """503 until every model has drawn an image, if an engine has died, and while the service is stopping."""
        states = service.states
        state = "draining" if service.draining else next((s for s in states.values() if s != "ready"), "ready")
        return json_response({"status": state, "models": states}, 200 if state == "ready" else 503)

    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    for path, answer in (("/health", health), ("/ready", ready), ("/metrics", metrics)):
        app.add_api_route(path, answer, methods=["GET"])
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)


async def _not_served(request: Request, error: Exception) -> Response:
    """404 and 405 in the format of all other errors."""
    assert isinstance(error, HTTPException)
    record, headers = passing(request.scope), error.headers or {}
    if error.status_code == 405:
        message, code = f"{request.method} is not served here", "method_not_allowed"
    else:
        message, code = "there is nothing at this address", "not_found"
    record.reason = code
    return ServiceError(error.status_code, message, code, headers=headers).response()
