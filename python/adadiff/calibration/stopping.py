"""Choice of thresholds as an optimal stopping problem. Pure functions of a recording.

At one timestep, a sample that exits after block k costs error_k + price * macs_k. For the policy "exit at the first
layer with u_k < theta_k", thresholds are optimized layer by layer, from the last one back: with the later ones fixed,
the total cost over the recorded samples is piecewise constant in theta_k, and one sort gives every piece. Timesteps do
not interact, so a common price for all of them minimizes the summed error for the work spent.

A block is thus run if its expected gain exceeds its price. No model of the relation between u and the error is needed.

S timesteps, L layers, K = L - 1 exits before the last layer, n samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EVERYBODY = 2.0  # above every uncertainty
SWEEPS = 2
HALVINGS = 28  # bisections of the price, on a logarithmic scale over 24 decades
FEW = 0.01  # share of all exits below which a layer's UEM is not worth evaluating


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one lane: `exiting` float64 [L], of a pass that exits after each layer; `score`, of one UEM."""

    exiting: Tensor
    score: float

    @property
    def full(self) -> float:
        return float(self.exiting[-1])


def best_thresholds(
    u: Tensor,
    error: Tensor,
    work: Work,
    price: float,
    closed: Tensor | None = None,
    ranks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """u, error: [S, K, n], uncertainty after each layer and error of exiting there. closed: bool [K], layers without
    exits. ranks: u.sort(-1), if known. Returns theta float32 [S, K]; 0: no sample exits."""
    S, K, n = u.shape
    error = error.double()
    ranked, order = u.sort(-1) if ranks is None else ranks
    # theta = edges[m] lets the m least uncertain exit
    middles = (ranked[..., 1:] + ranked[..., :-1]) / 2
    edges = torch.cat([ranked.new_zeros(S, K, 1), middles, ranked.new_full((S, K, 1), EVERYBODY)], -1)
    theta = torch.zeros_like(edges[..., 0], dtype=torch.float32)
    for _ in range(SWEEPS):
        value = error.new_full((S, n), price * work.full)
        arrives = _arrivals(u, theta)
        for k in reversed(range(K)):
            exit_now = error[:, k] + price * float(work.exiting[k])
            asking = price * work.score * arrives[:, k].sum(-1, keepdim=True)
            gain = torch.where(arrives[:, k], exit_now - value, 0).gather(-1, order[:, k]).cumsum(-1) + asking
            best = torch.cat([gain.new_zeros(S, 1), gain], -1).argmin(-1)
            if closed is not None and bool(closed[k]):
                best = torch.zeros_like(best)
            theta[:, k] = edges[:, k].gather(-1, best[:, None])[:, 0]
            value = exit_now.where(u[:, k] < theta[:, k, None], value)
            value = value + (best > 0)[:, None] * price * work.score
    return theta


def mixed(share: float, low: float, high: float) -> float:
    """Fraction of samples that need a table of work `high`, the others having one of work `low`, for a mean of
    `share`."""
    return 1.0 if high <= low else min(max((share - low) / (high - low), 0.0), 1.0)


def exit_layers(u: Tensor, theta: Tensor) -> Tensor:
    """u: [S, K, n]; theta: [S, K]. Returns int64 [S, n], exit layers 1..L."""
    exits = torch.cat([u < theta[..., None], torch.ones_like(u[:, :1], dtype=torch.bool)], 1)
    return exits.int().argmax(1) + 1


def total(exit_layer: Tensor, error: Tensor, work: Work, asked: Tensor | None = None) -> tuple[float, float]:
    """exit_layer: [S, n]; error: [S, K, n]; asked: bool [K], layers whose UEM scores every sample that reaches them.
    Returns the error summed over timesteps and the share of the full network's work, both averaged over samples."""
    error = error.double()
    padded = torch.cat([error, torch.zeros_like(error[:, :1])], 1)
    lost = padded.gather(1, exit_layer[:, None] - 1)[:, 0]
    macs = work.exiting[exit_layer - 1]
    if asked is not None:
        passed = torch.cat([asked.double().cumsum(0), asked.double().sum(0, keepdim=True)])
        macs = macs + work.score * passed[exit_layer - 1]
    return float(lost.sum(0).mean()), float(macs.mean()) / work.full


def adaptive_table(u: Tensor, error: Tensor, work: Work, share: float) -> Tensor:
    """The best thresholds [S, K] whose work on these samples is at most `share` of the full network's, and close to it.
    Layers with hardly any exits are closed. Raises ValueError for a share below that of a single block."""

    error, ranks = error.double(), u.sort(-1)

    def solve(closed: Tensor | None) -> Tensor:
        def spend(price: float) -> tuple[float, Tensor]:
            theta = best_thresholds(u, error, work, price, closed, ranks)
            return total(exit_layers(u, theta), error, work, theta.amax(0) > 0)[1], theta

        return cheapest(spend, share, error, work)

    theta = solve(None)
    counts = torch.bincount(exit_layers(u, theta).flatten(), minlength=u.shape[1] + 2)[1:-1]
    closed = counts < FEW * counts.sum()
    return theta if not bool(closed.any()) or bool(closed.all()) else solve(closed)


def static_table(error: Tensor, work: Work, share: float, above: bool = True) -> Tensor:
    """The best exit layers by timestep alone, int64 [S], with the least work of at least `share` of the full network's
    or, with above=False, the most work of at most `share`."""
    mean = error.double().mean(-1)
    mean = torch.cat([mean, mean.new_zeros(len(mean), 1)], 1)  # [S, L]

    def spend(price: float) -> tuple[float, Tensor]:
        depth = (mean + price * work.exiting).argmin(1) + 1
        return float(work.exiting[depth - 1].mean()) / work.full, depth

    return cheapest(spend, share, error, work, above)


def cheapest(
    spend: Callable[[float], tuple[float, Tensor]], share: float, error: Tensor, work: Work, above: bool = False
) -> Tensor:
    """The table that `spend` returns for the price whose work comes closest to `share` from below or, with above=True,
    from above. Found by bisection, as work falls with the price. spend: price -> (share of work, table)."""
    unit = max(float(error.double().mean()), 1e-30) / work.full
    low, high = unit * 1e-12, unit * 1e12  # prices at which everything is run, and as little as possible
    generous, frugal = spend(0.0), spend(high)
    if share < frugal[0] * (1 - 1e-9):
        raise ValueError(f"the least that this network can run is {frugal[0]:.3f} of its work, got a budget of {share}")
    if share >= generous[0]:
        return generous[1]
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        candidate = spend(middle)
        if candidate[0] > share:
            low, generous = middle, candidate
        else:
            high, frugal = middle, candidate
    return generous[1] if above else frugal[1]


def _arrivals(u: Tensor, theta: Tensor) -> Tensor:
    """bool [S, K, n]: whether a sample reaches the exit after layer k."""
    stays = ~(u < theta[..., None])
    first = torch.ones_like(stays[:, :1])
    return torch.cat([first, stays[:, :-1]], 1).int().cumprod(1).bool()
