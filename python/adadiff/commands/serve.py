"""adadiff serve."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint import find
from ..model import Model
from ..pipelines import latents
from ..pipelines.text import CLIP, TextEncoder
from ..reading import read_text
from ..serving.class_names import class_names
from ..serving.settings import Settings
from .shared import execution_of, load_model

if TYPE_CHECKING:
    from ..serving.served import ServedModel

KEY_VARIABLE = "ADADIFF_API_KEY"
EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def serve(options: argparse.Namespace) -> None:
    _check_extra()
    from ..serving import lifecycle, logs
    from ..serving.app import create_app

    settings, named = settings_of(options, os.environ), names_of(options.models)
    if not 0 < options.drain_timeout <= 86400:
        raise ValueError(f"--drain-timeout must be above 0 and at most 86400 seconds, got {options.drain_timeout:g}")
    if not 0 <= options.port < 2**16:  # some systems take what is left of it beyond 16 bits
        raise ValueError(f"--port must lie in 0..65535, got {options.port}")
    logs.configure(options.log_format, sys.stderr)
    bound = lifecycle.bind(options.host, options.port)  # before anything is loaded, which takes long
    with bound:
        app = create_app(opened(options, named), settings)
        address = lifecycle.address_of(bound)
        if not settings.api_keys and options.host not in lifecycle.LOOPBACK:
            logs.log("anybody who reaches this address may draw; --api-key-file asks for a key", 30, address=address)
        logs.log("serving", address=address, models=",".join(named))
        if not lifecycle.run(app, bound, options.drain_timeout):
            raise SystemExit(1)


def _check_extra() -> None:
    """ImportError, with the remedy, where a package of the extra `serve` is missing."""
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ImportError(f"adadiff serve takes {name}: pip install 'adadiff_kernels[serve]'") from error


def settings_of(options: argparse.Namespace, environment: Any) -> Settings:
    """ValueError for limits, policies and keys that cannot be."""
    policies: dict[str, str] = {}
    for text in options.policy or ():
        name, equals, spelling = text.partition("=")
        if not (equals and spelling) or name in policies:
            raise ValueError(f"--policy takes NAME=SPELLING, each name once, as in best=exit:0.135; got {text!r}")
        policies[name] = spelling
    keys = [environment[KEY_VARIABLE]] if environment.get(KEY_VARIABLE) else []
    if options.api_key_file is not None:
        found = read_text(options.api_key_file).split()
        if not found:
            raise ValueError(f"{options.api_key_file} holds no key; one a line")
        keys += found
    return Settings(
        max_images=options.max_images,
        max_steps=options.max_steps,
        max_body=options.max_body,
        steps=options.steps,
        policies=policies,
        api_keys=tuple(keys),
    )


def names_of(models: Sequence[str]) -> dict[str, str]:
    """Names and files of models given as NAME=FILE, as a file, or as one of the package. ValueError for two of one
    name."""
    named: dict[str, str] = {}
    for text in models:
        name, equals, file = text.partition("=")
        if not equals:
            name, file = Path(text).stem, text
        if name in named:
            raise ValueError(f"two models are called {name!r}; give one as NAME=FILE")
        named[name] = file
    return named


def opened(options: argparse.Namespace, named: dict[str, str]) -> "list[ServedModel]":
    """Each model with an engine of its own. ValueError for files that do not fit, before the first engine is made."""
    from ..serving.served import ServedModel

    models = {name: load_model(options, file) for name, file in named.items()}
    encode, decode = _encoder(options, models), _decoder(options)
    served: list[ServedModel] = []
    try:
        for name, model in models.items():
            scale = model.config.latent_scale
            more = {
                "class_names": () if named[name] != name or find(name).stem != name else class_names(name),
                "encode": encode if model.config.network.context_tokens else None,
                "decode": None if scale is None or decode is None else decode(scale),
            }
            of_engine = (options.capacity, options.queue, execution_of(options), options.admission)
            served.append(ServedModel.open(name, model, *of_engine, **more))
    except BaseException:
        for one in served:
            one.engine.close(drain=False)
        raise
    return served


def _encoder(options: argparse.Namespace, models: dict[str, Model]) -> TextEncoder | None:
    """One for all models of text."""
    text = [name for name, model in models.items() if model.config.network.context_tokens]
    if not text:
        if options.text_encoder is not None:
            raise ValueError("none of the models takes text; leave --text-encoder out")
        return None
    encoder = TextEncoder.load(options.text_encoder or CLIP)
    made = list(encoder([""]).shape[1:])
    for name in text:
        network = models[name].config.network
        if made != [network.context_tokens, network.context_dim]:
            wanted = [network.context_tokens, network.context_dim]
            raise ValueError(f"{name} takes text {wanted}, the text encoder makes {made}")
    return encoder


def _decoder(options: argparse.Namespace) -> Callable[[float], Callable[[Tensor], Tensor]] | None:
    """From a model's latent scale to what makes its images."""
    if options.decoder is None:
        return None
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = latents.load_autoencoder(options.decoder, device)
    return lambda scale: lambda samples: latents.decode(samples, autoencoder, scale)
