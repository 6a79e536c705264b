"""Tiny networks with exits, inputs for them, and what plain modules make of those, one sample at a time."""

import dataclasses
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from adadiff.config import ModelConfig
from adadiff.engine.engine import Engine, Handle
from adadiff.forward.options import ExecutionOptions
from adadiff.model import Model
from adadiff.models.dit import DiT, DiTConfig
from adadiff.models.mmdit import MMDiT, MMDiTConfig
from adadiff.models.pixart import PixArt, PixArtConfig
from adadiff.models.uvit import UViT, UViTConfig
from adadiff.sampling.sampler import sample
from adadiff.uem import PAPER, ExitConfig, Exits
from sampler.adaln import AdaLN

# T = 2 + 16 tokens, 7 blocks, heads of 16 channels: few powers of two
UVIT = UViTConfig(image_size=8, channels=3, patch=2, dim=48, depth=6, heads=3, num_classes=5)
# T = 9 tokens, heads of 12 channels, and a variance beside the noise
DIT = DiTConfig(image_size=6, channels=3, patch=2, dim=36, depth=5, heads=3, num_classes=5)
# products of bfloat16 rows of 4 x 36 on AMX let a NaN reach the row before (oneDNN issue 5717), of 4 x 48 they do not
DIT_NAN = dataclasses.replace(DIT, dim=48)
# 5 tokens of text, of 10 channels
PIXART = PixArtConfig(image_size=6, channels=3, patch=2, dim=36, depth=5, heads=3, context_tokens=5, context_dim=10)
# 4 tokens of text and a pooled one, 9 patches, of a grid of 5 x 5 positions
MMDIT = MMDiTConfig(6, 3, 2, dim=36, depth=4, heads=3, context_tokens=5, context_dim=10, pooled_dim=7, position_side=5)
BATCH = 13


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # [B, C, H, W]
    t: Tensor  # float [B], all different
    context: Tensor  # labels, int64 [B], or text, float [B, N, E]

    def __getitem__(self, lanes: Tensor | slice) -> "Inputs":
        return Inputs(self.x[lanes], self.t[lanes], self.context[lanes])

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.t, self.context


@dataclass(frozen=True)
class Case:
    """A network, its exits, inputs for BATCH lanes, and the plain results for them."""

    backbone: nn.Module
    exits: Exits
    given: Inputs
    predictions: Tensor  # [L, B, C, H, W]: the noise of every layer's head on every sample
    uncertainties: Tensor  # [L, B], float32 at least

    @property
    def num_layers(self) -> int:
        return len(self.predictions)

    def exiting(self, exit_layer: Tensor) -> Tensor:
        """exit_layer: [B]. The prediction of each sample at its own layer."""
        return self.predictions[exit_layer.long() - 1, torch.arange(len(exit_layer))]


def thresholds(c: Case) -> Tensor:
    """float [B]: each in the middle of the widest gap of its lane's uncertainties among the lower ones, so that no
    decision hangs on rounding."""
    u = c.uncertainties[:-1].sort(0).values
    gap, at = u.diff(dim=0)[:3].max(0)
    return u[at, torch.arange(u.shape[1])] + gap / 2


@cache
def case(kind: str, config: ExitConfig, dtype: torch.dtype, exact: bool = False) -> Case:
    """kind: of NETWORKS. exact: the weights of `dtype`, computed with in float64."""
    backbone, exits = network(kind, config, dtype)
    if exact:
        backbone, exits = backbone.double(), exits.double()
    given = inputs(backbone)
    rows = plain_layers(backbone, given)
    return Case(
        backbone,
        exits,
        given,
        plain_predictions(backbone, exits, given, rows),
        plain_uncertainties(backbone, exits, given, rows),
    )


NETWORKS = {
    "uvit": lambda: UViT(UVIT),
    "dit": lambda: DiT(DIT),
    "dit_nan": lambda: DiT(DIT_NAN),
    "adaln": AdaLN,
    "pixart": lambda: PixArt(PIXART),
    "mmdit": lambda: MMDiT(MMDIT),
}


def network(kind: str, config: ExitConfig, dtype: torch.dtype) -> tuple[nn.Module, Exits]:
    backbone = NETWORKS[kind]()
    exits = Exits(backbone, config)
    scramble(backbone, 0.15, seed=1)
    scramble(exits, 0.15, seed=2)
    return backbone.to(dtype).requires_grad_(False).eval(), exits.to(dtype).requires_grad_(False)


def scramble(module: nn.Module, scale: float, seed: int = 0) -> None:
    """Every parameter random: a fresh network has zero biases and unit norms, which hide mistakes."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=draw) * scale
            parameter.copy_(noise + 1 if parameter.ndim == 1 and bool((parameter == 1).all()) else noise)


def inputs(backbone: nn.Module, n: int = BATCH, seed: int = 0) -> Inputs:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *backbone.sample_shape, generator=draw)
    t = torch.linspace(3.25, 996.5, n)[torch.randperm(n, generator=draw)]
    if not isinstance(backbone, PixArt | MMDiT):
        return Inputs(x, t, torch.randint(4, (n,), generator=draw))
    config = backbone.config
    text = torch.randn(n, config.context_tokens, config.context_dim, generator=draw)
    text[1::2, 3:] = 0  # shorter ones, filled up
    return Inputs(x, t, text)


def plain_layers(backbone: nn.Module, given: Inputs) -> Tensor:
    """[L, B, T, D]: rows after every block, one sample at a time, by the network's own plain modules."""
    samples = [torch.stack(_layers(backbone, *given[slice(b, b + 1)].all)) for b in range(len(given.x))]
    return torch.cat(samples, 1)


