"""A student draws, an oracle looks at its image, and where it asks for more a teacher goes on in the same slot."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import adadiff
from adadiff.diffusion.noise import INITIAL, REFINEMENT, SOLVER_STEP, initial_noise, refinement_noise, step_noise
from adadiff.diffusion.refining import Refining
from adadiff.diffusion.solvers import DDIM, DDPM, solver_from
from adadiff.diffusion.tables import Solver
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.structure import structure_of
from adadiff.policies.cascade import Cascade
from adadiff.sampling.cascades import Draft
from adadiff.sampling.reports import Report
from sampler.cascading import LABELS, STUDENT_STEPS, oracle, score, settings, student, written
from sampler.tiny import served

INVARIANT = ExecutionOptions(batch_invariant=True)
# No two of three neighbours stand at one timestep, and their teachers end at different ticks.
STEPS = [4, 5, 7, 4, 5, 7, 4]
GIVEN = {"steps": STEPS, "class_labels": LABELS, "execution": INVARIANT}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("cascade"))


def draw(policy: str, n: int = 7, **given: object) -> tuple[Tensor, Report]:
    return adadiff.sample(served(), n, policy=policy, **{**GIVEN, **given})


@pytest.mark.parametrize("rest", ["", "+exit:0.4"], ids=["alone", "with exits"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_share_of_nothing_is_the_student_alone(file: str, rest: str, guidance: float) -> None:
    images, report = draw(f"cascade:{file},share=0{rest}", guidance_scale=guidance)
    alone, own = adadiff.sample(student(), 7, steps=STUDENT_STEPS, class_labels=LABELS, execution=INVARIANT)
    assert torch.equal(images, alone)
    assert torch.equal(report.exit_layer[:STUDENT_STEPS], own.exit_layer)
    assert not report.exit_layer[STUDENT_STEPS:].any()
    assert report.macs == own.macs + 7 * oracle().macs
    assert not report.went_on.any()


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpm++2m", "unipc:order=3", "heun"])
@pytest.mark.parametrize("rest", ["", "+exit:0.4"], ids=["alone", "with exits"])
def test_everybody_drawn_anew_is_the_teacher_alone(file: str, rest: str, solver: str) -> None:
    """The same noise and the same list, guided pairs included: bit for bit."""
    given = {"solver": solver, "guidance_scale": [1.0, 2.0] * 3 + [1.0], "tied": True}
    images, report = draw(f"cascade:{file},share=1,mode=regenerate{rest}", batch=4, **given)
    alone, own = draw(rest[1:] or "full", batch=4, **given)
    assert torch.equal(images, alone)
    assert report.went_on.all()
    for i, steps in enumerate(STEPS):
        rows = report.exit_layer[:, i]
        assert rows[:STUDENT_STEPS].tolist() == [[student().num_layers, 0]] * STUDENT_STEPS
        assert torch.equal(rows[STUDENT_STEPS : STUDENT_STEPS + steps], own.exit_layer[:steps, i])
        assert not rows[STUDENT_STEPS + steps :].any()


@torch.no_grad()
def by_hand(seed: int, label: int, steps: int, sigma: float, threshold: float) -> tuple[Tensor, int]:
    """One image and the passes of the teacher, by plain networks and DDIM's equation 12 in float64."""
    labels, schedule = torch.tensor([label]), served().schedule

    def eps(model: adadiff.Model, x: Tensor, t: float) -> Tensor:
        return model.backbone(x.float(), torch.tensor([t]), labels).double()

    def walk(model: adadiff.Model, x: Tensor, t: list[float], a: list[float]) -> Tensor:
        for time, here, after in zip(t, a, [*a[1:], 1.0], strict=True):
            noise = eps(model, x, time)
            x0 = (x - math.sqrt(1 - here) * noise) / math.sqrt(here)
            x = math.sqrt(after) * x0 + math.sqrt(1 - after) * noise
        return x

    def grid(count: int) -> tuple[list[float], list[float]]:
        t = [round(1000 - k * 1000 / count) - 1 for k in range(count)]
        beta = np.linspace(1e-4, 0.02, 1000)
        return [float(i) for i in t], [float(np.cumprod(1 - beta)[i]) for i in t]

    x = walk(student(), initial_noise(torch.tensor([seed]), (1, 4, 4)).double(), *grid(STUDENT_STEPS))
    if float(oracle()(x.float(), labels)) >= threshold:
        return x[0].float(), 0
    x = math.sqrt(1 - sigma) * x + math.sqrt(sigma) * refinement_noise(torch.tensor([seed]), (1, 4, 4)).double()
    below = [(t, a) for t, a in zip(*grid(steps), strict=True) if a > 1 - sigma]
    t = float(schedule.time(torch.tensor(1 - sigma, dtype=torch.float64).log()))
    x = walk(served(), x, [t, *(t for t, _ in below)], [1 - sigma, *(a for _, a in below)])
    return x[0].float(), 1 + len(below)


