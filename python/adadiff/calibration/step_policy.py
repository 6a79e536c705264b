"""Training of a step selector by policy gradient on recorded errors.

Zhang et al. (arXiv 2311.14768) draw the number of steps u of a prompt p from softmax(f(p)) and follow
R(u) grad log pi(u | p). Their R is a saving O(u) plus lambda times a quality score if u is among the k best candidates
of its prompt, else -gamma. Two things differ here. The condition is an absolute bar on the error: if quality rises with
every step, the k best candidates are the k most expensive ones for every prompt, and there is nothing to learn. And
there is no quality score: a classifier's confidence, for example, is higher for fewer steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm


def rewards(errors: Tensor, candidates: Sequence[int], bar: float, penalty: float) -> Tensor:
    """errors: [n, K], for each row and candidate. Returns float64 [n, K]: the saved share of the largest candidate's
    steps, 1 - S / S_max, if the error is at most `bar`, else -penalty."""
    steps = torch.tensor(candidates, dtype=torch.float64, device="cpu")
    return torch.where(errors <= bar, 1 - steps / steps.max(), -penalty)


def policy_loss(scores: Tensor, rewards: Tensor, chosen: Tensor) -> Tensor:
    """A scalar whose gradient is an unbiased estimate of that of minus the expected reward (REINFORCE). scores,
    rewards: [m, K]; chosen: int64 [m, D >= 2], drawn from softmax(scores). The baseline of a draw is the mean reward of
    the row's other draws, which are independent of it."""
    reward = rewards.gather(1, chosen)
    others = (reward.sum(1, keepdim=True) - reward) / (chosen.shape[1] - 1)
    return -((reward - others) * scores.log_softmax(1).gather(1, chosen)).mean()


def mean_entropy(scores: Tensor) -> Tensor:
    """Mean entropy of softmax(scores) in nats. scores: [m, K]."""
    return -(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()


def learn(
    scores: nn.Module,
    context: Tensor,
    index: Tensor,
    rewards: Tensor,
    *,
    updates: int = 500,
    batch: int = 256,
    draws: int = 4,
    lr: float = 0.05,
    entropy: float = 0.3,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Trains `scores` with Adam on a recorded table. context: labels int64 [P] or text [P, N, E]; index: int64 [n], the
    condition of each row; rewards: float64 [n, K]. An update uses `batch` rows and `draws` choices for each. entropy:
    initial weight of the policy's entropy, which falls to zero; neighbouring candidates often differ little in reward,
    and without it the policy settles on the first one ahead. Deterministic."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(scores.parameters(), lr)
    for update in tqdm(range(updates), disable=not progress, unit="update", dynamic_ncols=True):
        rows = torch.randint(len(rewards), (batch,), generator=generator, device="cpu")
        conditions = context[index[rows]]
        logits = scores(conditions.double() if conditions.is_floating_point() else conditions)
        chosen = torch.multinomial(logits.detach().softmax(1), draws, replacement=True, generator=generator)
        weight = entropy * (1 - update / updates) ** 2
        optimizer.zero_grad(set_to_none=True)
        (policy_loss(logits, rewards[rows], chosen) - weight * mean_entropy(logits)).backward()
        optimizer.step()
