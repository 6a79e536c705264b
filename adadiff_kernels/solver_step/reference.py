"""One step of any linear solver, with one row of coefficients per sample, looked up by the sample's own step index.

    m    = px x + pe eps
    next = base b + cur m + m0 h[0] + m1 h[1] + m2 h[2] + noise exp(spread (v + 1) / 2) z
    h <- (m, h[0], h[1]) where `push`,  x <- next,  b <- next where `end`

x is the input of the network, eps its prediction, b the state at the start of the (macro-)step, h the last m that were
pushed, newest first (a shift register).
With px = 0, pe = 1, m is eps (DDIM, DDPM); with px = 1/alpha, pe = -sigma/alpha, m is the predicted x0 (DPM-Solver++).
v in [-1, 1] is a learned variance (DDPM, learned range), -1 where there is none.
All in float32.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adadiff_kernels.philox import philox_normal

HISTORY = ("m0", "m1", "m2")
COLUMNS = ("px", "pe", "base", "cur", "noise", "spread", *HISTORY)


@dataclass(frozen=True)
class SolverState:
    """What a solver keeps of each sample between network evaluations.

    x: [n, ...]; base: [n, ...], or None where every row ends its macro-step (b is x); history: [n, H, ...], H from 1 to
    3, as far as the rows reach back, or None where no row reads or stores h. Contiguous, of one dtype (float32 for
    solver_step) and device; otherwise ValueError.

    A coefficient of 0 still multiplies h, which therefore must be finite: `start` and `restart` set it to zeros.
    """

    x: Tensor
    base: Tensor | None = None
    history: Tensor | None = None

    def __post_init__(self) -> None:
        x, shape = self.x, self.x.shape
        for name, value in (("x", x), ("base", self.base), ("history", self.history)):
            if value is None:
                continue
            wanted = shape if name != "history" else (*shape[:1], self.held, *shape[1:])
            if value is not x and (value.shape != wanted or value.dtype != x.dtype or value.device != x.device):
                raise ValueError(
                    f"{name} must be {x.dtype}{list(wanted)} on {x.device}, "
                    f"got {value.dtype}{list(value.shape)} on {value.device}"
                )
            if not value.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")

    @property
    def held(self) -> int:
        """H, the number of earlier m kept per sample, at most 3; 0 without history."""
        return 0 if self.history is None else min(max(*self.history.shape[1:2], 1), len(HISTORY))

    def _all(self) -> tuple[Tensor | None, ...]:
        return self.x, self.base, self.history

    @staticmethod
    def start(x: Tensor, base: bool = True, history: int = len(HISTORY)) -> "SolverState":
        """A new state that starts at a copy of x: [n, ...], with or without base, with `history` entries of h."""
        x = x.clone(memory_format=torch.contiguous_format)
        zeros = x.new_zeros(len(x), history, *x.shape[1:]) if history else None
        return SolverState(x, x.clone() if base else None, zeros)

    def take(self, slots: Tensor) -> "SolverState":
        """A copy of the samples at slots: int64[k]."""
        return SolverState(*[value if value is None else value.index_select(0, slots) for value in self._all()])

    def put(self, slots: Tensor, part: "SolverState") -> None:
        """Writes back a `part` returned by `take`, after it has been advanced."""
        for whole, value in zip(self._all(), part._all(), strict=True):
            if whole is not None:
                whole.index_copy_(0, slots, value)

    def restart(self, slots: Tensor, x: Tensor) -> None:
        """Starts new samples x: [k, ...] at slots: int64[k]."""
        self.x[slots] = x
        if self.base is not None:
            self.base[slots] = x
        if self.history is not None:
            self.history[slots] = 0


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance for some samples: eps + weight (eps - uncond[row]); row -1 leaves eps as it is.

    uncond: [g, C, ...]; row: int64 [n] in [-1, g); weight: float32 [n], `guidance_scale` - 1; channels: int64 [n], the
    number of leading channels that are guided (None: all). Raises ValueError for other shapes or dtypes.
    """

    uncond: Tensor
    row: Tensor
    weight: Tensor
    channels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.row.dtype != torch.int64 or self.row.dim() != 1 or self.weight.shape != self.row.shape:
            raise ValueError(
                f"guidance must be row int64 [n] and weight [n], got {self.row.dtype} {list(self.row.shape)} and "
                f"{list(self.weight.shape)}"
            )
        if self.weight.dtype != torch.float32 or not self.uncond.is_floating_point():
            raise ValueError(
                f"weight must be float32 and uncond floating point, got {self.weight.dtype} and {self.uncond.dtype}"
            )
        _check_channels(self.channels, self.row)

    def take(self, samples: Tensor) -> "Guidance":
        """The guidance of samples: int64 [k]."""
        channels = None if self.channels is None else self.channels[samples]
        return Guidance(self.uncond, self.row[samples], self.weight[samples], channels)

    def apply(self, eps: Tensor) -> Tensor:
        """eps: [n, ...]. Returns the guided prediction, float32 [n, ...]."""
        eps, uncond = eps.float(), self.uncond.index_select(0, self.row.clamp(min=0))
        guided = (self.row >= 0).view(-1, *[1] * (eps.dim() - 1))
        return torch.where(guided, guide(eps, uncond, self.weight, self.channels), eps)