@pytest.mark.parametrize("sigma", [0.3, 0.8])
def test_an_image_is_refined_from_its_noise_level_on(file: str, sigma: float) -> None:
    steps = [9, 14, 11, 9, 14, 11, 9]
    images, report = draw(f"cascade:{file},share=0.5,mode=refine,sigma={sigma}", steps=steps)
    threshold, passes = settings().threshold(0.5), []
    for i in range(7):
        wanted, own = by_hand(i, LABELS[i], steps[i], sigma, threshold)
        torch.testing.assert_close(images[i], wanted, rtol=1e-4, atol=1e-4)
        passes.append(own)
    assert ((report.exit_layer[:, :, 0] > 0).sum(0) - STUDENT_STEPS).tolist() == passes
    assert report.went_on.tolist() == [own > 0 for own in passes]
    assert len(set(passes)) > 2  # some are refined, not all alike


def test_what_the_oracle_says_and_what_it_costs(file: str) -> None:
    """Multiply-adds: n_s steps of the student for all, the oracle for all, n_t of the teacher for a share."""
    images, report = draw(f"cascade:{file},share=0.3,mode=regenerate", n=7)
    students, _ = adadiff.sample(student(), 7, steps=STUDENT_STEPS, class_labels=LABELS, execution=INVARIANT)
    scores = score(students, LABELS)
    assert torch.equal(report.oracle_scores, scores)
    assert torch.equal(report.went_on, scores < settings().threshold(0.3))
    k = report.went_on
    assert 0 < int(k.sum()) < 7
    assert torch.equal(images[~k], students[~k])
    one = {name: structure_of(model.backbone).costs(None, frozenset()).plain for name, model in NETWORKS.items()}
    teacher_steps = sum(steps for steps, went_on in zip(STEPS, k.tolist(), strict=True) if went_on)
    assert report.passes == 7 * STUDENT_STEPS + teacher_steps
    assert report.macs == (7 * STUDENT_STEPS * one["student"] + teacher_steps * one["teacher"] + 7 * oracle().macs)
    assert report.macs_full == report.passes * one["teacher"]
    assert f"{int(k.sum())} went on to the teacher" in str(report)


NETWORKS = {"student": student(), "teacher": served()}


def test_an_oracle_counts_its_multiply_adds() -> None:
    """Of 4 x 4 images: three convolutions of 3 x 3 at 4, 2 and 1 pixels a side, then 6 hidden values."""
    assert oracle().macs == 9 * (1 * 3 * 16 + 3 * 6 * 4 + 6 * 6 * 1) + 6 * 6 + 6


def test_quantiles_are_interpolated_and_the_ends_are_everybody() -> None:
    known = settings(quantiles=tuple(float(k) for k in range(1, 100)))
    assert [known.threshold(share) for share in (0, 1)] == [-math.inf, math.inf]
    assert [round(known.threshold(share), 9) for share in (0.01, 0.255, 0.99)] == [1.0, 25.5, 99.0]


def test_whether_an_image_goes_on_hangs_on_its_score_alone(file: str) -> None:
    """What is not a number asks for more, except where nobody goes on."""
    scores = np.array([-1e30, settings().threshold(0.5), math.nan, 1e30], dtype=np.float32)
    asked = {}
    for share in (0, 0.5, 1):
        samples = adadiff.sampling.sample_batch.SampleBatch.of(
            served(), 1, steps=4, class_labels=0, policy=Cascade(file, share)
        )
        assert isinstance(samples.draft, Draft)
        asked[share] = samples.draft.asks_for_more(scores).tolist()
    assert asked[0] == [False] * 4
    assert asked[1] == [True] * 4
    assert (asked[0.5][0], *asked[0.5][2:]) == (True, True, False)


def test_noises_of_a_sample_are_independent() -> None:
    """The first noise, that of solver steps and that of a refinement: no stream is another's."""
    assert len({INITIAL, SOLVER_STEP, REFINEMENT}) == 3
    seeds, shape = torch.tensor([5]), (1, 40, 40)
    drawn = [initial_noise(seeds, shape), refinement_noise(seeds, shape)]
    drawn += [step_noise(seeds, torch.tensor([step]), shape) for step in range(3)]
    correlation = torch.corrcoef(torch.stack([z.flatten() for z in drawn]))
    assert float((correlation - torch.eye(5)).abs().max()) < 5 / 40  # of 1,600 values: five standard deviations


