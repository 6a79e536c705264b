"""Models as the operator of a service names them, each opened with an engine, a text encoder and a decoder."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..checkpoint import find
from ..config import ModelConfig
from ..forward.options import ExecutionOptions
from ..model import Model
from ..pipelines import latents
from ..pipelines.text import CLIP, TextEncoder
from .class_names import class_names
from .served import ServedModel


def opened(
    named: Mapping[str, str],
    *,
    device: str | None = None,
    dtype: str | None = None,
    capacity: int | str = 64,
    queue: int = 256,
    execution: ExecutionOptions | None = None,
    admission: str = "arrival",
    text_encoder: str | Path | None = None,
    decoder: str | Path | None = None,
    shallow: Mapping[str, str] | None = None,
    t_switch: float | None = None,
) -> list[ServedModel]:
    """Each model with an engine of its own. device: None: a GPU if there is one. text_encoder, decoder: folders.
    admission: as in `Engine`. shallow: by the name of a model, the file of the shallower one that serves times of
    t_switch and above.

    ValueError for files that do not fit, before the first engine is made."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: checkpoint.load(file, device, dtype) for name, file in named.items()}
    shallower = {name: checkpoint.load(file, device, dtype) for name, file in (shallow or {}).items()}
    encode, decode = _encoder(text_encoder, models), _decoder(decoder, device)
    served: list[ServedModel] = []
    try:
        for name, model in models.items():
            config = model.config
            more = {
                "class_names": () if named[name] != name or find(name).stem != name else class_names(name),
                "encode": encode if model.config.network.context_tokens else None,
                "decode": None if config.latent_scale is None or decode is None else decode(config),
            }
            if name in shallower:
                more |= {"shallow_model": shallower[name], "t_switch": t_switch}
            served.append(ServedModel.open(name, model, capacity, queue, execution, admission=admission, **more))
    except BaseException:
        for one in served:
            one.engine.close(drain=False)
        raise
    return served


def _encoder(folder: str | Path | None, models: Mapping[str, Model]) -> TextEncoder | None:
    """One for all models of text."""
    text = [name for name, model in models.items() if model.config.network.context_tokens]
    if not text:
        if folder is not None:
            raise ValueError("none of the models takes text; leave --text-encoder out")
        return None
    encoder = TextEncoder.load(folder or CLIP)
    made = list(encoder([""]).shape[1:])
    for name in text:
        network = models[name].config.network
        if made != [network.context_tokens, network.context_dim]:
            wanted = [network.context_tokens, network.context_dim]
            raise ValueError(f"{name} takes text {wanted}, the text encoder makes {made}")
    return encoder


def _decoder(folder: str | Path | None, device: str) -> Callable[[ModelConfig], Callable[[Tensor], Tensor]] | None:
    """From a model's configuration to what makes its images."""
    if folder is None:
        return None
    autoencoder = latents.load_autoencoder(folder, device)
    return lambda own: lambda samples: latents.decode(samples, autoencoder, own.latent_scale, own.latent_shift)