@dataclass(frozen=True)
class Noise:
    """How `philox_normal` draws z for each sample. seeds, step: int64 [n]; stream: in [0, 2^32)."""

    seeds: Tensor
    step: Tensor
    stream: int

    def __post_init__(self) -> None:
        for name, value in (("seeds", self.seeds), ("step", self.step)):
            if value.dtype != torch.int64 or value.shape != (self.seeds.shape[0],):
                raise ValueError(f"{name} must be int64 [{len(self.seeds)}], got {value.dtype} {list(value.shape)}")
        if not 0 <= self.stream < 2**32:
            raise ValueError(f"stream must lie in [0, 2^32), got {self.stream}")

    def take(self, samples: Tensor) -> "Noise":
        """The noise of samples: int64 [k]."""
        return Noise(self.seeds[samples], self.step[samples], self.stream)

    def draw(self, count: int, device: torch.device) -> Tensor:
        """z: float32 [n, count], on `device`."""
        return philox_normal(self.seeds, self.step, self.stream, count, device)


@dataclass(frozen=True)
class StepRows:
    """One row of solver coefficients per sample.

    coefficients: [n, 9] in the order of COLUMNS; push: bool[n], m is pushed to h; end: bool[n], the macro-step ends.
    Facts known on the host that save work (the defaults are always correct; others change no result):
    data: some m is not eps. history: the number of newest entries of h that these samples ever read; 0 where no row
    reads or stores h. inner: some row does not end its macro-step. noise: some row adds noise.
    Raises ValueError for other shapes or dtypes.
    """

    coefficients: Tensor
    push: Tensor
    end: Tensor
    data: bool = True
    history: int = len(HISTORY)
    inner: bool = True
    noise: bool = True

    def __post_init__(self) -> None:
        n = self.coefficients.shape[0]
        if self.coefficients.shape != (n, len(COLUMNS)) or self.push.shape != (n,) or self.end.shape != (n,):
            raise ValueError(
                f"rows must be coefficients [n, {len(COLUMNS)}], push [n], end [n], got "
                f"{[list(t.shape) for t in (self.coefficients, self.push, self.end)]}"
            )
        if self.push.dtype != torch.bool or self.end.dtype != torch.bool:
            raise ValueError(f"push and end must be bool, got {self.push.dtype} and {self.end.dtype}")

    def take(self, samples: Tensor) -> "StepRows":
        """The rows of samples: int64[k]."""
        taken = (v[samples] for v in (self.coefficients, self.push, self.end))
        return replace(self, **dict(zip(("coefficients", "push", "end"), taken, strict=True)))


def solver_step_reference(
    state: SolverState, eps: Tensor, rows: StepRows, z: Tensor | None = None, variance: Tensor | None = None
) -> SolverState:
    """The formula above, for all samples, out of place and in the state's dtype. Returns the new state."""
    x, one = state.x, (-1, *[1] * (state.x.dim() - 1))
    px, pe, base, cur, noise, spread, *older = (c.view(one) for c in rows.coefficients.to(x.dtype).unbind(1))
    b = x if state.base is None else state.base
    h = () if state.history is None else state.history.unbind(1)
    z = torch.zeros_like(x) if z is None else z
    v = torch.full_like(x, -1) if variance is None else variance.to(x.dtype)

    m = px * x + pe * eps.to(x.dtype)
    new = base * b + cur * m + noise * torch.exp(spread * (v + 1) / 2) * z
    for coefficient, kept in zip(older, h, strict=False):
        new = new + coefficient * kept
    pushed = [torch.where(rows.push.view(one), newer, kept) for newer, kept in zip((m, *h), h, strict=False)]
    return SolverState(
        new,
        None if state.base is None else torch.where(rows.end.view(one), new, b),
        torch.stack(pushed, 1) if pushed else None,
    )