@pytest.mark.parametrize("policy", ["share=0.5,sigma=0.6", "share=0.5,mode=regenerate"])
@pytest.mark.parametrize("rest", ["", "+exit:0.4"], ids=["alone", "with exits"])
def test_a_sample_does_not_depend_on_its_mates(file: str, policy: str, rest: str) -> None:
    """Bit for bit, image, decision and cost, in a batch of three slots that are used again and again."""
    given = {"solver": "ddpm", "guidance_scale": [1.0, 2.0, 1.0, 3.0, 2.0, 1.0, 1.0], "seed": list(range(20, 27))}
    images, report = draw(f"cascade:{file},{policy}{rest}", batch=3, **given)
    assert 0 < int(report.went_on.sum()) < 7
    for i in range(7):
        own = {name: value[i] if isinstance(value, list) else value for name, value in {**given, **GIVEN}.items()}
        alone, single = adadiff.sample(served(), 1, policy=f"cascade:{file},{policy}{rest}", **own)
        assert torch.equal(images[i], alone[0])
        assert torch.equal(report.exit_layer[: len(single.exit_layer), i], single.exit_layer[:, 0])
        assert float(report.oracle_scores[i]) == float(single.oracle_scores)
        assert bool(report.went_on[i]) == bool(single.went_on)


def test_outside_of_the_invariant_mode_samples_are_the_same_to_rounding(file: str) -> None:
    images, report = draw(f"cascade:{file},share=0.5")
    others, other = draw(f"cascade:{file},share=0.5", execution=ExecutionOptions())
    assert torch.equal(report.exit_layer, other.exit_layer)
    torch.testing.assert_close(images, others, rtol=1e-4, atol=1e-4)


def test_a_shallow_model_serves_the_teacher_alone(file: str) -> None:
    """DuoDiff in the second stage: three blocks at the noisy times, by the same network as the student here."""
    given = {"shallow_model": student(), "t_switch": 500.0}
    images, report = draw(f"cascade:{file},share=1,mode=regenerate", **given)
    alone, own = draw("full", **given)
    assert torch.equal(images, alone)
    assert torch.equal(report.exit_layer[STUDENT_STEPS:], own.exit_layer)
    drawn, _ = draw(f"cascade:{file},share=0", shallow_model=student(), t_switch=1000.0)
    whole, _ = draw(f"cascade:{file},share=0")
    assert torch.equal(drawn, whole)


@pytest.mark.parametrize("solver", ["ddim", "ddim:0.7", "ddpm", "dpm++2m", "unipc", "dpm-fast", "dpm++fast"])
@pytest.mark.parametrize("schedule", ["linear", "stable_diffusion", "vp"])
def test_a_refining_list_begins_at_its_noise_level(solver: str, schedule: str) -> None:
    """t* first, then what of the list lies below it (of the fast solvers: as many evaluations)."""
    own, noise = solver_from(solver), adadiff.diffusion.schedules.NoiseSchedule(schedule)
    whole, part = own.table(noise, 11), Refining(own, 0.4).table(noise, 11)
    assert float(noise.log_alpha_bar(part.t[:1]).exp()) == pytest.approx(0.6, abs=1e-9)
    below = whole.t[whole.t < part.t[0]]
    assert part.steps == len(below) + 1
    assert 2 < part.steps < 11
    assert bool((part.t.diff() < 0).all())
    if "fast" not in solver:
        assert torch.equal(part.t[1:], below)
    if solver not in ("dpm++2m", "unipc"):  # whose steps have a longer memory
        same = {"ddim", "ddim:0.7", "ddpm"} & {solver}
        assert not same or torch.equal(part.coefficients[1:], whole.coefficients[-len(below) :])


@pytest.mark.parametrize("solver", [DDIM(), DDPM()])
def test_a_refining_step_is_the_solver_s_own(solver: Solver) -> None:
    """Where t* is on the list already, the list's own rows from there on."""
    schedule = served().schedule
    whole = solver.table(schedule, 10)
    sigma = 1 - float(schedule.log_alpha_bar(whole.t[4:5]).exp())
    part = Refining(solver, sigma).table(schedule, 10)
    torch.testing.assert_close(part.t, whole.t[4:])
    torch.testing.assert_close(part.coefficients, whole.coefficients[4:], rtol=1e-9, atol=1e-9)
