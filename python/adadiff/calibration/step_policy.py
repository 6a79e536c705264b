"""How a step selector learns: policy gradient on recorded errors.

Zhang et al. (arXiv 2311.14768) draw the number of steps u of a prompt p from softmax(f(p)) and follow
R(u) grad log pi(u | p). Their R is a saving O(u) plus lambda times a quality score where u is among the k best
candidates of its prompt, else -gamma. Here the condition is an absolute bar on the error: where quality rises with
every step, the k best are the k most expensive, whatever the prompt, and nothing can be learnt. The quality score is
left out: a classifier's confidence, for one, is higher for fewer steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm


def rewards(errors: Tensor, candidates: Sequence[int], bar: float, penalty: float) -> Tensor:
    """errors: [n, K], of each row's image for each candidate. Returns float64 [n, K]: the share of the largest
    candidate's steps that is saved, 1 - S / S_max, where the error is at most `bar`, else -penalty."""
    steps = torch.tensor(candidates, dtype=torch.float64, device="cpu")
    return torch.where(errors <= bar, 1 - steps / steps.max(), -penalty)


def policy_loss(scores: Tensor, rewards: Tensor, chosen: Tensor) -> Tensor:
    """Its gradient estimates that of minus the expected reward (REINFORCE), without bias. scores, rewards: [m, K];
    chosen: int64 [m, D >= 2], drawn from the softmax of scores. A draw's baseline is the mean reward of the row's other
    draws, which do not depend on it."""
    reward = rewards.gather(1, chosen)
    others = (reward.sum(1, keepdim=True) - reward) / (chosen.shape[1] - 1)
    return -((reward - others) * scores.log_softmax(1).gather(1, chosen)).mean()


def mean_entropy(scores: Tensor) -> Tensor:
    """Of softmax(scores), [m, K], in nats."""
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
    """Trains `scores` by Adam on rows of a recorded table. context: labels int64 [P] or text [P, N, E];
    index: int64 [n], which of them a row has; rewards: float64 [n, K]. An update takes `batch` rows and `draws` choices
    of each. entropy: weight of the policy's entropy at the beginning, which falls to zero: two candidates that follow
    one another often differ little in reward, and without it the first to lead is chosen for good. Deterministic."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(scores.parameters(), lr)
    for update in tqdm(range(updates), disable=not progress, unit="update", dynamic_ncols=True):
        rows = torch.randint(len(rewards), (batch,), generator=generator, device="cpu")
        given = context[index[rows]]
        own = scores(given.double() if given.is_floating_point() else given)
        chosen = torch.multinomial(own.detach().softmax(1), draws, replacement=True, generator=generator)
        left = entropy * (1 - update / updates) ** 2
        optimizer.zero_grad(set_to_none=True)
        (policy_loss(own, rewards[rows], chosen) - left * mean_entropy(own)).backward()
        optimizer.step()
