"""Exits: the uncertainty estimation module (UEM) of every block, and the heads that turn its output into a prediction.

Two published forms of AdaDiff (Tang et al., ECCV 2024):
- paper, Eq. 8: u = sigmoid(w . [L, tau(t)] + b) per patch token, where tau is the network's time embedding. The time
  term is one number per lane, layer and output; `Exits.offsets` computes it for all layers at once.
- official code (libs/uvit.py, class LTE): a linear map to p*p*C *certainties*, independent of time, with one shared
  head. sigma(-s) = 1 - sigma(s), so negated weights give exactly the uncertainties (layouts.py converts them).
DuoDiff's (razvanmatisan/duodiff models/early_exit.py, MLPProbe): as the paper's, but independent of time, and the mean
includes prefix tokens.
Ours, "bias": the bias of every layer is a piecewise linear function of time, learnt at equally spaced times. So each
layer learns a curve over time, rather than a linear map of tau(t).

Heads may be added to a trained network: `Exits.copy_heads` starts each as a copy of the network's head, as EE-Tuning
does for language models (Pan et al. 2024, arXiv 2402.00518). A copy includes the variance channels of a DiT's head, and
is trained to keep the full network's variance (see training/losses.py).
"""

import copy
import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadiff_kernels import no_autocast

from .heads import HEADS
from .models.interface import Backbone


@dataclass(frozen=True)
class ExitConfig:
    map: bool = False  # True: an uncertainty per pixel and channel (P = p * p * C); False: per patch (P = 1)
    time: bool | str = True  # whether the UEM reads tau(t); "bias": its bias is a function of t
    shared_head: bool = False  # True: all layers use the network's head; False: layers 1..L-1 have one each
    every_token: bool = False  # u is the mean over all tokens (True), or over patches only
    head: str = "linear"  # of layers 1..L-1: "linear" as the network's (norm and linear map), or a key of HEADS

    def __post_init__(self) -> None:
        if self.time != "bias" and not isinstance(self.time, bool):
            raise ValueError(f"exits.time must be true, false or 'bias', got {self.time!r}")
        for name in ("map", "shared_head", "every_token"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"exits.{name} must be true or false, got {getattr(self, name)!r}")
        if self.head not in ("linear", *HEADS):
            raise ValueError(f"exits.head must be 'linear', 'mlp' or 'block', got {self.head!r}")
        if self.shared_head and self.head != "linear":
            raise ValueError(f"exits.head {self.head!r} needs a head for every layer; set shared_head to false")


TIME_SPAN, STRETCHES = 1000.0, 25  # range of the network's times in every schedule; intervals of "bias"

PAPER = ExitConfig()
OFFICIAL = ExitConfig(map=True, time=False, shared_head=True)
DUODIFF = ExitConfig(time=False, every_token=True)


