"""How a step selector learns: rewards, the gradient's expectation, optima found by enumeration, the reward's traps."""

import itertools

import pytest
import torch
from torch import Tensor

from adadiff.calibration.step_policy import learn, policy_loss, rewards
from adadiff.policies.step_selector import LabelScores

CANDIDATES = (2, 3, 5, 8, 10)


def test_rewards_by_hand() -> None:
    errors = torch.tensor([[0.3, 0.05, 0.01, 0.0], [0.04, 0.06, 0.03, 0.0]], dtype=torch.float64)
    found = rewards(errors, (2, 5, 8, 10), bar=0.05, penalty=0.7)
    assert found.tolist() == [[-0.7, 0.5, pytest.approx(0.2), 0.0], [0.8, -0.7, pytest.approx(0.2), 0.0]]


@pytest.mark.parametrize(("draws", "K"), [(2, 4), (3, 3)])
def test_the_estimate_s_expectation_is_the_exact_gradient(draws: int, K: int) -> None:
    """Every way to draw, weighted by its probability, against autograd through sum over u of pi(u) R(u): two rows, so
    that a baseline taken from the wrong row or the own draw would show."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, K, generator=generator, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(2, K, generator=generator, dtype=torch.float64)
    (exact,) = torch.autograd.grad(-(scores.softmax(1) * reward).sum(1).mean(), scores)
    pi, mean, variance = scores.detach().softmax(1), torch.zeros(2, K, dtype=torch.float64), 0.0
    ways = list(itertools.product(range(K), repeat=draws))
    for one, two in itertools.product(ways, ways):
        chosen = torch.tensor([one, two])
        (estimate,) = torch.autograd.grad(policy_loss(scores, reward, chosen), scores)
        weight = pi.gather(1, chosen).prod()
        mean += weight * estimate
        variance += float(weight * (estimate - exact).square().sum())
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=1e-14)
    assert variance > 0  # the draws do differ


def taught(errors: Tensor, labels: Tensor, reward: Tensor) -> list[int]:
    """Steps of each label after learning."""
    scores = LabelScores(int(labels.max()) + 1, errors.shape[1]).double()
    learn(scores, torch.arange(len(scores.table)), labels, reward, updates=300, batch=64)
    return [CANDIDATES[i] for i in scores.table.argmax(1)]


def recorded(n: int = 210) -> tuple[Tensor, Tensor]:
    """Errors [n, 5] that fall with every step, of seven labels between the easiest and the hardest, and the labels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 7
    hardness = torch.tensor([0.06, 0.07, 0.115, 0.12, 0.20, 0.32, 0.60], dtype=torch.float64)[labels]
    wobble = 1 + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    steps = torch.tensor(CANDIDATES, dtype=torch.float64)
    errors = (hardness * wobble)[:, None] / steps
    errors[:, -1] = 0
    assert bool((errors.diff(dim=1) < 0).all())
    return errors, labels


def test_enumeration_finds_the_same_optimum() -> None:
    errors, labels = recorded()
    reward = rewards(errors, CANDIDATES, bar=0.05, penalty=1.0)
    means = [[float(reward[labels == label, u].mean()) for u in range(5)] for label in range(7)]
    best = [max(range(5), key=own.__getitem__) for own in means]
    gaps = [sorted(own)[-1] - sorted(own)[-2] for own in means]
    assert min(gaps) > 0.05  # else the optimum would hang on a few draws
    assert len(set(best)) >= 4
    assert taught(errors, labels, reward) == [CANDIDATES[u] for u in best]


def test_a_bar_tells_easy_from_hard_where_the_k_best_do_not() -> None:
    """Trap (i) of the published reward: quality that rises with every step makes the k-th most expensive candidate the
    best of every label, be it easy or hard."""
    errors, labels = recorded()
    k = 3
    rank = errors.argsort(1).argsort(1)  # 0: best
    top_k = torch.where(rank < k, rewards(errors, CANDIDATES, bar=torch.inf, penalty=1.0), -1.0)
    assert taught(errors, labels, top_k) == [CANDIDATES[-k]] * 7
    by_bar = taught(errors, labels, rewards(errors, CANDIDATES, bar=0.05, penalty=1.0))
    assert by_bar == [2, 2, 3, 3, 5, 8, 10]


def test_a_quality_that_falls_with_steps_collapses_to_the_fewest() -> None:
    """Trap (ii): so a classifier's confidence can behave, which is why no quality score adds to the reward: with one of
    a weight of 1, every label takes the fewest steps, however large its error."""
    errors, labels = recorded()
    confidence = errors / errors.max()  # higher for fewer steps
    published = rewards(errors, CANDIDATES, bar=torch.inf, penalty=1.0) + confidence
    assert taught(errors, labels, published) == [CANDIDATES[0]] * 7
    assert float(errors[labels == 6, 0].mean()) > 0.15  # three times the bar


def test_learning_is_a_function_of_its_seed() -> None:
    errors, labels = recorded(42)
    reward = rewards(errors, CANDIDATES, bar=0.05, penalty=1.0)
    tables = []
    for seed in (0, 0, 1):
        scores = LabelScores(7, 5).double()
        learn(scores, torch.arange(7), labels, reward, updates=5, batch=16, seed=seed)
        tables.append(scores.table.detach())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
