"""UEMs refitted in closed form to the error of exiting.

A trained UEM mostly learns how errors differ between timesteps, which dominates its loss. A calibration has thresholds
for each timestep, and only needs to know which samples of one timestep lose least by exiting. This is fitted here on
recorded runs. For layer k, let x be a lane's hidden state after it, averaged over the patch tokens, and y the logarithm
of its error relative to the full network, standardized over all records:

    w_k    = argmin_w sum_(s, n) (y - mean_s y - w . (x - mean_s x))^2 + penalty_k |w|^2     within each timestep s
    a_sk   = mean_s y - w_k . mean_s x                         the time part of the UEM, a_k(t), is then fitted to it
    u      = mean over tokens of sigmoid(w_k . L + a_k(t))     the UEM's formula; about sigmoid of the expected y

|w|^2 is in units of each channel's spread. penalty_k is chosen from PENALTIES by two-fold cross-validation over lanes.
Only sums over lanes are kept, so memory does not grow with their number.

S steps, L layers, K = L - 1 exits before the last layer, D channels.
"""

import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..model import Model
from ..uem import STRETCHES, TIME_SPAN

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to each channel's sum of squares
LEAST = 1e-12  # errors are clamped to it before their logarithm is taken
SMOOTH = 1e-6  # penalty of the time part, relative to the mean square of its inputs


Products = tuple[Tensor, Tensor, Tensor]  # xx, xy, yy, see `Sums.within`


class Sums:
    """Sums over the added lanes, float64: n, x and y for each step; products over all steps, which share one w."""

    def __init__(self, K: int, D: int):
        self.n: list[int] = []  # an entry for each step
        self.x: list[Tensor] = []  # [K, D]
        self.y: list[Tensor] = []  # [K]
        zeros = partial(torch.zeros, dtype=torch.float64, device="cpu")
        self.xx, self.xy, self.yy = zeros(K, D, D), zeros(K, D), zeros(K)

    def add(self, step: int, x: Tensor, y: Tensor) -> None:
        """Adds n lanes at step number `step`: x [K, n, D], y [K, n]. Steps must be added in order."""
        if step == len(self.n):
            self.n.append(0)
            self.x.append(torch.zeros_like(self.xy))
            self.y.append(torch.zeros_like(self.yy))
        self.n[step] += x.shape[1]
        self.x[step] += x.sum(1)
        self.y[step] += y.sum(1)
        self.xx += x.mT @ x
        self.xy += (x.mT @ y[..., None])[..., 0]
        self.yy += y.square().sum(1)

    def __add__(self, other: "Sums") -> "Sums":
        both = Sums(*self.xy.shape)
        for name, ours in vars(self).items():
            its = getattr(other, name)
            value = [a + b for a, b in zip(ours, its, strict=True)] if isinstance(ours, list) else ours + its
            setattr(both, name, value)
        return both

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of lanes [S], and their means: x [S, K, D], y [S, K]."""
        n = torch.tensor(self.n, dtype=torch.float64, device="cpu")
        return n, torch.stack(self.x) / n[:, None, None], torch.stack(self.y) / n[:, None]

    def within(self) -> Products:
        """Sums of products of deviations from each step's means: xx [K, D, D], xy [K, D], yy [K]."""
        n, x, y = self.means()
        xx, xy = torch.einsum("s,skd,ske->kde", n, x, x), torch.einsum("s,skd,sk->kd", n, x, y)
        return self.xx - xx, self.xy - xy, self.yy - torch.einsum("s,sk,sk->k", n, y, y)


def ridge(within: Products, penalty: Tensor) -> Tensor:
    """Ridge regression of each layer. penalty: [K]. Returns w [K, D]."""
    xx, xy, _ = within
    spread = xx.diagonal(dim1=1, dim2=2)
    # constant channels get weight 0
    spread = spread.clamp(min=0).where(spread > 1e-12 * spread.amax(1, keepdim=True), 0)
    scale = torch.where(spread > 0, spread.rsqrt(), 0)
    matrix = scale[:, :, None] * xx * scale[:, None] + torch.diag_embed(penalty[:, None] + (spread == 0))
    return scale * torch.linalg.solve(matrix, scale * xy)


def held_out_error(within: Products, w: Tensor) -> Tensor:
    """float64 [K]: the residual sum of squares of w [K, D] on these products."""
    xx, xy, yy = within
    return yy - 2 * (w * xy).sum(1) + torch.einsum("kd,kde,ke->k", w, xx, w)


