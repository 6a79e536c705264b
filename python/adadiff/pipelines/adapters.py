"""Detects changes of peft's low-rank adapters, after which cached features of earlier steps are invalid.

peft's layers are recognised by their attributes; peft itself need not be installed.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

LAYER = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # attributes of peft's layers


class AdapterWatch:
    """Detects whether adapters were switched on or off, added, merged or rescaled since the previous call."""

    def __init__(self) -> None:
        self._loaded: Any = None
        self._layers: list[nn.Module] = []
        self._state: Any = None

    def changed(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> bool:
        """Whether adapters have changed; False at the first call. arguments: of the transformer's call, by name. Layers
        are searched only if the transformer's list of adapters has changed; without adapters this is cheap."""
        loaded = tuple(getattr(transformer, "peft_config", None) or ())
        if loaded != self._loaded:
            layers = [module for module in transformer.modules() if all(hasattr(module, name) for name in LAYER)]
            self._loaded, self._layers = loaded, layers
        before, self._state = self._state, (loaded, [_of(layer) for layer in self._layers], _scales(arguments))
        return before is not None and before != self._state


def _of(layer: nn.Module) -> tuple[Any, ...]:
    on, off, merged, scaling = (getattr(layer, name) for name in LAYER)
    return tuple(on), bool(off), tuple(merged), tuple(scaling.items())


def _scales(arguments: Mapping[str, Any]) -> list[Any]:
    """The adapter scales of this call, `attention_kwargs["scale"]` in diffusers."""
    options = [value for name, value in arguments.items() if name.endswith("attention_kwargs")]
    return [one.get("scale") for one in options if isinstance(one, Mapping)]
