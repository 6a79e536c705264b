"""A diffusers pipeline for our models, with diffusers' ways of saving, loading and calling. Needs diffusers."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..checkpoint import unwrapped
from ..config import ModelConfig
from ..diffusion.tables import Solver
from ..forward.forward import run_forward
from ..forward.output import ForwardOutput
from ..model import Model
from ..output.pictures import to_pixels
from ..policies.calibrated import Calibration
from ..policies.interface import ExitPolicy
from ..policies.spelling import DEFAULT
from ..policies.step_selector import AUTO, StepSelector
from ..sampling.batch import Batch
from ..sampling.params import SamplingParams
from ..sampling.records import PassRecord, RunRecord
from ..sampling.reports import Report
from ..sampling.sample_batch import SampleBatch, whole
from ..sampling.sampler import check_finite
from ..weights import apart, plain_names
from .latents import decode
from .text import TextEncoder

OUTPUTS = ("pil", "np", "pt", "latent")
Callback = Callable[["AdaDiffPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]


class AdaDiffTransformer(ModelMixin, ConfigMixin):
    """A `Model` as a pipeline component. model_config, calibration, step_selector: from their `to_dict`.

    The step selector's few weights are stored in the configuration, since it keeps its own device and dtype.
    `AdaDiffPipeline` attaches it to the model, since diffusers constructs this class without values while loading."""

    @register_to_config
    def __init__(
        self,
        model_config: Mapping[str, Any],
        calibration: Mapping[str, Any] | None = None,
        step_selector: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.model = Model(ModelConfig.from_dict(model_config))
        self.model.calibration = None if calibration is None else Calibration.from_dict(calibration)

    @staticmethod
    def of(model: Model) -> "AdaDiffTransformer":
        """A component that shares the weights of `model`."""
        calibration = None if model.calibration is None else model.calibration.to_dict()
        selector = None if model.step_selector is None else model.step_selector.to_dict()
        with torch.device("meta"):
            made = AdaDiffTransformer(model.config.to_dict(), calibration, selector)
        made.model = model
        return made.eval()

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        """The state dict for `save_pretrained`: with names of an uncompiled model, and shared weights duplicated."""
        return apart(plain_names(super().state_dict(*arguments, **options), "the transformer"))

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor | None = None, *, network: Model | None = None, **options: Any
    ) -> ForwardOutput:
        """One forward pass, see `adadiff.forward.forward.run_forward`. network: runs instead of `model`, with whose
        weights it shares memory (a narrow one)."""
        return run_forward(self.model if network is None else network, x, t, context, **options)


@dataclass
class AdaDiffPipelineOutput(BaseOutput):
    images: list[Image.Image] | np.ndarray | Tensor
    report: Report


class AdaDiffPipeline(DiffusionPipeline):
    """A diffusers pipeline for our models, with policies per sample. transformer: also a `Model`, as from
    `adadiff.load`; vae: for latent models; tokenizer, text_encoder: for text models (CLIP ViT-L/14)."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "tokenizer", "text_encoder"]  # noqa: RUF012 (diffusers reads it from the class)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: AdaDiffTransformer | Model,
        vae: AutoencoderKL | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
    ):
        super().__init__()
        if not isinstance(transformer, AdaDiffTransformer):
            transformer = AdaDiffTransformer.of(unwrapped(transformer))
        selector = transformer.config.step_selector
        if selector is not None and transformer.model.step_selector is None:
            transformer.model.step_selector = StepSelector.from_dict(selector)
        self.register_modules(transformer=transformer, vae=vae, tokenizer=tokenizer, text_encoder=text_encoder)
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """Whether to stop; set `_interrupt` in a callback to stop after that step, with the images of that step."""
        return self._interrupt

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Raises ValueError: it moves weights when a module is called, but the engine reads some without calling it."""
        raise ValueError("the engine reads weights outside module calls; use enable_model_cpu_offload")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str = "",
        num_images: int | None = None,
        num_inference_steps: int | str = 50,
        guidance_scale: float = 1.0,
        solver: str | Solver = "ddim",
        policy: str | ExitPolicy = DEFAULT,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> AdaDiffPipelineOutput | tuple[Any, Report]:
        """Draws one image for each label or prompt, or num_images if the model takes neither.

        num_inference_steps: network evaluations, or "auto" for a model with a step selector (then without callback,
        since images end at different steps). guidance_scale: 1 means none.
        solver, policy, and further settings (thresholds, tied, guidance_interval, ...): see `SamplingParams`.
        generator: one for all or one per image; each image's seed is drawn from it, so equal generators give equal
        images. output_type: "pil", "np" (float32 [n, H, W, C] in [0, 1]), "pt" ([n, C, H, W] in [0, 1]), "latent" (the
        samples themselves, nominally in [-1, 1], or latents). callback_on_step_end(pipe, step, t, {"latents": ...}) is
        called after each whole solver step (step: index of its last evaluation, from 0; t: its time); it may return
        {"latents": ...} to continue from, replace the mapping's entry, or edit it in place. Returns images and a
        `Report`.
        Raises ValueError for invalid arguments, before any work, and FloatingPointError as `sample` does.
        """
        model: Model = self.transformer.model
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
        if model.config.latent_scale is not None and output_type != "latent":
            if self.vae is None:
                raise ValueError("this model makes latents: give the pipeline a vae, or ask for output_type='latent'")
            nothing = torch.zeros(0, *model.backbone.sample_shape, dtype=torch.float32, device="cpu")
            self._finish(nothing, "pt")  # only for its checks
        if model.config.network.context_tokens and prompt is None and "text_embeds" not in settings:
            raise ValueError("this model takes text: give prompt")
        if set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callbacks may ask for latents, got {list(callback_on_step_end_tensor_inputs)}")
        if num_inference_steps != AUTO:
            whole("num_inference_steps", num_inference_steps, 1)
        elif callback_on_step_end is not None:
            raise ValueError(f"images end at different steps with num_inference_steps={AUTO!r}; leave the callback out")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        n = _count(class_labels, prompts, num_images)
        params = SamplingParams.of(
            None,
            {
                "seed": _seeds(generator, n),
                "steps": num_inference_steps,
                "solver": solver,
                "policy": policy,
                "class_labels": class_labels,
                "guidance_scale": guidance_scale,
                **self._texts(prompts, negative_prompt, guidance_scale != 1),
                **settings,
            },
        )
        samples = SampleBatch.of(model, n, params)
        if samples.draft is not None:
            raise ValueError(f"policy '{samples.parts}' draws with two models; it is for `sample` and `Engine`")
        if samples.parts.width is not None and model.device != self._execution_device:
            raise ValueError(f"policy '{samples.parts}': narrow networks share weights that offloading would move")
        if callback_on_step_end is not None:
            for what, values in (("steps", samples.steps), ("strengths", samples.first)):
                if len(values.unique()) > 1:
                    raise ValueError(f"images of different {what} end at different steps; leave the callback out")
        try:
            images, report = self._run(samples, callback_on_step_end)
            _, error = check_finite(torch.arange(n, device="cpu"), images, samples.seeds)
            if error is not None:
                raise error
            images = self._finish(images, output_type)
        finally:  # also after an error, move offloaded weights back
            self.maybe_free_model_hooks()
        return AdaDiffPipelineOutput(images, report) if return_dict else (images, report)

    def _texts(self, prompts: Sequence[str] | None, negative: str, guided: bool) -> dict[str, Tensor]:
        if prompts is None:
            return {}
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError("prompts take a tokenizer and a text_encoder in the pipeline")
        encode = TextEncoder(self.tokenizer, self.text_encoder)
        return {"text_embeds": encode(prompts), **({"null_text_embeds": encode([negative])[0]} if guided else {})}

    def _run(self, samples: SampleBatch, callback: Callback | None) -> tuple[Tensor, Report]:
        @torch.inference_mode(False)  # else hooks would turn weights into inference tensors when they move them
        def forward(network: Model, *args: Any, **options: Any) -> ForwardOutput:
            return self.transformer(*args, network=network, **options)  # a module call runs the hooks that move weights

        model: Model = self.transformer.model
        # the device is given, since offloaded weights are moved to it only when they are called
        batch = Batch(model, samples.n, forward=forward, device=self._execution_device)
        slots = batch.admit(samples, np.arange(samples.n))
        sample = np.empty_like(slots)
        sample[slots] = np.arange(samples.n)
        reuses = samples.parts.reuse is not None
        steps, ticks = int(samples.steps.max()), int((samples.steps - samples.first).max())
        table = samples.solver.table(model.schedule, steps)
        times, ends = table.t.tolist()[steps - ticks :], table.end.tolist()[steps - ticks :]
        results = RunRecord(steps, samples.n, model.num_layers, samples.record_scores, reuses)

        def learn(records: Iterable[PassRecord]) -> None:
            for record in records:
                results.add(record, sample[record.slots])

        self._interrupt, started = False, time.perf_counter()
        with self.progress_bar(total=ticks) as bar:
            for step, (t, end) in enumerate(zip(times, ends, strict=True)):
                tick = batch.tick()
                if tick.failed:
                    raise next(iter(tick.failed.values()))
                learn(tick.records)
                if callback is not None and end:
                    given = {"latents": batch.peek(slots)}
                    returned = callback(self, step, t, given)
                    batch.replace(slots, _latents(given, returned))
                bar.update()
                if self._interrupt:
                    break
        learn(batch.flush())
        report = results.report(batch.totals, time.perf_counter() - started)
        return batch.take(slots), report

    def _finish(self, images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "latent":
            return images
        config = self.transformer.model.config
        if config.latent_scale is not None:
            images = decode(images, self.vae, config.latent_scale, config.latent_shift)
        if output_type == "pil":
            return [Image.fromarray(to_pixels(image)) for image in images]
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _latents(given: Mapping[str, Any], returned: object) -> Tensor:
    """The latents to continue from after a callback: those it returned, else those in the mapping it was given."""
    if returned is not None and not isinstance(returned, Mapping):
        raise ValueError(f"callback_on_step_end returns None or a mapping such as {{'latents': ...}}, got {returned!r}")
    latents = (returned or {}).get("latents", given.get("latents"))
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents of a callback must be a tensor, got {latents!r}")
    return latents


def _count(labels: Sequence[int] | None, prompts: Sequence[str] | None, num_images: int | None) -> int:
    try:
        counts = {len(given) for given in (labels, prompts) if given is not None} | ({num_images} - {None})
    except TypeError:
        raise ValueError(f"class_labels must be a list, one per image, got {labels!r}") from None
    if len(counts) > 1:
        raise ValueError(f"class_labels, prompt and num_images disagree on how many images: {sorted(counts)}")
    n = counts.pop() if counts else 1
    whole("num_images", n, 1)
    return n


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, n: int) -> Tensor:
    """A seed for each image, int64 [n] in [0, 2^63)."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**63 - 1, (n,), generator=generator, device=device).cpu()
    if not isinstance(generator, Sequence) or len(generator) != n:
        raise ValueError(f"generator must be one or a list of {n}, one per image, got {generator!r}")
    return torch.cat([_seeds(one, 1) for one in generator])
