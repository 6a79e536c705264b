"""adadiff serve."""

import argparse
import importlib
import os
import sys
from typing import Any

from ..serving.settings import KEY_VARIABLE as KEY_VARIABLE
from ..serving.settings import Settings, keys_of, names_of, presets_of, shallow_of, steps_of
from .shared import execution_of

EXTRA = ("fastapi", "uvicorn", "httptools", "prometheus_client")


def serve(options: argparse.Namespace) -> None:
    _check_extra()
    from ..serving import lifecycle, logs
    from ..serving.app import create_app
    from ..serving.opening import opened

    settings, named = settings_of(options, os.environ), names_of(options.models)
    if not 0 < options.drain_timeout <= 86400:
        raise ValueError(f"--drain-timeout must be above 0 and at most 86400 seconds, got {options.drain_timeout:g}")
    if not 0 <= options.port < 2**16:  # some systems silently cut it to 16 bits
        raise ValueError(f"--port must lie in 0..65535, got {options.port}")
    logs.configure(options.log_format, sys.stderr)
    bound = lifecycle.bind(options.host, options.port)  # before anything is loaded, which takes long
    with bound:
        models = opened(
            named,
            device=options.device,
            dtype=options.dtype,
            capacity=options.capacity,
            queue=options.queue,
            execution=execution_of(options),
            admission=options.admission,
            text_encoder=options.text_encoder,
            decoder=options.decoder,
            shallow=shallow_of(options.shallow_model or (), named, options.t_switch),
            t_switch=options.t_switch,
        )
        app = create_app(models, settings)
        address = lifecycle.address_of(bound)
        if not settings.api_keys and options.host not in lifecycle.LOOPBACK:
            logs.log("no API key: anyone who reaches this address may draw; see --api-key-file", 30, address=address)
        logs.log("serving", address=address, models=",".join(named))
        if not lifecycle.run(app, bound, options.drain_timeout):
            raise SystemExit(1)


def _check_extra() -> None:
    """ImportError, with the pip command to run, if a package of the extra `serve` is missing."""
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(f"adadiff serve needs {name}: pip install 'adadiff_kernels[serve]'") from error


def settings_of(options: argparse.Namespace, environment: Any) -> Settings:
    """Settings of the service from options and environment variables. ValueError for invalid limits, policies or
    keys."""
    return Settings(
        max_images=options.max_images,
        max_steps=options.max_steps,
        max_body=options.max_body,
        steps=steps_of(options.steps, options.max_steps),
        policies=presets_of(options.policy or ()),
        api_keys=keys_of(options.api_key_file, environment),
    )
