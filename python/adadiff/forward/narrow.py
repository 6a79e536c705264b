"""Narrow networks of a slimmable model (DDSM: Yang et al., ICLR 2024, arXiv 2310.03337).

A block of width w uses the first share w of the heads and of the MLP channels; hidden states keep their D channels, so
norms, long skips, exits, stem and head are those of the whole network. A narrow network is an ordinary `Model` whose
weights are the model's own or views of them: nothing is copied, and in-place edits take effect at once.
"""

import dataclasses
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Size, Tensor, nn

from ..config import ModelConfig
from ..model import Model
from ..policies.width import Width
from ..weights import plain_names
from .networks import Network
from .spaces import Parameters

MOST_CHOICES = 64  # `WidthChoice`s kept for each model


def narrow_config(config: ModelConfig, width: float) -> ModelConfig:
    """The configuration of a slimmable model's network at `width`."""
    return dataclasses.replace(config, network=dataclasses.replace(config.network, width=width), widths=None)


def cut(weights: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """The part of each weight that a narrow network uses: views, with gradients.

    weights: of a backbone, by name; shapes: of the narrow one, by the same names. A part is the first entries along
    every dimension; of queries, keys and values (one dimension more, see `FirstHeads`) the first of each third.
    """
    parts = {}
    for name, shape in shapes.items():
        value = weights[name]
        if len(shape) > value.ndim:
            value = value.view(3, -1, *value.shape[1:])
        parts[name] = value[tuple(map(slice, shape))] if value.shape != shape else value
    return parts


@lru_cache(maxsize=64)
def narrow_shapes(config: ModelConfig, width: float) -> dict[str, Size]:
    """The shapes of the backbone's weights at `width`, by name."""
    return {name: value.shape for name, value in _without_values(config, width).backbone.named_parameters()}


def _without_values(config: ModelConfig, width: float) -> Model:
    with torch.device("meta"):
        return Model(narrow_config(dataclasses.replace(config, exits=None), width)).eval()


def weights_of(model: Model) -> dict[str, Tensor]:
    """The weights of its backbone, by their names in the uncompiled network. Raises ValueError if parameters were
    replaced by others (such as adapters), which cannot be cut."""
    found = plain_names(dict(model.backbone.named_parameters()), "the model")
    known = narrow_shapes(model.config, 1.0)
    odd = [name for name in known if name not in found or found[name].shape != known[name]]
    if odd := odd + sorted(set(found) - set(known)):
        raise ValueError(f"cannot narrow a model whose weights differ from its configuration: {', '.join(odd[:3])}")
    return found


def narrow(model: Model, width: float) -> Model:
    """The network of a slimmable model at `width`: the model itself at 1; otherwise the same object on every call for
    one width, with its weights brought up to date.

    Raises ValueError for a model that was not trained at `width`.
    """
    _check_widths(model, (width,), f"width {width:g}")
    return _narrow_networks(model).at(model, width)


@dataclasses.dataclass(frozen=True, eq=False)
class WidthChoice:
    """A `NetworkChoice`: each lane's width follows from its own time. Created by `width_choice`."""

    policy: Width
    networks: tuple[Network, ...]
    _widths: tuple[float, ...]  # of the model and of `networks`, descending
    _of: "_NarrowNetworks"
    _model: "ref[Model]"

    def choose(self, t: np.ndarray) -> np.ndarray:
        if (model := self._model()) is not None:
            self._of.refresh(model)
        found = self.policy.widths_at(t)
        return np.array([self._widths.index(width) for width in found.tolist()], dtype=np.int64)


def width_choice(model: Model, policy: Width) -> WidthChoice:
    """The `WidthChoice` of a policy; the same object for equal policies. Raises ValueError for a model that was not
    trained at these widths, and for a schedule that was searched for another network."""
    _check_widths(model, policy.widths, f"policy '{policy}'")
    if policy.network is not None and policy.network != network_of(model.config):
        raise ValueError(
            f"policy '{policy}' was found for another network than that of this model; `adadiff search MODEL --out "
            "FILE` finds one for it"
        )
    return _narrow_networks(model).choice(model, policy)


def network_of(config: ModelConfig) -> str:
    """Identifies the network that a width schedule belongs to: its configuration without exits, as JSON."""
    return json.dumps(dataclasses.replace(config, exits=None).to_dict(), sort_keys=True)


def _check_widths(model: Model, widths: tuple[float, ...], what: str) -> None:
    known = model.config.widths
    if known is None:
        raise ValueError(
            f"{what} needs a model that was trained at several widths, such as digits_slim; this one has the width 1"
        )
    if wrong := sorted(set(widths) - set(known)):
        trained = ", ".join(f"{width:g}" for width in known)
        raise ValueError(f"{what} asks for width {wrong[0]:g}; this model was trained at {trained}")


class _NarrowNetworks:
    """The narrow networks of one model. Holds no reference to the model, so that it can be freed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parameters: Parameters | None = None
        self._networks: dict[float, Model] = {}
        self._choices: OrderedDict[Width, WidthChoice] = OrderedDict()

    def at(self, model: Model, width: float) -> Model:
        if width == 1:
            return model
        self.refresh(model)
        with self._lock:
            if width not in self._networks:
                made = _without_values(model.config, width)
                made.config = dataclasses.replace(made.config, exits=model.config.exits)
                _fill(made, width, model)
                self._networks[width] = made
            return self._networks[width]

    def choice(self, model: Model, policy: Width) -> WidthChoice:
        widths = (1.0, *sorted(set(policy.widths) - {1.0}, reverse=True))
        networks = tuple(Network(self.at(model, width), asks=True) for width in widths[1:])
        with self._lock:
            if policy not in self._choices:
                self._choices[policy] = WidthChoice(policy, networks, widths, self, ref(model))
                while len(self._choices) > MOST_CHOICES:
                    self._choices.popitem(last=False)
            self._choices.move_to_end(policy)
            return self._choices[policy]

    def refresh(self, model: Model) -> None:
        """Updates the networks if weights of the model were replaced or moved, as by `model.to(device)`."""
        with self._lock:
            if self._parameters is None or self._parameters.moved():
                for width, network in self._networks.items():
                    _fill(network, width, model)
                self._parameters = Parameters(model)


@torch.inference_mode(False)  # a thread in another mode may use the network later
def _fill(network: Model, width: float, model: Model) -> None:
    """Gives a narrow network the weights of `model`."""
    weights = weights_of(model)
    shapes = narrow_shapes(model.config, width)
    for name, value in cut({name: value.detach() for name, value in weights.items()}, shapes).items():
        path, _, leaf = name.rpartition(".")
        parameter = weights[name] if value.shape == weights[name].shape else nn.Parameter(value, requires_grad=False)
        network.backbone.get_submodule(path)._parameters[leaf] = parameter
    for name, value in model.backbone.named_buffers():
        path, _, leaf = name.rpartition(".")
        network.backbone.get_submodule(path)._buffers[leaf] = value
    network.exits = model.exits


_known: WeakKeyDictionary[Model, _NarrowNetworks] = WeakKeyDictionary()
_known_lock = threading.Lock()


def _narrow_networks(model: Model) -> _NarrowNetworks:
    with _known_lock:
        return _known.setdefault(model, _NarrowNetworks())
