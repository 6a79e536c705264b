"""Low-rank adapters of peft: which are on, and how strongly. What lanes have kept of earlier steps was made with them.

Layers of peft are known by the attributes that they have; peft itself need not be installed.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

LAYER = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # what peft's layers have


class AdapterWatch:
    """Tells whether adapters are others than at the call before: switched on or off, added, merged, or scaled."""

    def __init__(self) -> None:
        self._loaded: Any = None
        self._layers: list[nn.Module] = []
        self._state: Any = None

    def changed(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> bool:
        """False at the first call. arguments: of the transformer's call, by name. Layers are looked for where the
        transformer's list of adapters has changed; without any, this costs nothing."""
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
    """Of this call alone: diffusers multiplies adapters by `attention_kwargs["scale"]`."""
    given = [value for name, value in arguments.items() if name.endswith("attention_kwargs")]
    return [one.get("scale") for one in given if isinstance(one, Mapping)]
