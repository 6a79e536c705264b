"""Internals of diffusers and PyTorch that this package uses, and the versions they are known for: the one file to
review when these change."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

__all__ = [
    "CompileGuard",
    "ContextProbe",
    "HookRegistry",
    "Interceptor",
    "ModelHook",
    "block_refused",
    "calling_pipeline",
    "check_version",
    "transformer_refused",
]

VERSIONS = (0, 41), (0, 43)  # from (inclusive), to (exclusive); as in pyproject.toml


def check_version(version: str = diffusers.__version__) -> None:
    """Raises ImportError for a version of diffusers that is not supported."""
    low, high = VERSIONS
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        name = ".".join(map(str, low)), ".".join(map(str, high))
        raise ImportError(f"adadiff.enable needs diffusers >= {name[0]} and < {name[1]}, found {version}")


def calling_pipeline(transformer: nn.Module) -> Any:
    """The pipeline whose call is calling `transformer`; None outside such a call.

    Several pipelines may share a transformer, and its arguments do not tell which one calls. So this searches the stack
    for the innermost `__call__` of an object that has the transformer and a scheduler as attributes. Before Python 3.13
    the frame found keeps its local variables alive until it is inspected again, or ends.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            parts = getattr(owner, "__dict__", {})
            if "scheduler" in parts and any(part is transformer for part in parts.values()):
                return owner
        frame = frame.f_back
    return None


class Interceptor:
    """Replaces a module's call: `run(interceptor, args, kwargs)` runs instead; `call` is the original call.

    It uses the attribute that `nn.Module.compile` sets, ahead of `forward` and of every hook. So hooks that offload,
    cast or adapt weights may be added or removed at any time, and act when the module really runs. The module may be
    compiled before, or afterwards (`intact` then wraps the compiled call).
    """

    def __init__(self, module: nn.Module, run: Callable[["Interceptor", tuple, dict], Any], label: Any = None):
        self.module, self.run, self.label = module, run, label
        self.compiled: Callable | None = module._compiled_call_impl
        module._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, args, kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled or self.module._call_impl)(*args, **kwargs)

    def intact(self) -> None:
        """Reinstalls itself if the module was compiled since."""
        if self.module._compiled_call_impl is not self:
            self.compiled = self.module._compiled_call_impl
            self.module._compiled_call_impl = self

    def remove(self) -> None:
        if self.module._compiled_call_impl is self:
            self.module._compiled_call_impl = self.compiled

    def __deepcopy__(self, memo: dict) -> None:
        return None


class ContextProbe:
    """Records the name of the cache context that a pipeline is in, by wrapping `transformer.cache_context(name)`."""

    def __init__(self, module: nn.Module):
        self._module, self.name = module, ""

    @staticmethod
    def put(module: nn.Module) -> "ContextProbe":
        probe = ContextProbe(module)
        if hasattr(type(module), "cache_context"):
            module.cache_context = probe
        return probe

    @staticmethod
    def take(module: nn.Module) -> None:
        module.__dict__.pop("cache_context", None)

    @contextmanager
    def __call__(self, name: str, **settings: Any) -> Iterator[None]:
        before, self.name = self.name, name
        try:
            kind: Any = type(self._module)
            with kind.cache_context(self._module, name, **settings):
                yield
        finally:
            self.name = before


class CompileGuard:
    """Replaces `transformer.compile`, which would overwrite the transformer's interceptor; raises ValueError."""

    def __init__(self, module: nn.Module):
        self._module = module

    @staticmethod
    def put(module: nn.Module) -> None:
        module.compile = CompileGuard(module)

    @staticmethod
    def take(module: nn.Module) -> None:
        module.__dict__.pop("compile", None)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self._module._compiled_call_impl, Interceptor):
            raise ValueError("reuse is decided between blocks; compile only the blocks: compile_repeated_blocks()")
        type(self._module).compile(self._module, *args, **kwargs)


def _hooks(module: nn.Module) -> dict[str, ModelHook]:
    registry = getattr(module, "_diffusers_hook", None)
    return {} if registry is None else registry.hooks


def transformer_refused(transformer: nn.Module) -> str | None:
    """The reason why this transformer cannot skip blocks, or None. Cheap: checked at every call."""
    if transformer.training:
        return "it is in training mode; call eval() first"
    config = getattr(transformer, "_cache_config", None)
    if config is not None:
        return f"diffusers' {type(config).__name__} is enabled; call disable_cache() first"
    if getattr(transformer, "_parallel_config", None) is not None:
        return "its sequence is split over several devices"
    return None


CACHES = ("cache", "fbc_", "pyramid", "faster", "taylorseer")  # parts of names of cache hooks


def block_refused(blocks: Iterator[nn.Module]) -> str | None:
    """The reason why these blocks cannot be skipped as set up now, or None. Walks over all modules: once per run."""
    for block in blocks:
        for module in block.modules():
            for name, hook in _hooks(module).items():
                if any(part in name for part in CACHES):
                    return f"a hook {name!r} of another cache is on its blocks; remove it first"
                group = getattr(hook, "group", None)
                if group is not None and (group.stream is not None or (module is block and len(group.modules) > 1)):
                    return "group offloading fetches blocks ahead; use use_stream=False and num_blocks_per_group=1"
            processor = type(getattr(module, "processor", None)).__name__
            if "PAG" in processor or "Perturbed" in processor:
                return f"its {processor} works on thirds of the batch; disable perturbed-attention guidance"
    return None
