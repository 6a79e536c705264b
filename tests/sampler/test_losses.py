"""AdaDiff's loss against its formulas element by element in float64, and where its gradients go."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from adadiff.checkpoint import save
from adadiff.diffusion.schedules import NoiseSchedule
from adadiff.forward.all_layers import all_layers
from adadiff.models.layers import patchify
from adadiff.models.uvit import UViT
from adadiff.training.config import TrainConfig
from adadiff.training.losses import (
    LOSSES,
    OF_WHOLE_BATCHES,
    BatchMeans,
    VarianceLoss,
    batch_means,
    log_error,
    loss_named,
    official_loss,
    paper_loss,
    relative_loss,
    supervised_loss,
)
from adadiff.training.processes import Processes
from adadiff.training.trainer import Trainer, start_model
from adadiff.uem import ExitConfig, Exits
from sampler.tiny import UVIT, inputs, scramble

L, B, C, SIDE, PATCH = 3, 5, 3, 8, 2
N = (SIDE // PATCH) ** 2


def problem(outputs: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], Tensor]:
    predictions = [torch.randn(B, C, SIDE, SIDE, dtype=dtype) for _ in range(L)]
    scores = [torch.rand(B, N, outputs, dtype=dtype) for _ in range(L)]
    return predictions, scores, torch.randn(B, C, SIDE, SIDE, dtype=dtype)


def to_patches(images: Tensor) -> Tensor:
    return patchify(images, UVIT.patch)


def by_element(predictions, scores, noise) -> tuple[float, float, float]:
    """L_simple, L_u, L_UAL, one pixel at a time; channels lie last inside a patch."""
    simple = uem = ual = 0.0
    for i, (prediction, score) in enumerate(zip(predictions, scores, strict=True)):
        outputs = score.shape[-1]
        for b in range(B):
            squares, targets = [], [[] for _ in range(N)]
            for y in range(SIDE):
                for x in range(SIDE):
                    for c in range(C):
                        error = float(prediction[b, c, y, x] - noise[b, c, y, x])
                        squares.append(error**2)
                        targets[(y // PATCH) * (SIDE // PATCH) + x // PATCH].append(math.tanh(abs(error)))
            square = sum(squares) / len(squares)
            u = score[b].tolist()
            for patch, target in zip(u, targets, strict=True):
                if outputs == 1:
                    target = [sum(target) / len(target)]
                uem += sum((p - q) ** 2 for p, q in zip(patch, target, strict=True)) / (N * outputs * B)
            mean_u = sum(map(sum, u)) / (N * outputs)
            ual += (1 - mean_u) * square / B
            simple += square / B if i == L - 1 else 0
    return simple, uem, ual


@pytest.mark.parametrize("outputs", [1, PATCH**2 * C])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.5), (0.0, 0.0)])
def test_states_the_formulas(outputs: int, weights: tuple[float, float]) -> None:
    given = problem(outputs)
    simple, uem, ual = by_element(*given)
    terms = paper_loss(*given, to_patches, *weights)
    assert float(terms.simple) == pytest.approx(simple, rel=1e-12)
    assert float(terms.uem.sum()) == pytest.approx(uem, rel=1e-12)
    assert float(terms.ual.sum()) == pytest.approx(ual, rel=1e-12)
    assert float(terms.total) == pytest.approx(simple + weights[0] * uem + weights[1] * ual, rel=1e-12)
    errors = [float((p - given[2]).square().mean()) for p in given[0]]
    assert terms.errors.tolist() == pytest.approx(errors, rel=1e-12)
    relative = [float((p - given[0][-1]).square().mean()) for p in given[0]]
    assert terms.relative.tolist() == pytest.approx(relative, rel=1e-12)
    for i in range(L):  # a layer's share is what the sum has without the others
        alone = paper_loss([given[0][i]], [given[1][i]], given[2], to_patches)
        assert float(terms.uem[i]) == pytest.approx(float(alone.uem), rel=1e-12)
        assert float(terms.ual[i]) == pytest.approx(float(alone.ual), rel=1e-12)


def test_twice_the_batch_is_the_same_loss() -> None:
    predictions, scores, noise = problem(1)
    once = paper_loss(predictions, scores, noise, to_patches)
    twice = paper_loss(
        *([torch.cat([v, v]) for v in part] for part in (predictions, scores)), noise.repeat(2, 1, 1, 1), to_patches
    )
    for name in ("total", "simple", "uem", "ual"):
        torch.testing.assert_close(getattr(twice, name), getattr(once, name), rtol=1e-12, atol=0)


def test_a_samples_uncertainty_weighs_its_own_error_only() -> None:
    """A mean over the batch as weight, as in the official code, would change every sample's term."""
    predictions, scores, noise = problem(1)
    before = paper_loss(predictions, scores, noise, to_patches)
    scores[1][3] += 0.25
    after = paper_loss(predictions, scores, noise, to_patches)
    square = float((predictions[1][3] - noise[3]).square().mean())
    assert float((after.ual - before.ual).sum()) == pytest.approx(-0.25 * square / B, rel=1e-9)
    assert float(after.simple) == float(before.simple)


