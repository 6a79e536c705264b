"""One step of a diffusers transformer with random weights in which some samples reuse the residual of their later
blocks: with our cache, which decides for each sample, with diffusers' own, which decides for the batch, and a lower
bound.

Lower bound: the plain network's stem, first block and head on all rows, its later blocks on only the rows that run. The
samples that reuse are set beforehand, but our cache computes its gate all the same.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from adadiff.policies.reuse import ReuseContext, ReusePolicy

Call = Callable[[], object]
PLAIN, BATCH_FULL, BATCH_REUSED = "plain", "whole batch, full", "whole batch, reused"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the samples that reuse
LISTS = ("transformer_blocks", "single_transformer_blocks")
NEVER, ALWAYS = -1.0, 1e9  # thresholds of diffusers' cache


@dataclass(frozen=True)
class Shape:
    """A network and the sizes of its inputs. side: of the square latent, in patches; text: tokens of a prompt.
    batch_cache: whether diffusers' first-block cache supports this class."""

    name: str
    kind: str
    config: Mapping[str, Any]
    side: int
    text: int
    batch_cache: bool

    @property
    def blocks(self) -> int:
        return self.config["num_layers"] + self.config.get("num_single_layers", 0)

    def inputs(self, B: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a call, without the timestep."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(B, *shape, generator=generator).to(device, dtype)

        if self.kind == "FluxTransformer2DModel":
            given = {
                "hidden_states": normal(self.side**2, self.config["in_channels"]),
                "encoder_hidden_states": normal(self.text, self.config["joint_attention_dim"]),
                "pooled_projections": normal(self.config["pooled_projection_dim"]),
                "img_ids": torch.cartesian_prod(torch.arange(1), *[torch.arange(self.side)] * 2).to(device, dtype),
                "txt_ids": torch.zeros(self.text, 3, device=device, dtype=dtype),
            }
            return given | ({"guidance": normal().abs()} if self.config["guidance_embeds"] else {})
        side = self.side * self.config["patch_size"]
        return {
            "hidden_states": normal(self.config["in_channels"], side, side),
            "encoder_hidden_states": normal(self.text, self.config["caption_channels"]),
            "encoder_attention_mask": torch.ones(B, self.text, device=device, dtype=dtype),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    @property
    def most_time(self) -> float:
        return 1.0 if self.kind == "FluxTransformer2DModel" else 999.0


def flux(name: str, layers: int, single: int, heads: int, width: int, side: int, text: int, **more: Any) -> Shape:
    """width: channels of a head."""
    axes = [width // 8, *[(width - width // 8) // 2] * 2]
    config = {
        "num_layers": layers,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "attention_head_dim": width,
        "axes_dims_rope": axes,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        **more,
    }
    return Shape(name, "FluxTransformer2DModel", config, side, text, batch_cache=True)


def pixart(name: str, layers: int, heads: int, width: int, side: int, text: int, captions: int = 4096) -> Shape:
    config = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width,
        "cross_attention_dim": heads * width,
        "caption_channels": captions,
        "sample_size": 2 * side,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "use_additional_conditions": False,
    }
    return Shape(name, "PixArtTransformer2DModel", config, side, text, batch_cache=False)


@dataclass
class Given(ReusePolicy):
    """A policy that reuses where the caller says. reuse: bool [B] on the CPU, set before each call."""

    first: int = 1
    last: int = 0
    gate: str | None = "residual"
    reuse: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return self.reuse

    def __str__(self) -> str:
        return "given"


def who_reuses(B: int, share: float) -> Tensor:
    """bool [B]: share * B samples, spread over the batch."""
    ends = (torch.arange(B + 1, dtype=torch.float64) * share + 1e-9).floor()
    return ends.diff() > 0


class Step:
    """A network for B samples. calls: name -> call, the plain network's first; record: of our cache."""

    def __init__(self, shape: Shape, B: int, device: torch.device, dtype: torch.dtype):
        import diffusers
        from diffusers.hooks import FirstBlockCacheConfig

        import adadiff

        self.shape, self.B, self.device = shape, B, device
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                made = getattr(diffusers, shape.kind)(**shape.config)
        finally:
            torch.set_default_dtype(before)
        made.eval().requires_grad_(False)
        self._spread(made)
        self.given = shape.inputs(B, device, dtype)
        self._calls = count(1)
        self.plain = made
        self._reused, self.policy = _sharing(made), Given()
        self.calls: dict[str, Call] = {PLAIN: lambda: self.run(made)}
        with torch.inference_mode():
            self._stub, self._later = self._taken_apart(_sharing(made))
        if shape.batch_cache:
            for name, threshold in ((BATCH_FULL, NEVER), (BATCH_REUSED, ALWAYS)):
                module = _sharing(made)
                module.enable_cache(FirstBlockCacheConfig(threshold=threshold))
                self.calls[name] = lambda module=module: self._in_context(module)
        self.record = adadiff.enable(self._reused, self.policy)
        self.by_lane = {share: self._by_lane(share) for share in SHARES}
        self.calls |= {by_sample(share): call for share, call in self.by_lane.items()}
        self.calls |= {at_best(share): self._at_best(share) for share in SHARES}

    @staticmethod
    def _spread(module: nn.Module) -> None:
        """Makes modulation weights random, because blocks with zero gates would be the identity."""
        with torch.no_grad():
            for name, value in module.named_parameters():
                if "norm" in name and value.ndim == 2:
                    value.normal_(std=0.02)

    def time(self) -> Tensor:
        """Timesteps [B], slightly lower at each call, as within one run."""
        t = self.shape.most_time * (1 - 1e-6) ** next(self._calls)
        return torch.full((self.B,), t, dtype=torch.float32, device=self.device)

    def run(self, module: nn.Module) -> Tensor:
        with as_in_pipelines():
            return module(**self.given, timestep=self.time(), return_dict=False)[0]

    def _in_context(self, module: nn.Module) -> Tensor:
        with module.cache_context("step"):
            return self.run(module)

    def _by_lane(self, share: float) -> Call:
        mask = who_reuses(self.B, share)

        def call() -> Tensor:
            self.policy.reuse = mask
            return self.run(self._reused)

        return call

    def _at_best(self, share: float) -> Call:
        """The lower bound. All blocks of a list get the same inputs, as seconds do not depend on values."""
        running = (~who_reuses(self.B, share)).nonzero().flatten().to(self.device)
        if len(running) == self.B:
            return self.calls[PLAIN]
        pieces = []
        if len(running):
            pieces = [(block, *_rows(given, running, self.B)) for blocks, given in self._later for block in blocks]

        def call() -> Tensor:
            output = self.run(self._stub)
            with as_in_pipelines():
                for block, args, kwargs in pieces:
                    block(*args, **kwargs)
            return output

        return call

    def _taken_apart(self, module: nn.Module) -> tuple[nn.Module, list[tuple[list[nn.Module], Any]]]:
        """The network with all blocks but the first replaced by stubs that return a recorded output; and the replaced
        blocks of each list, with the inputs of the first."""
        later: list[tuple[list[nn.Module], Any]] = []
        noted: dict[str, tuple[Any, Any, Any]] = {}
        for number, name in enumerate(name for name in LISTS if hasattr(module, name)):
            blocks = getattr(module, name)
            replaced = blocks[1:] if number == 0 else blocks
            handle = replaced[0].register_forward_hook(_note(noted, name), with_kwargs=True)
            self.run(module)
            handle.remove()
            args, kwargs, output = noted[name]
            later.append((list(replaced), (args, kwargs)))
            for i in range(len(blocks) - len(replaced), len(blocks)):
                blocks[i] = Stub(output)
        return module, later

    def check(self, tolerance: float) -> None:
        """RuntimeError unless our cache gives the plain network's result without reuse, about the same with reuse (as
        inputs hardly change between calls), and runs the expected number of blocks."""
        with torch.inference_mode():
            wanted = self.calls[PLAIN]()
            for share, call in self.by_lane.items():
                got = call()
                error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
                if not error <= tolerance:
                    raise RuntimeError(f"{self.shape.name}, {share:.0%} reuse: off by {error:.1e}; not measured")
                ran, running = self.record.steps[-1].blocks, self.B - int(who_reuses(self.B, share).sum())
                if int(ran.sum()) != self.B + running * (self.shape.blocks - 1):
                    raise RuntimeError(f"{self.shape.name}, {share:.0%} reuse: ran {ran.tolist()} blocks")

    def blocks(self, share: float) -> int:
        """Number of blocks that run, over all samples."""
        running = self.B - int(who_reuses(self.B, share).sum())
        return self.B + running * (self.shape.blocks - 1)


@contextmanager
def as_in_pipelines() -> Iterator[None]:
    """The mode in which diffusers' pipelines call networks: no_grad, not inference mode, whatever the caller's mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Stub(nn.Module):
    """A block that always returns the same output."""

    def __init__(self, output: Any):
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output


def _note(noted: dict[str, tuple[Any, Any, Any]], name: str) -> Callable:
    def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        noted[name] = args, kwargs, output

    return hook


def _sharing(module: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers."""
    shared = {id(value): value for value in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _rows(given: Any, rows: Tensor, B: int) -> Any:
    """Nested arguments with tensors of B rows reduced to some of the rows."""
    if isinstance(given, Tensor):
        return given.index_select(0, rows) if given.ndim and len(given) == B else given
    if isinstance(given, Mapping):
        return {key: _rows(value, rows, B) for key, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(_rows(value, rows, B) for value in given)
    return given


def by_sample(share: float) -> str:
    """Name of the variant with our cache."""
    return f"by sample, {share:.0%} reuse"


def at_best(share: float) -> str:
    return f"at best, {share:.0%} reuse"
