"""Exits: the uncertainty estimation module (UEM) of every block, and the heads that turn a block's output into noise.

Two published readings of AdaDiff (Tang et al., ECCV 2024):
- paper, Eq. 8: u = sigmoid(w . [L, tau(t)] + b) per patch token, tau being the network's own time embedding. The time
  part is one number per lane, layer and output; `Exits.offsets` computes it for all layers at once.
- official code (libs/uvit.py, class LTE): a linear map to p*p*C *certainties*, blind to time, with one shared head.
  sigma(-s) = 1 - sigma(s), so negated weights give exactly the uncertainties (layouts.py reads them so).
And a third, DuoDiff's (razvanmatisan/duodiff models/early_exit.py, MLPProbe): as the paper's, blind to time, and the
mean runs over the extra tokens, too.
Ours, "bias": a bias for every layer and stretch of time, whose ends the network's times interpolate. What is to be
learnt of time is then a curve for each layer, and not what a linear map of tau(t) can say.

Heads may be added to a finished network: `Exits.copy_heads` starts each as a copy of the network's own, as EE-Tuning
does for language models (Pan et al. 2024, arXiv 2402.00518). A copy has the variance channels of a DiT's head, too, and
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
    map: bool = False  # one uncertainty per patch (P = 1), or one per pixel and channel (P = p * p * C)
    time: bool | str = True  # the UEM also reads tau(t); or not; or "bias": its bias is a function of t
    shared_head: bool = False  # every layer uses the network's own head, or layers 1..L-1 have one each
    every_token: bool = False  # u is the mean over all tokens, or over patches only
    head: str = "linear"  # of layers 1..L-1: as the network's own (norm and linear map), or one behind what HEADS names

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


TIME_SPAN, STRETCHES = 1000.0, 25  # every schedule tells the network times in [0, 1000]

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
        )  # leading tokens that have no say
        self.weight = nn.Parameter(torch.zeros(L, P, backbone.dim))
        self.bias = nn.Parameter(torch.zeros(L, P))
        self.time_weight = nn.Parameter(torch.zeros(L, P, backbone.time_dim)) if config.time is True else None
        self.time_bias = nn.Parameter(torch.zeros(STRETCHES + 1, L, P)) if config.time == "bias" else None
        self.heads = None
        if not config.shared_head:
            kind = HEADS.get(config.head)
            self.heads = nn.ModuleList(kind(backbone) if kind else backbone.new_head() for _ in range(L - 1))

    def offsets(self, time: Tensor, t: Tensor) -> Tensor:
        """time: [B, Dt], tau(t); t: float [B], the network's times. Returns what the score adds per lane, float32
        [L, B, P]."""
        if self.time_weight is not None:
            L, P, channels = self.time_weight.shape
            with no_autocast(time):
                weight, bias = self.time_weight.float().view(L * P, channels), self.bias.float().view(L * P)
                return F.linear(time.float(), weight, bias).view(-1, L, P).transpose(0, 1)
        bias = self.bias.float()[:, None]  # [L, 1, P]
        if self.time_bias is None:
            return bias.expand(-1, len(time), -1)
        place = t.float().clamp(0, TIME_SPAN) * (STRETCHES / TIME_SPAN)
        below = place.long().clamp(max=STRETCHES - 1)
        share = (place - below)[:, None, None]
        ends = self.time_bias.float()
        return bias + (ends[below] * (1 - share) + ends[below + 1] * share).transpose(0, 1)

    @property
    def outputs(self) -> int:
        """P, of the score per token."""
        return self.weight.shape[1]

    def head(self, backbone: Backbone, layer: int) -> nn.Module:
        """What a sample exiting after block `layer` takes, called like the network's own `head`."""
        if self.heads is None or layer == len(self.weight):
            return backbone.head
        return self.heads[layer - 1]

    @torch.no_grad()
    def heads_by_lane(self, patches: Tensor, cond: object, lanes: Tensor, layer: Tensor) -> Tensor:
        """Each lane through the head of its own layer, without the host knowing which: [B, C or 2 C, H, W].

        patches: [B, N, D] of the lanes i32 [B]; layer: i32 [B]; what lanes at layer L get is of no use. Holds a copy of
        its head for every lane, which for "block" are as many weights as B blocks have.
        """
        index = (layer - 1).clamp(0, len(self.heads) - 1)
        own = {name: values.index_select(0, index) for name, values in self._stacked_heads().items()}
        shape = _of_this_thread(self.heads[0])

        def head(parameters: dict[str, Tensor], rows: Tensor, lane: Tensor) -> Tensor:
            return torch.func.functional_call(shape, parameters, (rows[None], cond, lane[None]))[0]

        return torch.vmap(head)(own, patches, lanes)

    def _stacked_heads(self) -> dict[str, Tensor]:
        """Every parameter of the heads of layers 1..L-1, [L - 1, ...]. Nothing is kept: nobody can tell whether weights
        were edited through `.data`, and `heads_by_lane` copies more than this for 64 lanes."""
        named = [dict(head.named_parameters()) for head in self.heads]
        return {name: torch.stack([head[name] for head in named]) for name in named[0]}

    def macs(self, tokens: int) -> int:
        """Multiply-adds of one layer's score for one lane, of which so many tokens have a say."""
        return self.weight.shape[1] * self.weight.shape[2] * tokens

    def head_macs(self, patches: int) -> int:
        """Multiply-adds of the head of layers 1..L-1 beyond those of the network's own, for one lane."""
        kind = HEADS.get(self.config.head)
        return kind.macs(self.weight.shape[2], patches) if kind else 0

    @torch.no_grad()
    def copy_heads(self, backbone: Backbone) -> None:
        """Every head becomes a copy of the network's own; without effect where it is shared.

        Raises ValueError, with nothing changed, where `new_head` names a parameter that the network's head has not.
        """
        own = backbone.head if isinstance(backbone.head, nn.Module) else backbone
        values = own.state_dict()
        heads = [head.out if isinstance(head, tuple(HEADS.values())) else head for head in self.heads or ()]
        for key, value in heads[0].state_dict().items() if heads else ():
            if key not in values or values[key].shape != value.shape:
                raise ValueError(f"the network's own head has no {key} of shape {tuple(value.shape)} to copy")
        for head in heads:
            head.load_state_dict({key: values[key] for key in head.state_dict()})


_shapes = threading.local()


def _of_this_thread(head: nn.Module) -> nn.Module:
    """A copy without values: `functional_call` puts parameters into a module for a while, where others would see
    them."""
    known: WeakKeyDictionary[nn.Module, nn.Module] = _shapes.__dict__.setdefault("of", WeakKeyDictionary())
    if head not in known:
        values = {id(value): torch.empty_like(value, device="meta") for value in (*head.parameters(), *head.buffers())}
        known[head] = copy.deepcopy(head, memo=values)
    return known[head]
