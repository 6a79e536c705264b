"""A model of a service: its engine, its class names or text encoder, and its decoder."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.handles import EngineFull
from ..forward.options import ExecutionOptions
from ..model import Model
from ..output.pictures import CHANNELS
from .allowed import forms_for
from .settings import Settings, check_name

Decode = Callable[[Tensor], Tensor]  # latents float [n, C, h, w] -> images float32 [n, 3, H, W], n may be 0
Encode = Callable[[list[str]], Tensor]  # prompts -> contexts float32 [n, N, E]


@dataclass(eq=False)
class _Turns:
    """Queue of requests for a text encoder."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


@dataclass(frozen=True, eq=False)
class ServedModel:
    """name: for clients. class_names: of all classes, or empty. encode: required for text-to-image models. decode:
    required for models that draw latents.

    Raises ValueError if these do not fit the engine's model.
    """

    name: str
    engine: Engine
    class_names: tuple[str, ...] = ()
    encode: Encode | None = None
    decode: Decode | None = None
    _encoder: _Turns = field(default_factory=_Turns, init=False, repr=False)

    def __post_init__(self) -> None:
        check_name("a model's name", self.name)
        config, channels = self.model.config, self.model.backbone.sample_shape[0]
        if self.class_names and len(self.class_names) != config.classes:
            raise ValueError(f"{self.name} has {config.classes} classes, got {len(self.class_names)} names")
        if config.network.context_tokens and self.encode is None:
            raise ValueError(f"{self.name} takes text; give a text encoder")
        if self.decode is None and channels not in CHANNELS:
            raise ValueError(f"{self.name} draws latents of {channels} channels; give a decoder")

    @staticmethod
    def open(
        name: str,
        model: Model,
        capacity: int | str = 64,
        queue: int = 256,
        execution: ExecutionOptions | None = None,
        *,
        shallow_model: Model | None = None,
        t_switch: float | None = None,
        admission: str = "arrival",
        **more: Any,
    ) -> "ServedModel":
        """Makes a `ServedModel` with a new engine. capacity, queue, execution, shallow_model, t_switch, admission: as
        in `Engine`; `more`: as in `ServedModel`. Raises ValueError if they do not fit the model."""
        options = {"shallow_model": shallow_model, "t_switch": t_switch, "admission": admission}
        engine = Engine(model, capacity, queue=queue, execution=execution, warm=True, **options)
        try:
            return ServedModel(name, engine, **more)
        except BaseException:
            engine.close(drain=False)
            raise

    @property
    def model(self) -> Model:
        return self.engine.model

    @property
    def takes_text(self) -> bool:
        return bool(self.model.config.network.context_tokens)

    @property
    def takes_guidance(self) -> bool:
        return self.takes_text or self.model.config.null_label is not None

    @cached_property
    def size(self) -> str:
        """WIDTHxHEIGHT of its pictures."""
        shape = self.model.backbone.sample_shape
        if self.decode is not None:
            shape = tuple(self.decode(torch.zeros(0, *shape, dtype=torch.float32, device="cpu")).shape[1:])
        return f"{shape[2]}x{shape[1]}"

    async def contexts(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Contexts of a prompt and of the empty prompt, float32 [N, E] each. Encoded in a thread, one prompt at a time,
        since an encoder uses all cores.

        Raises EngineFull if as many prompts are waiting as the engine's queue holds.
        """
        if self._encoder.waiting >= self.engine.queue:
            raise EngineFull(f"{self._encoder.waiting} prompts wait for the text encoder already")
        self._encoder.waiting += 1
        try:
            async with self._encoder.lock:
                text, null = await asyncio.to_thread(self.encode, [prompt, ""])
        finally:
            self._encoder.waiting -= 1
        return text, null

    def describe(self, settings: Settings, presets: Iterable[str], created: int) -> dict[str, Any]:
        """The model's entry in /v1/models. presets: names of the operator's policies that fit it."""
        config, calibration = self.model.config, self.model.calibration
        details = {
            "size": self.size,
            "takes": "text" if self.takes_text else "class_label" if config.classes else "nothing",
            "classes": config.classes,
            "class_names": list(self.class_names),
            "guidance": self.takes_guidance,
            "num_layers": self.model.num_layers,
            "shallow_layers": None if self.engine.shallow_model is None else self.engine.shallow_model.num_layers,
            "exits": self.model.exits is not None,
            "policies": [*forms_for(self.model), *presets],
            "calibrated_for": None
            if calibration is None
            else {
                "steps": calibration.steps,
                "solver": calibration.solver,
                "guidance_scale": calibration.guidance_scale,
                "shares": [budget.share for budget in calibration.budgets],
            },
            "num_inference_steps": settings.steps,
            "max_num_inference_steps": settings.max_steps,
            "max_n": settings.max_images,
            "max_guidance_scale": settings.max_guidance_scale,
            "max_partial_images": settings.max_partial_images,
            "capacity": self.engine.capacity,
        }
        return {"id": self.name, "object": "model", "created": created, "owned_by": "adadiff", "adadiff": details}
