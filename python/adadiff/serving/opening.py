"""Opens the models that the operator names, each with an engine and, if needed, a text encoder and a decoder."""

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
    """Opens models, given as name -> file, each with its own engine. device None: a GPU if there is one. text_encoder,
    decoder: folders. admission: as in `Engine`. shallow: name of a model -> file of the shallower model that replaces
    it at timesteps >= t_switch.

    Raises ValueError for files that do not fit, before the first engine is made."""
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
        for model_served in served:
            model_served.engine.close(drain=False)
        raise
    return served


def _encoder(folder: str | Path | None, models: Mapping[str, Model]) -> TextEncoder | None:
    """The text encoder that all text-to-image models share, or None. ValueError if it does not fit them."""
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
    """A function from a model's configuration to its decoder, latents -> images; None without a folder."""
    if folder is None:
        return None
    autoencoder = latents.load_autoencoder(folder, device)
    return lambda config: lambda samples: latents.decode(samples, autoencoder, config.latent_scale, config.latent_shift)
