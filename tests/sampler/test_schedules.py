"""Schedules and grids against diffusers, and against the formulas of their papers in numpy's float64."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from adadiff.diffusion.schedules import NAMES, NoiseSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

DISCRETE = ("linear", "cosine", "stable_diffusion")
DIFFUSERS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "stable_diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}


def alpha_bar_in_numpy(name: str) -> np.ndarray:
    i = np.arange(1000, dtype=np.float64)
    if name == "linear":
        beta = 1e-4 + (0.02 - 1e-4) * i / 999
    elif name == "stable_diffusion":
        beta = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2
    else:
        f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
        beta = np.array([min(1 - f[t + 1] / f[t], 0.999) for t in range(1000)])
    return np.exp(np.cumsum(np.log1p(-beta)))


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_tables(name: str) -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t, alpha_bar = NoiseSchedule(name).training_times(u)
    np.testing.assert_allclose(alpha_bar.numpy(), alpha_bar_in_numpy(name), rtol=1e-11)
    theirs = DDPMScheduler(**DIFFUSERS[name]).alphas_cumprod.double()  # a float32 cumulative product
    torch.testing.assert_close(alpha_bar, theirs, rtol=1e-4, atol=1e-6)
    first = 1 if name == "stable_diffusion" else 0  # U-ViT, train_ldm_discrete.py: n in 1..1000
    assert t.tolist() == list(range(first, first + 1000))


def test_the_training_index_is_floor_of_1000_u() -> None:
    u = torch.tensor([[0.0, 0.000999999, 0.001], [0.4999999, 0.5, math.nextafter(1, 0)]], dtype=torch.float64)
    t, alpha_bar = NoiseSchedule("linear").training_times(u)
    assert t.tolist() == [[0, 0, 1], [499, 500, 999]]
    np.testing.assert_allclose(alpha_bar.numpy(), alpha_bar_in_numpy("linear")[t.long().numpy()], rtol=1e-11)


def test_vp_is_the_integral_of_its_beta() -> None:
    """U-ViT, sde.py: beta(t) = 0.1 + 19.9 t, alpha_bar = exp(-its integral from 0 to t), network at 999 t."""
    u = torch.tensor([0.0, 0.001, 0.25, 0.5, 0.999], dtype=torch.float64)
    t, alpha_bar = NoiseSchedule("vp").training_times(u)
    assert t.tolist() == (999 * u).tolist()
    for time, value in zip(u.tolist(), alpha_bar.tolist(), strict=True):
        middles = (np.arange(1000) + 0.5) / 1000 * time  # the midpoint rule is exact for a linear beta
        assert value == pytest.approx(math.exp(-np.mean(0.1 + 19.9 * middles) * time), rel=1e-12)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_are_those_of_diffusers_for_every_step_count(name: str, spacing: str) -> None:
    schedule, table = NoiseSchedule(name), alpha_bar_in_numpy(name)
    kind = DPMSolverMultistepScheduler if spacing == "linspace" else DDIMScheduler
    theirs = kind(timestep_spacing=spacing, **DIFFUSERS[name])
    shift = 1 if name == "stable_diffusion" else 0
    # all counts once, where diffusers is fast enough; else primes, ties of round() (26, 48), both ends
    counts = range(1, 1001) if (name, kind) == ("linear", DDIMScheduler) else (1, 2, 7, 26, 48, 50, 61, 999)
    for steps in counts:
        theirs.set_timesteps(steps)
        # numpy.arange gives one timestep too many (-1) at some counts, e.g. 61
        index = theirs.timesteps.numpy()[:steps]
        t, alpha_bar = schedule.grid(steps, spacing)
        assert t.tolist() == (index + shift).tolist(), steps
        assert alpha_bar.dtype == torch.float64
        np.testing.assert_allclose(alpha_bar[:-1].numpy(), table[index], rtol=1e-11)
        assert alpha_bar[-1] == 1


@pytest.mark.parametrize("steps", [2, 3, 10, 28, 50, 75, 250, 334, 999, 1000])
def test_respacing_is_that_of_improved_diffusion(steps: int) -> None:
    """respace.py, space_timesteps: fractional strides summed up, each sum rounded (half to even: 499.5 at 3 steps)."""
    taken, place = [], 0.0
    for _ in range(steps):
        taken.append(round(place))
        place += 999 / (steps - 1)
    t, alpha_bar = NoiseSchedule("linear").grid(steps, "respaced")
    assert t.tolist() == taken[::-1]
    np.testing.assert_allclose(alpha_bar[:-1].numpy(), alpha_bar_in_numpy("linear")[taken[::-1]], rtol=1e-11)
    assert alpha_bar[-1] == 1


def test_dit_is_published_with_these_timesteps() -> None:
    t = NoiseSchedule("linear").grid(250, "respaced")[0].tolist()
    assert (t[:2], t[-4:]) == ([999, 995], [12, 8, 4, 0])
    theirs = DDPMScheduler(timestep_spacing="linspace", **DIFFUSERS["linear"])  # another way to the same numbers
    theirs.set_timesteps(250)
    assert t == theirs.timesteps.tolist()


@pytest.mark.parametrize("name", DISCRETE)
def test_between_timesteps_the_logarithm_is_linear(name: str) -> None:
    schedule, first = NoiseSchedule(name), 1 if name == "stable_diffusion" else 0
    knots = np.arange(1000) + first
    t = np.concatenate([knots, np.linspace(first, 999 + first, 777)])
    expected = np.interp(t, knots, np.log(alpha_bar_in_numpy(name)))
    np.testing.assert_allclose(schedule.log_alpha_bar(torch.from_numpy(t)).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if NoiseSchedule(name).has_alpha_bar])
def test_time_is_the_inverse(name: str) -> None:
    schedule = NoiseSchedule(name)
    begin, end = schedule.times
    t = torch.linspace(begin, end, 4001, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.log_alpha_bar(t)), t, rtol=1e-10, atol=1e-9)
    knots = torch.arange(1000).double() + end if name != "vp" else 999 * torch.rand(1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.log_alpha_bar(knots)), knots, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_vp_grid_is_that_of_u_vit(steps: int) -> None:
    """sde.py, Euler-Maruyama: {0} and linspace(1e-3, 1, N), walked down."""
    t, alpha_bar = NoiseSchedule("vp").grid(steps, "uniform")
    times = np.append(0, np.linspace(1e-3, 1, steps))[::-1] if steps > 1 else np.array([1.0, 0.0])
    np.testing.assert_allclose(t.numpy(), 999 * times[:-1], rtol=1e-14)
    np.testing.assert_allclose(alpha_bar.numpy(), np.exp(-0.1 * times - 9.95 * times**2), rtol=1e-13)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=f"no noise schedule 'sigmoid'; there are {', '.join(NAMES)}"):
        NoiseSchedule("sigmoid")
    linear, vp = NoiseSchedule("linear"), NoiseSchedule("vp")
    for steps in (0, -1, 1001, 10.0, True, "10", None):
        with pytest.raises(ValueError, match="steps must be an int from 1 to 1000"):
            linear.grid(steps, "trailing")
    for schedule, spacing in ((linear, "uniform"), (linear, "karras"), (vp, "trailing"), (vp, "leading")):
        with pytest.raises(ValueError, match=f"has spacings .*, got '{spacing}'"):
            schedule.grid(10, spacing)
    with pytest.raises(ValueError, match="repeats a timestep at 1000 steps; take 999"):
        linear.grid(1000, "linspace")
    with pytest.raises(ValueError, match="begins at timestep 0 with 1 step; take 2"):
        linear.grid(1, "respaced")
    for schedule, t in ((linear, 999.5), (NoiseSchedule("stable_diffusion"), 0.5), (vp, -1e-9), (linear, math.nan)):
        with pytest.raises(ValueError, match="times of schedule"):
            schedule.log_alpha_bar(torch.tensor([t], dtype=torch.float64))
    for schedule, value in ((linear, -11.0), (linear, -1e-6), (vp, -10.1), (vp, 1e-3)):
        with pytest.raises(ValueError, match="no such log alpha_bar"):
            schedule.time(torch.tensor([value], dtype=torch.float64))
    for u in ([-0.1], [1.0], [math.nan]):
        for schedule in (linear, vp):
            with pytest.raises(ValueError, match=r"float64 in \[0, 1\)"):
                schedule.training_times(torch.tensor(u, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        linear.training_times(torch.tensor([0.5]))