class Exits(nn.Module):
    """Parameters of the UEMs, stacked over L layers, and the heads of layers 1..L-1 (layer L uses the network's)."""

    def __init__(self, backbone: Backbone, config: ExitConfig):
        super().__init__()
        L, P = len(backbone.blocks), backbone.patch_dim if config.map else 1
        self.config = config
        self.num_prefix_tokens = (
            0 if config.every_token else backbone.num_prefix_tokens
        )  # leading tokens excluded from the mean
        self.weight = nn.Parameter(torch.zeros(L, P, backbone.dim))
        self.bias = nn.Parameter(torch.zeros(L, P))
        self.time_weight = nn.Parameter(torch.zeros(L, P, backbone.time_dim)) if config.time is True else None
        self.time_bias = nn.Parameter(torch.zeros(STRETCHES + 1, L, P)) if config.time == "bias" else None
        self.heads = None
        if not config.shared_head:
            kind = HEADS.get(config.head)
            self.heads = nn.ModuleList(kind(backbone) if kind else backbone.new_head() for _ in range(L - 1))

    def offsets(self, time: Tensor, t: Tensor) -> Tensor:
        """The per-lane term of the scores, float32 [L, B, P]. time: [B, Dt], tau(t); t: float [B], the network's
        times."""
        if self.time_weight is not None:
            L, P, channels = self.time_weight.shape
            with no_autocast(time):
                weight, bias = self.time_weight.float().view(L * P, channels), self.bias.float().view(L * P)
                return F.linear(time.float(), weight, bias).view(-1, L, P).transpose(0, 1)
        bias = self.bias.float()[:, None]  # [L, 1, P]
        if self.time_bias is None:
            return bias.expand(-1, len(time), -1)
        position = t.float().clamp(0, TIME_SPAN) * (STRETCHES / TIME_SPAN)
        below = position.long().clamp(max=STRETCHES - 1)
        share = (position - below)[:, None, None]
        ends = self.time_bias.float()
        return bias + (ends[below] * (1 - share) + ends[below + 1] * share).transpose(0, 1)

    @property
    def outputs(self) -> int:
        """P, the number of score outputs per token."""
        return self.weight.shape[1]

    def head(self, backbone: Backbone, layer: int) -> nn.Module:
        """The head of lanes that exit after block `layer`, 1..L; called like the network's `head`."""
        if self.heads is None or layer == len(self.weight):
            return backbone.head
        return self.heads[layer - 1]

    @torch.no_grad()
    def heads_by_lane(self, patches: Tensor, cond: object, lanes: Tensor, layer: Tensor) -> Tensor:
        """Each lane through the head of its layer, without host synchronisation: [B, C or 2 C, H, W].

        patches: [B, N, D] of lanes: int32 [B]; layer: int32 [B]; results of lanes at layer L are undefined. Copies the
        head's weights for every lane; with head "block" these are as many as B blocks have.
        """
        index = (layer - 1).clamp(0, len(self.heads) - 1)
        by_lane = {name: values.index_select(0, index) for name, values in self._stacked_heads().items()}
        shape = _of_this_thread(self.heads[0])

        def head(parameters: dict[str, Tensor], rows: Tensor, lane: Tensor) -> Tensor:
            return torch.func.functional_call(shape, parameters, (rows[None], cond, lane[None]))[0]

        return torch.vmap(head)(by_lane, patches, lanes)

    def _stacked_heads(self) -> dict[str, Tensor]:
        """Parameters of the heads of layers 1..L-1, stacked to [L - 1, ...]. Not cached: edits through `.data` could
        not be detected, and `heads_by_lane` copies more than this for 64 lanes."""
        named = [dict(head.named_parameters()) for head in self.heads]
        return {name: torch.stack([head[name] for head in named]) for name in named[0]}

    def macs(self, tokens: int) -> int:
        """Multiply-adds of one layer's score for one lane. tokens: in the mean."""
        return self.weight.shape[1] * self.weight.shape[2] * tokens

    def head_macs(self, patches: int) -> int:
        """Multiply-adds for one lane by which a head of layers 1..L-1 exceeds the network's head."""
        kind = HEADS.get(self.config.head)
        return kind.macs(self.weight.shape[2], patches) if kind else 0

    @torch.no_grad()
    def copy_heads(self, backbone: Backbone) -> None:
        """Makes every head a copy of the network's head; no effect if the head is shared.

        Raises ValueError, with nothing changed, if `new_head` has a parameter that the network's head does not have.
        """
        source = backbone.head if isinstance(backbone.head, nn.Module) else backbone
        values = source.state_dict()
        heads = [head.out if isinstance(head, tuple(HEADS.values())) else head for head in self.heads or ()]
        for key, value in heads[0].state_dict().items() if heads else ():
            if key not in values or values[key].shape != value.shape:
                raise ValueError(f"the network's own head has no {key} of shape {tuple(value.shape)} to copy")
        for head in heads:
            head.load_state_dict({key: values[key] for key in head.state_dict()})


_shapes = threading.local()


def _of_this_thread(head: nn.Module) -> nn.Module:
    """A copy of the module for this thread, without values: `functional_call` temporarily puts parameters into a
    module, which other threads would see."""
    known: WeakKeyDictionary[nn.Module, nn.Module] = _shapes.__dict__.setdefault("of", WeakKeyDictionary())
    if head not in known:
        values = {id(value): torch.empty_like(value, device="meta") for value in (*head.parameters(), *head.buffers())}
        known[head] = copy.deepcopy(head, memo=values)
    return known[head]