def test_target_and_weight_carry_no_gradient() -> None:
    for outputs in (1, 12):
        predictions, scores, noise = problem(outputs)
        for value in (*predictions, *scores):
            value.requires_grad_()
        paper_loss(predictions, scores, noise, to_patches).total.backward()
        for i, (prediction, score) in enumerate(zip(predictions, scores, strict=True)):
            error = (prediction - noise).detach()
            weight = (1 - score.detach().flatten(1).mean(1))[:, None, None, None] + (i == L - 1)
            want = 2 * weight * error / error.numel()  # of (1 - u) e^2, and of e^2 for the last layer
            torch.testing.assert_close(prediction.grad, want, rtol=1e-10, atol=1e-14)
            target = to_patches(torch.tanh(error.abs()))
            target = target.mean(-1, keepdim=True) if outputs == 1 else target
            want = 2 * (score.detach() - target) / score.numel()
            torch.testing.assert_close(score.grad, want, rtol=1e-10, atol=1e-14)


def gradients(config: ExitConfig, uem: float, ual: float, loss=paper_loss) -> dict[str, Tensor | None]:
    backbone = UViT(UVIT)
    exits = Exits(backbone, config)
    scramble(backbone, 0.15, seed=1)
    scramble(exits, 0.15, seed=2)
    given = inputs(backbone, 4)
    predictions, scores, *_ = all_layers(backbone, exits, *given.all)
    loss(predictions, scores, torch.ones_like(given.x), backbone.patchify, uem, ual).total.backward()
    return {
        f"{part}.{name}": parameter.grad
        for part, module in (("backbone", backbone), ("exits", exits))
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("config", [ExitConfig(), ExitConfig(map=True, time=True, shared_head=True)], ids=str)
def test_each_loss_reaches_its_own_weights_only(config: ExitConfig) -> None:
    """L_u moves the UEMs and nothing else; L_UAL moves network and heads, and no UEM."""
    uems = {"exits.weight", "exits.bias", "exits.time_weight"}
    neither, uem, ual = (gradients(config, *weights) for weights in ((0, 0), (1, 0), (0, 1)))
    for name, before in neither.items():
        if name in uems:
            assert before is None or not before.any()
            assert uem[name].flatten(1).any(1).all()  # every layer's
            assert ual[name] is None or not ual[name].any()
        else:
            assert (before is None) == (uem[name] is None)
            # 0 times a UEM's error adds zeros, so not even rounding differs
            assert before is None or torch.equal(before, uem[name])
            assert before is None or not torch.equal(before, ual[name])


def test_the_networks_variance_is_trained_by_the_variational_bound() -> None:
    """Posterior and prediction as distributions of x_{t-1}, from x_t and x0 (Ho et al. 2020, equations 6 and 7)."""
    t = torch.tensor([1.0, 37.0, 640.0, 999.0])
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    x0, noise, own = torch.randn(3, len(t), C, 4, 4, dtype=torch.float64)
    prediction, v = noise + 0.3 * own, torch.rand(len(t), C, 4, 4, dtype=torch.float64) * 2 - 1
    found = VarianceLoss(NoiseSchedule("linear"))([v.float()], prediction.float(), noise.float(), t)
    wanted = []
    for i, step in enumerate(t.long().tolist()):
        a, before, b = alpha_bar[step], alpha_bar[step - 1], beta[step]
        x = a.sqrt() * x0[i] + (1 - a).sqrt() * noise[i]
        small = b * (1 - before) / (1 - a)

        def mean(start: Tensor, x=x, a=a, before=before, b=b) -> Tensor:
            return (before.sqrt() * b * start + (1 - b).sqrt() * (1 - before) * x) / (1 - a)

        predicted = (x - (1 - a).sqrt() * prediction[i]) / a.sqrt()
        deviation = torch.exp((v[i] + 1) / 2 * b.log() + (1 - v[i]) / 2 * small.log()).sqrt()
        posterior, model = Normal(mean(x0[i]), small.sqrt()), Normal(mean(predicted), deviation)
        wanted.append(kl_divergence(posterior, model).mean() / math.log(2))
    assert float(found) == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-4)
    assert min(wanted) > 0


