"""The service on a Ray cluster: replicas of the application that `adadiff serve` runs, behind Ray Serve's proxy."""

import os
import sys

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from .. import logs
from ..app import create_app
from ..opening import opened
from ..service import Service
from ..settings import keys_of
from .arguments import Arguments


@serve.ingress()
class Replica:
    """A process with an engine for each model. Ray sends it requests after it has drawn an image with each model.

    To end it, Ray stops sending requests, waits for those in flight, and then for the application's lifespan, which
    closes the engines.
    """

    def __init__(self, arguments: Arguments, api_keys: tuple[str, ...]):
        self._arguments, self._keys = arguments, api_keys
        self._service: Service | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray in the replica's process. Raises ValueError for models that cannot be opened there."""
        arguments = self._arguments
        logs.configure(arguments.log_format, sys.stderr)
        models = opened(
            arguments.named,
            device=arguments.device,
            dtype=arguments.dtype,
            capacity=arguments.capacity,
            queue=arguments.queue,
            execution=arguments.execution,
            admission=arguments.admission,
            text_encoder=arguments.text_encoder,
            decoder=arguments.decoder,
            shallow=arguments.shallow,
            t_switch=arguments.t_switch,
        )
        app = create_app(models, arguments.settings(self._keys))
        self._service = app.state.service
        await self._service.warm_up()
        if cold := [name for name, state in self._service.states.items() if state != "ready"]:
            raise RuntimeError(f"{cold[0]} could not draw its first image; the log says why")
        return app

    def check_health(self) -> None:
        """Called by Ray periodically. Raises RuntimeError if an engine has died; Ray then replaces the replica."""
        service = self._service
        if service is None or service.draining:
            return
        for name, state in service.states.items():
            if state == "dead":
                raise RuntimeError(f"the engine of {name} is dead")


def app(arguments: Arguments) -> Application:
    """Application builder for `serve run adadiff.serving.ray:app`, with or without arguments, and for `import_path` in
    a config file.

    API keys are given as for `adadiff serve`; they are read here and passed to the replicas.
    """
    keys = keys_of(arguments.api_key_file, os.environ)
    return serve.deployment(**arguments.deployment())(Replica).bind(arguments, keys)