def solver_step_pytorch(
    state: SolverState,
    eps: Tensor,
    rows: StepRows,
    slots: Tensor | None = None,
    z: Tensor | None = None,
    variance: Tensor | None = None,
    guidance: Guidance | None = None,
    noise: Noise | None = None,
) -> None:
    """`solver_step` in PyTorch, on any device."""
    n = len(eps)
    if n == 0:
        return
    if guidance is not None:
        eps = guidance.apply(eps)
    if noise is not None and rows.noise:
        z = noise.draw(state.x[:1].numel(), state.x.device)
    px, pe, base, cur, amount, spread, *older = rows.coefficients[:, :, None].unbind(1)  # [n, 1] each

    def mine(tensor: Tensor | None, *shape: int) -> Tensor | None:
        if tensor is None:
            return None
        return (tensor if slots is None else tensor.index_select(0, slots)).view(*shape)

    x: Tensor = mine(state.x, n, -1)
    b, h = mine(state.base, n, -1), mine(state.history, n, state.held, -1) if rows.history else None
    eps = eps.float().reshape(n, -1)
    m = (px * x).addcmul_(pe, eps) if rows.data else eps
    torch.mul(x if b is None else b, base, out=x)
    for k in range(rows.history):
        x.addcmul_(older[k], h[:, k])
    x.addcmul_(cur, m)
    if rows.noise:
        if variance is not None:
            amount = amount * torch.exp(spread * (variance.float().reshape(n, -1) + 1) / 2)
        x.addcmul_(amount, z.reshape(n, -1))
    for k in reversed(range(rows.history)):
        torch.where(rows.push[:, None], h[:, k - 1] if k else m, h[:, k], out=h[:, k])
    if b is not None:
        torch.where(rows.end[:, None], x, b, out=b)
    if slots is not None:
        for whole, part in ((state.x, x), (state.base, b), (state.history, h)):
            if whole is not None and part is not None:
                whole.index_copy_(0, slots, part.view(n, *whole.shape[1:]))


def check_step(
    state: SolverState,
    eps: Tensor,
    rows: StepRows,
    slots: Tensor | None,
    z: Tensor | None,
    variance: Tensor | None,
    guidance: Guidance | None,
    noise: Noise | None,
) -> None:
    """ValueError where shapes or dtypes do not fit, or where the rows need noise, base or history that is missing."""
    n = state.x.shape[0] if slots is None else slots.shape[0]
    if state.x.dtype != torch.float32 or rows.coefficients.dtype != torch.float32:
        raise ValueError(f"state and coefficients must be float32, got {state.x.dtype} and {rows.coefficients.dtype}")
    if rows.push.shape[0] != n:
        raise ValueError(f"{len(rows.push)} rows of coefficients for {n} samples")
    if z is not None and noise is not None:
        raise ValueError("z and noise give the same values in two ways; give one of them")
    if rows.noise and z is None and noise is None:
        raise ValueError("a row adds noise, but z is None; draw it where the noise coefficient is not 0")
    if noise is not None and noise.seeds.shape[0] != n:
        raise ValueError(f"noise must have a seed and a step for each of {n} samples, got {len(noise.seeds)}")
    if guidance is not None and (guidance.row.shape[0] != n or guidance.uncond.shape[1:] != state.x.shape[1:]):
        raise ValueError(
            f"guidance must have {n} rows and uncond {['g', *state.x.shape[1:]]}, got {len(guidance.row)} and "
            f"{list(guidance.uncond.shape)}"
        )
    if rows.history > state.held:
        raise ValueError(
            f"a row reaches back {rows.history} predictions, but the state has {state.held}; start it with "
            f"history={rows.history}"
        )
    if rows.inner and state.base is None:
        raise ValueError("a row does not end its step, but the state has no base; start it with base=True")
    for name, value in (("eps", eps), ("z", z), ("variance", variance)):
        if value is not None and value.shape != (n, *state.x.shape[1:]):
            raise ValueError(
                f"{name} must be {[n, *state.x.shape[1:]]}, as the samples to step, got {list(value.shape)}"
            )
    if not eps.is_floating_point():
        raise ValueError(f"eps must be floating point, got {eps.dtype}")
    if z is not None and z.dtype != torch.float32:
        raise ValueError(f"z must be float32, got {z.dtype}")


def guide(cond: Tensor, uncond: Tensor, weight: Tensor, channels: Tensor | None = None) -> Tensor:
    """Classifier-free guidance, cond + weight (cond - uncond); weight 0 means none: w in equation 6 of Ho and Salimans,
    arXiv 2207.12598.

    cond, uncond: [n, C, ...], weight: [n]; channels: int64 [n], the number of leading channels that are guided; the
    others stay cond's (DiT, models.py, guides three). Returns float32 [n, C, ...]. Raises ValueError for other shapes.
    """
    if cond.shape != uncond.shape or weight.shape != cond.shape[:1]:
        raise ValueError(
            f"cond and uncond must be [n, ...] and weight [n], got {list(cond.shape)}, {list(uncond.shape)}, "
            f"{list(weight.shape)}"
        )
    _check_channels(channels, weight)
    cond, one = cond.float(), [1] * (cond.dim() - 1)
    guided = torch.addcmul(cond, weight.float().view(-1, *one), cond - uncond.float())
    if channels is None:
        return guided
    chosen = torch.arange(cond.shape[1], device=cond.device) < channels[:, None]
    return torch.where(chosen.view(*chosen.shape, *one[1:]), guided, cond)


def _check_channels(channels: Tensor | None, like: Tensor) -> None:
    if channels is not None and (channels.dtype != torch.int64 or channels.shape != like.shape):
        raise ValueError(f"channels must be int64 {list(like.shape)}, got {channels.dtype} {list(channels.shape)}")