def fit(halves: tuple[Sums, Sums]) -> tuple[Tensor, Tensor]:
    """Fits both halves together, with penalties cross-validated between them. Returns w [K, D] and a [S, K]."""
    penalties = torch.tensor(PENALTIES, dtype=torch.float64, device="cpu")
    one, other = (half.within() for half in halves)
    losses = []
    for penalty in penalties[:, None].expand(-1, len(halves[0].yy)):
        losses.append(held_out_error(other, ridge(one, penalty)) + held_out_error(one, ridge(other, penalty)))
    both = halves[0] + halves[1]
    w = ridge(both.within(), penalties[torch.stack(losses).argmin(0)])
    _, x, y = both.means()
    return w, y - torch.einsum("kd,skd->sk", w, x)


class Refitting:
    """A visitor for `recording.record` that accumulates sums; `fitted` gives what `refitted` makes UEMs of."""

    def __init__(self, model: Model):
        self._t: list[float] = []
        self._halves = tuple(Sums(model.num_layers - 1, model.backbone.dim) for _ in range(2))

    def __call__(self, step: int, t: float, rows: Tensor, relative: Tensor) -> None:
        """Adds B lanes at step number `step`, time t: rows [K, B, D], hidden states averaged over patch tokens;
        relative [K, B]."""
        if step == len(self._t):
            self._t.append(t)
            seen = 0
        else:
            seen = sum(half.n[step] for half in self._halves)
        x, y = rows.double().cpu(), relative.double().cpu().clamp(min=LEAST).log()
        for i, half in enumerate(self._halves):
            part = slice((i + seen) % 2, None, 2)  # lanes alternate, independently of the batch size
            half.add(step, x[:, part], y[:, part])

    def fitted(self) -> dict[str, Tensor]:
        """t [S], the times of the steps; w [K, D] and a [S, K], for y in units of its spread over all records, from its
        mean; float64."""
        w, a = fit(self._halves)
        both = self._halves[0] + self._halves[1]
        count = sum(both.n) * len(w)
        centre = sum(both.y).sum() / count
        spread = (both.yy.sum() / count - centre**2).clamp(min=LEAST).sqrt()
        t = torch.tensor(self._t, dtype=torch.float64, device="cpu")
        return {"t": t, "w": w / spread, "a": (a - centre) / spread}


@torch.no_grad()
def refitted(model: Model, t: Tensor, w: Tensor, a: Tensor) -> Model:
    """A model with the UEMs that `Refitting` has fitted, and no calibration. It shares network and heads with `model`.
    All P outputs of a patch get the same weights; the last layer, whose UEM is not used, keeps its own."""
    shared = model.backbone, *(model.exits.heads or ())
    made = copy.deepcopy(model, {id(part): part for part in shared})
    made.calibration = None
    exits, K, bias = made.exits, len(w), a.mean(0)
    exits.weight[:K] = w[:, None].to(exits.weight)
    if exits.time_bias is not None:
        rising = t.argsort().numpy()
        ends = np.linspace(0, TIME_SPAN, STRETCHES + 1)
        curves = [np.interp(ends, t.numpy()[rising], a[rising, k].numpy()) for k in range(K)]
        bias = torch.zeros_like(bias)
        exits.time_bias[:, :K] = torch.from_numpy(np.stack(curves, 1))[..., None].to(exits.time_bias)
    if exits.time_weight is not None:
        tau = _embedded(made, t).double()  # [S, Dt]
        mean = tau.mean(0)
        centred = tau - mean
        kernel = centred @ centred.T  # [S, S], because S is much smaller than Dt
        kernel.diagonal().add_((SMOOTH * kernel.diagonal().mean()).clamp(min=LEAST))
        weight = torch.linalg.solve(kernel, a - bias).T @ centred  # [K, Dt]
        exits.time_weight[:K] = weight[:, None].to(exits.time_weight)
        bias = bias - weight @ mean
    exits.bias[:K] = bias[:, None].to(exits.bias)
    return made


def _embedded(model: Model, t: Tensor) -> Tensor:
    """The time embedding tau at t: [S], [S, Dt]."""
    S, device = len(t), model.device
    x = torch.zeros(S, *model.backbone.sample_shape, dtype=torch.float32, device=device)
    labels = torch.zeros(S, dtype=torch.int64, device=device) if model.config.classes else None
    return model.backbone.embed(x, t.float().to(device), labels)[1].time.cpu()