def test_the_exits_variances_follow_the_networks() -> None:
    loss, t = VarianceLoss(NoiseSchedule("linear")), torch.tensor([0.0, 40.0, 700.0])
    variances = [torch.randn(3, C, 4, 4, requires_grad=True) for _ in range(L)]
    prediction, noise = torch.randn(3, C, 4, 4, requires_grad=True), torch.randn(3, C, 4, 4)
    terms = loss(variances, prediction, noise, t)
    for term, variance in zip(terms[:-1], variances[:-1], strict=True):
        assert term.item() == pytest.approx((variance - variances[-1]).square().mean().item(), rel=1e-6)
    terms.sum().backward()
    for variance in variances[:-1]:
        want = 2 * (variance - variances[-1]).detach() / variance.numel()
        torch.testing.assert_close(variance.grad, want, rtol=1e-5, atol=1e-8)
    alone = variances[-1].detach().clone().requires_grad_()
    loss([alone], prediction, noise, t).sum().backward()
    assert torch.equal(alone.grad, variances[-1].grad), "what the exits lack must not bend the network's variance"
    assert prediction.grad is None, "nor its mean"
    assert not variances[-1].grad[0].any(), "no noise is added at the last timestep"
    assert bool(variances[-1].grad[1:].flatten(1).any(1).all())


def test_no_variance_is_learned_without_timesteps() -> None:
    with pytest.raises(ValueError, match="schedule 'vp' does not have"):
        VarianceLoss(NoiseSchedule("vp"))


def test_layers_must_match() -> None:
    predictions, scores, noise = problem(1)
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match="argument 2 is shorter"):
            loss(predictions, scores[:-1], noise, to_patches)


def test_losses_have_names() -> None:
    assert [loss_named(name) for name in ("paper", "official", "relative", "supervised")] == [
        paper_loss,
        official_loss,
        relative_loss,
        supervised_loss,
    ]
    with pytest.raises(ValueError, match="no loss 'ours'; there are paper, official, relative, supervised"):
        loss_named("ours")


@pytest.mark.parametrize("outputs", [1, PATCH**2 * C])
def test_official_states_its_code(outputs: int) -> None:
    """sde.py there: the mean over all layers of certainty's squared error, and errors weighted by the batch's mean
    certainty, normalised to 1, both in terms of certainty = 1 - uncertainty."""
    predictions, scores, noise = problem(outputs)
    terms = official_loss(predictions, scores, noise, to_patches, 0.7, 1.9)
    certainty = [1 - score for score in scores]
    lte, weights, errors = 0.0, [], []
    for prediction, c in zip(predictions, certainty, strict=True):
        target = to_patches(1 - torch.tanh((prediction - noise).abs()))
        target = target.mean(-1, keepdim=True) if outputs == 1 else target
        lte += float((c - target).square().mean()) / L
        weights.append(float(c.mean()))
        errors.append(float((prediction - noise).square().mean()))
    ual = sum(w / sum(weights) * e for w, e in zip(weights, errors, strict=True))
    assert float(terms.uem.sum()) == pytest.approx(lte, rel=1e-12)
    assert float(terms.ual.sum()) == pytest.approx(ual, rel=1e-12)
    assert float(terms.total) == pytest.approx(errors[-1] + 0.7 * lte + 1.9 * ual, rel=1e-12)


