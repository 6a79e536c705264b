"""Exits: the uncertainty estimation module (UEM) of every block, and the heads that turn a block's output into noise.

Two published readings of AdaDiff (Tang et al., ECCV 2024):
- paper, Eq. 8: u = sigmoid(w . [L, tau(t)] + b) per patch token, tau being the network's own time embedding. The time
  part is one number per lane, layer and output; `Exits.offsets` computes it for all layers at once.
- official code (libs/uvit.py, class LTE): a linear map to p*p*C *certainties*, blind to time, with one shared head.
  sigma(-s) = 1 - sigma(s), so negated weights give exactly the uncertainties (layouts.py reads them so).
And a third, DuoDiff's (razvanmatisan/duodiff models/early_exit.py, MLPProbe): as the paper's, blind to time, and the
mean runs over the extra tokens, too.

Heads may be added to a finished network: `Exits.copy_heads` starts each as a copy of the network's own, as EE-Tuning
does for language models (Pan et al. 2024, arXiv 2402.00518).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adadiff_kernels import Score, layer_norm, no_autocast, residual_uem

from .models.interface import Backbone


@dataclass(frozen=True)
class ExitConfig:
    map: bool = False  # one uncertainty per patch (P = 1), or one per pixel and channel (P = p * p * C)
    time: bool = True  # the UEM also reads tau(t)
    shared_head: bool = False  # every layer uses the network's own head, or layers 1..L-1 have one each
    every_token: bool = False  # u is the mean over all tokens, or over patches only
    head: str = "linear"  # of layers 1..L-1: as the network's own (norm and linear map), or "mlp", one behind an MLP

    def __post_init__(self) -> None:
        for name in ("map", "time", "shared_head", "every_token"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"exits.{name} must be true or false, got {getattr(self, name)!r}")
        if self.head not in ("linear", "mlp"):
            raise ValueError(f"exits.head must be 'linear' or 'mlp', got {self.head!r}")
        if self.shared_head and self.head == "mlp":
            raise ValueError("exits.head 'mlp' needs a head for every layer; set shared_head to false")


PAPER = ExitConfig()
OFFICIAL = ExitConfig(map=True, time=False, shared_head=True)
DUODIFF = ExitConfig(time=False, every_token=True)


class MlpHead(nn.Module):
    """A head behind a residual MLP: out(x + fc2(gelu(fc1(norm(x))))), hidden width D; called like the network's own.

    fc2 starts at zero, so that it begins as the head without the MLP.
    """

    def __init__(self, backbone: Backbone):
        super().__init__()
        D = backbone.dim
        self.norm = nn.LayerNorm(D)
        self.fc1, self.fc2 = nn.Linear(D, D), nn.Linear(D, D)
        self.out = backbone.new_head()
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, patches: Tensor, cond: object = None, lanes: Tensor | None = None) -> Tensor:
        return self.out(patches + self.fc2(F.gelu(self.fc1(self.norm(patches)))), cond, lanes)


class Exits(nn.Module):
    """Parameters of the UEMs, stacked over L layers, and the heads of layers 1..L-1 (layer L uses the network's)."""

    def __init__(self, backbone: Backbone, config: ExitConfig):
        super().__init__()
        L, P = len(backbone.blocks), backbone.patch_outputs if config.map else 1
        self.config = config
        self.extras = 0 if config.every_token else backbone.extras  # leading tokens that have no say
        self.weight = nn.Parameter(torch.zeros(L, P, backbone.dim))
        self.bias = nn.Parameter(torch.zeros(L, P))
        self.time_weight = nn.Parameter(torch.zeros(L, P, backbone.time_dim)) if config.time else None
        self.heads = None
        if not config.shared_head:
            mlp = config.head == "mlp"
            self.heads = nn.ModuleList(MlpHead(backbone) if mlp else backbone.new_head() for _ in range(L - 1))

    def offsets(self, time: Tensor) -> Tensor:
        """time: [B, Dt]. Returns what the score adds per lane, float32 [L, B, P]."""
        bias = self.bias.float()[:, None]  # [L, 1, P]
        if self.time_weight is None:
            return bias.expand(-1, len(time), -1)
        with no_autocast(time):
            return torch.einsum("lpd,bd->lbp", self.time_weight.float(), time.float()) + bias

    def score(self, layer: int, offsets: Tensor) -> Score:
        """The UEM after block `layer` (1..L), for the fused pass."""
        return Score(self.weight[layer - 1], offsets[layer - 1], self.extras)

    def head(self, backbone: Backbone, layer: int) -> nn.Module:
        """What a sample leaving after block `layer` takes, called like the network's own `head`."""
        if self.heads is None or layer == len(self.weight):
            return backbone.head
        return self.heads[layer - 1]

    def heads_by_lane(self, patches: Tensor, cond: object, lanes: Tensor, layer: Tensor) -> Tensor:
        """Each lane through the head of its own layer, without the host knowing which: [B, C or 2 C, H, W].

        patches: [B, T - extras, D] of the lanes i32 [B]; layer: i32 [B]; what lanes at layer L get is of no use.
        """
        index = (layer - 1).clamp(0, len(self.heads) - 1)
        heads = [dict(head.named_parameters()) for head in self.heads]
        own = {name: torch.stack([head[name] for head in heads]).index_select(0, index) for name in heads[0]}

        def head(parameters: dict[str, Tensor], rows: Tensor, lane: Tensor) -> Tensor:
            return torch.func.functional_call(self.heads[0], parameters, (rows[None], cond, lane[None]))[0]

        return torch.vmap(head)(own, patches, lanes)

    def macs(self, tokens: int) -> int:
        """Multiply-adds of one layer's score for one lane, of which so many tokens have a say."""
        return self.weight.shape[1] * self.weight.shape[2] * tokens

    def head_macs(self, patches: int) -> int:
        """Multiply-adds of the head of layers 1..L-1 beyond those of the network's own, for one lane."""
        return 2 * self.weight.shape[2] ** 2 * patches if self.config.head == "mlp" else 0

    @torch.no_grad()
    def copy_heads(self, backbone: Backbone) -> None:
        """Every head becomes a copy of the network's own; without effect where it is shared.

        Raises ValueError, with nothing changed, where `new_head` names a parameter that the network's head has not.
        """
        own = backbone.head if isinstance(backbone.head, nn.Module) else backbone
        values = own.state_dict()
        heads = [head.out if isinstance(head, MlpHead) else head for head in self.heads or ()]
        for key, value in heads[0].state_dict().items() if heads else ():
            if key not in values or values[key].shape != value.shape:
                raise ValueError(f"the network's own head has no {key} of shape {tuple(value.shape)} to copy")
        for head in heads:
            head.load_state_dict({key: values[key] for key in head.state_dict()})


def all_layers(
    backbone: Backbone, exits: Exits, x: Tensor, t: Tensor, context: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Every layer's noise [B, C, H, W] and uncertainties [B, T - extras, P]; differentiable, for training.

    The UEMs read detached rows, as in the official code, so that their loss cannot bend the network; under autocast
    they and their sigmoid stay in float32. Raises ValueError for exits that score every token: they come trained, and
    there is no target for a token that is not a patch.
    """
    if exits.config.every_token:
        raise ValueError("exits that score every token (DuoDiff's) are for inference; train others")
    rows, cond = backbone.begin(x, t, context)
    lanes = torch.arange(len(x), dtype=torch.int32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        offsets = exits.offsets(cond.time.detach())
    outputs, predictions, scores = [], [], []
    for layer, block in enumerate(backbone.blocks, start=1):
        if block.skip_from is not None:
            rows = block.join(rows, outputs[block.skip_from])
        for branch in block.branches:
            h = layer_norm(rows, branch.norm(cond), lanes)
            # the fused pass of a GPU has no gradient
            rows, _, _ = residual_uem(rows, branch(h), lanes=lanes, gate=branch.gate(cond), backend="reference")
        outputs.append(rows)
        patches = rows[:, backbone.extras :]
        predictions.append(exits.head(backbone, layer)(patches, cond, lanes)[:, : x.shape[1]])
        with torch.autocast(rows.device.type, enabled=False):
            s = F.linear(patches.detach().float(), exits.weight[layer - 1].float()) + offsets[layer - 1][:, None]
            scores.append(torch.sigmoid(s))
    return predictions, scores