def _layers(backbone: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> list[Tensor]:
    if isinstance(backbone, AdaLN):
        return backbone.layers(x, t, context)
    rows, cond = backbone.embed(x, t, context)
    outputs = []
    if isinstance(backbone, DiT | PixArt | MMDiT):
        for block in backbone.blocks:
            outputs.append(rows := block(rows, cond))
        return outputs
    for block in backbone.in_blocks:
        outputs.append(rows := block(rows))
    skips = outputs.copy()
    outputs.append(rows := backbone.mid_block(rows))
    for block in backbone.out_blocks:
        outputs.append(rows := block(rows, skip=skips.pop()))
    return outputs


def plain_predictions(backbone: nn.Module, exits: Exits, given: Inputs, rows: Tensor) -> Tensor:
    _, cond = backbone.embed(*given.all)
    lanes, C = torch.arange(len(given.x)), given.x.shape[1]
    heads = [backbone.head] * len(rows) if exits.heads is None else [*exits.heads, backbone.head]
    return torch.stack(
        [
            torch.cat(
                [head(layer[b : b + 1, backbone.num_prefix_tokens :], cond, lanes[b : b + 1])[:, :C] for b in lanes]
            )
            for head, layer in zip(heads, rows, strict=True)
        ]
    )


def plain_uncertainties(backbone: nn.Module, exits: Exits, given: Inputs, rows: Tensor) -> Tensor:
    """AdaDiff's Eq. 8 as it is printed, each token and the time embedding concatenated."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    _, cond = backbone.embed(*given.all)
    time = cond.time.to(rows.dtype)[:, None].expand(-1, backbone.tokens, -1)
    uncertainties = []
    for layer, tokens in enumerate(rows):
        weight = exits.weight[layer]
        if exits.time_weight is not None:
            weight, tokens = torch.cat([weight, exits.time_weight[layer]], 1), torch.cat([tokens, time], 2)
        silent = 0 if exits.config.every_token else backbone.num_prefix_tokens
        s = tokens[:, silent:] @ weight.to(rows.dtype).T + exits.bias[layer].to(rows.dtype)
        if exits.time_bias is not None:
            places = np.linspace(0, 1000, len(exits.time_bias))
            curves = [np.interp(given.t.double().numpy(), places, end) for end in exits.time_bias[:, layer].double().T]
            s = s + torch.from_numpy(np.stack(curves, 1)).to(rows.dtype)[:, None]
        uncertainties.append((1 / (1 + torch.exp(-s))).flatten(1).mean(1))
    return torch.stack(uncertainties)


# T = 2 + 4 tokens, 5 blocks: thousands of requests take seconds. The time embedding is a product per sample.
SERVED = ModelConfig(
    UViTConfig(image_size=4, channels=1, patch=2, dim=16, depth=4, heads=2, num_classes=4, mlp_time_embed=True),
    "linear",
    null_label=3,
    exits=PAPER,
)
SERVED_POLICIES = (
    *("full", "exit:0.4", "exit:0.55,min_layer=2", "exit:patience=0.5", "exit:depth=2", "exit:depth=3.4"),
    *("cache:threshold=0.5", "cache:threshold=0.4,gate=input+exit:0.42", "reuse:every=2+exit:depth=3"),
)
SERVED_SOLVERS = ("ddim", "ddim:0.6", "ddpm", "dpm++2m", "unipc:order=3", "heun")


@cache
def served(config: ModelConfig = SERVED) -> Model:
    made = Model(config).requires_grad_(False).eval()
    scramble(made.backbone, 0.3, seed=1)
    if made.exits is not None:
        scramble(made.exits, 0.3, seed=5)  # exits after every block
    return made


def requests(n: int, seed: int = 0, most: int = 5) -> list[dict]:
    """n requests to an engine of `served()`, of all kinds that there are; `most` steps each."""
    draw = random.Random(seed)
    made = []
    for _ in range(n):
        request = {
            "seed": draw.randrange(2**63),
            "steps": draw.randint(1, most),
            "solver": draw.choice(SERVED_SOLVERS),
            "policy": draw.choice(SERVED_POLICIES),
            "class_labels": draw.choice([None, 0, 1, 2]),
        }
        if draw.random() < 0.4:
            request |= {"guidance_scale": draw.uniform(1.5, 4), "tied": draw.random() < 0.5}
        if draw.random() < 0.2:
            image = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
            request |= {"init_image": image, "strength": draw.choice([0.2, 0.5, 1.0])}
        made.append(request)
    return made


def alone(request: dict, model: Model | None = None, batch_invariant: bool = True) -> tuple[Tensor, Tensor]:
    """The image [C, H, W] of one request and the exit layers of its steps, uint8 [made, 2], by `sample` of nothing
    else."""
    execution = ExecutionOptions(batch_invariant=batch_invariant)
    images, report = sample(model or served(), 1, batch=1, execution=execution, **request)
    exit_layer = report.exit_layer[:, 0]
    return images[0], exit_layer[exit_layer[:, 0] > 0]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def stepped(capacity: int = 4, **options: object) -> Engine:
    """An engine of `served()` that makes a step when a test says so, with the same bits in any company."""
    return Engine(
        served(), capacity, threaded=False, **{"execution": ExecutionOptions(batch_invariant=True), **options}
    )


def images_are_right(handles: list[Handle], wanted: list[dict]) -> None:
    for handle, request in zip(handles, wanted, strict=True):
        image, exit_layer = alone(request)
        assert torch.equal(handle.result(0), image)
        assert torch.equal(handle.report.exit_layer[:, 0], exit_layer)


def is_empty(engine: Engine) -> bool:
    """No slot is lost, and nobody is waiting."""
    report = engine.report
    return (report.waiting, report.running, engine._batch.free, engine._waiting.all()) == (0, 0, engine.capacity, [])