@pytest.mark.parametrize("sizes", [(5,), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_have_the_loss_and_the_gradient_of_the_whole(name: str, sizes: tuple[int, ...]) -> None:
    """Equal parts, as of processes and of accumulation: loss and gradient are the means of theirs."""
    predictions, scores, noise = problem(1)
    given = [[value.requires_grad_() for value in part] for part in (predictions, scores)]
    leaves = [*given[0], *given[1]]
    whole = loss_named(name)(*given, noise, to_patches, 0.7, 1.3)
    wanted = torch.autograd.grad(whole.total, leaves, allow_unused=True)
    splits = [list(zip(*(value.split(sizes) for value in part), strict=True)) for part in given]
    noises = noise.split(sizes)
    means = [batch_means(*own) for own in zip(*splits, noises, strict=True)]
    known = BatchMeans(*(torch.stack([getattr(m, key) for m in means]).mean(0) for key in ("certainty", "errors")))
    options = {"whole": known} if name in OF_WHOLE_BATCHES else {}
    terms = [loss_named(name)(*own, to_patches, 0.7, 1.3, **options) for own in zip(*splits, noises, strict=True)]
    total = torch.stack([term.total for term in terms]).mean()
    torch.testing.assert_close(total, whole.total, rtol=1e-10, atol=0)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    for own, right in zip(found, wanted, strict=True):
        assert (own is None) == (right is None)
        if own is not None:
            torch.testing.assert_close(own, right, rtol=1e-9, atol=1e-12)
    for term in ("simple", "uem", "ual", "errors", "relative"):
        mean = torch.stack([getattr(own, term) for own in terms]).mean(0)
        torch.testing.assert_close(mean, getattr(whole, term), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_updates_are_those_of_the_whole_batch(
    name: str, accumulate: int, precision: str, tmp_path: Path
) -> None:
    base = TrainConfig(
        loss=name,
        batch=8,
        warmup=0,
        precision=precision,
        network={"dim": 16, "depth": 2, "heads": 2},
        init=str(tmp_path / "start.safetensors"),
    )
    save(start_model(dataclasses.replace(base, loss="paper", init="")), Path(base.init))
    whole, parts = (Trainer(dataclasses.replace(base, accumulate=k), tmp_path / str(k)) for k in (1, accumulate))
    for trainer in (whole, parts):
        scramble(trainer.model.exits, 0.5, seed=3)  # uncertainties that differ from sample to sample
    terms, found = whole.update(), parts.update()
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if precision == "float32" else {"rtol": 0.02, "atol": 1e-3}
    for key in ("loss", "ual", "uem", "simple"):
        torch.testing.assert_close(found[key], terms[key], **tolerance)
    a, b = (torch.cat([value.grad.flatten() for value in trainer.trained]) for trainer in (whole, parts))
    assert float((a - b).norm() / a.norm()) < (1e-5 if precision == "float32" else 0.02)


def test_processes_share_the_means_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, played one after the other: what each asks of `mean` is answered with the mean over both."""
    config = TrainConfig(loss="official", batch=8, accumulate=2, network={"dim": 16, "depth": 2, "heads": 2})
    one = Trainer(config, tmp_path / "one")
    scramble(one.model.exits, 0.5, seed=3)
    wanted = one._means()

    def answer(told: list[Tensor]) -> Callable[[Processes, Tensor], Tensor]:
        return lambda self, value: told.append(value) or torch.stack(told).mean(0)

    shares: list[Tensor] = []
    monkeypatch.setattr(Processes, "mean", answer(shares))
    found = None
    for rank in (0, 1):
        place = {"rank": rank, "world": 2, "device": torch.device("cpu"), "_accelerator": None}
        monkeypatch.setattr(Processes, "__init__", lambda self, place=place: vars(self).update(place))
        trainer = Trainer(config, tmp_path / f"two-{rank}")
        scramble(trainer.model.exits, 0.5, seed=3)
        found = trainer._means()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(shares[0], shares[1], rtol=1e-3)


def test_official_weights_carry_a_gradient() -> None:
    """Theirs are not detached, which lowers the certainty of layers worse than the rest."""
    predictions, scores, noise = problem(1)
    predictions[1] = noise + 3  # by far the worst
    predictions[0], predictions[2] = noise + 0.01, noise + 0.01
    for score in scores:
        score.requires_grad_()
    official_loss(predictions, scores, noise, to_patches, 0.0, 1.0).total.backward()
    assert bool((scores[1].grad < 0).all())  # more uncertainty lowers the loss
    assert bool((scores[0].grad > 0).all())


@pytest.mark.parametrize("outputs", [1, PATCH**2 * C])
def test_relative_measures_against_the_last_layer(outputs: int) -> None:
    predictions, scores, noise = problem(outputs)
    predictions[0] = predictions[2] + 1e-2 * predictions[0]  # errors of every size
    terms = relative_loss(predictions, scores, noise, to_patches, 0.3, 2.5)
    uem, ual = [], []
    for prediction, score in zip(predictions[:-1], scores[:-1], strict=True):
        squares = to_patches((prediction - predictions[-1]) ** 2)
        squares = squares.mean(-1, keepdim=True) if outputs == 1 else squares
        wanted = [
            (math.log(min(max(v, 1e-6), 1.0)) - math.log(1e-6)) / -math.log(1e-6) for v in squares.flatten().tolist()
        ]
        uem.append(sum((u - w) ** 2 for u, w in zip(score.flatten().tolist(), wanted, strict=True)) / len(wanted))
        ual.append(float(squares.mean()))
    assert terms.uem.tolist() == pytest.approx([*uem, 0.0], rel=1e-9)
    assert terms.ual.tolist() == pytest.approx([*ual, 0.0], rel=1e-12)
    simple = float((predictions[-1] - noise).square().mean())
    assert float(terms.total) == pytest.approx(simple + 0.3 * sum(uem) + 2.5 * sum(ual), rel=1e-9)


def test_log_error_by_hand() -> None:
    squares = torch.tensor([0.0, 1e-9, 1e-6, 1e-3, 0.1, 1.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(log_error(squares), torch.tensor([0, 0, 0, 3 / 6, 5 / 6, 1, 1], dtype=torch.float64))


def test_the_teacher_learns_nothing_from_its_pupils() -> None:
    """The last layer's prediction is only as good as L_simple makes it; early heads are pulled towards it."""
    predictions, scores, noise = problem(1)
    for value in (*predictions, *scores):
        value.requires_grad_()
    relative_loss(predictions, scores, noise, to_patches).total.backward()
    with torch.no_grad():
        torch.testing.assert_close(predictions[-1].grad, 2 * (predictions[-1] - noise) / noise.numel())
        for prediction in predictions[:-1]:
            torch.testing.assert_close(prediction.grad, 2 * (prediction - predictions[-1]) / noise.numel())
    assert scores[-1].grad is None


@pytest.mark.parametrize("outputs", [1, PATCH**2 * C])
def test_supervised_layers_learn_the_noise_and_uems_the_distance_to_the_last(outputs: int) -> None:
    predictions, scores, noise = problem(outputs)
    for value in predictions:
        value.requires_grad_()
    terms = supervised_loss(predictions, scores, noise, to_patches, 0.3, 2.5)
    terms.total.backward()
    with torch.no_grad():
        relative = relative_loss(predictions, scores, noise, to_patches)
        assert torch.equal(terms.uem, relative.uem)
        assert terms.ual.tolist() == pytest.approx([*terms.errors[:-1].tolist(), 0.0], rel=1e-12)
        for prediction, weight in zip(predictions, [2.5] * (L - 1) + [1.0], strict=True):
            torch.testing.assert_close(prediction.grad, weight * 2 * (prediction - noise) / noise.numel())


@pytest.mark.parametrize("config", [ExitConfig(), ExitConfig(head="mlp"), ExitConfig(head="block")], ids=str)
def test_relative_reaches_what_it_should(config: ExitConfig) -> None:
    uems = {"exits.weight", "exits.bias", "exits.time_weight"}
    neither, uem, ual = (gradients(config, *weights, relative_loss) for weights in ((0, 0), (1, 0), (0, 1)))
    for name, before in neither.items():
        if name in uems:
            assert uem[name][:-1].flatten(1).any(1).all()
            assert not uem[name][-1].any()
            assert ual[name] is None or not ual[name].any()
        elif name.startswith("exits.heads"):
            assert ual[name].any()
            assert before is None or not before.any()
        else:
            assert (before is None) == (uem[name] is None)
            assert before is None or torch.equal(before, uem[name])
