"""Trains the oracle of a cascade: real images against a student's, by binary cross-entropy."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sampling.oracle import Oracle, OracleConfig

BATCH, LR, WEIGHT_DECAY, LABEL_DROP = 64, 1e-3, 0.05, 0.1
CHECK_EVERY = 50  # updates, after which the held-out loss is looked at


@dataclass(frozen=True)
class Labelled:
    """images: float32 [n, C, H, W]; labels: int64 [n], or None where there are no classes."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor | slice) -> "Labelled":
        return Labelled(self.images[index], None if self.labels is None else self.labels[index])


@dataclass(frozen=True)
class Trained:
    """held_out_auc: how often a real image that it was not trained on scores above a student's; update: at which its
    loss on these was smallest."""

    oracle: Oracle
    held_out_auc: float
    update: int


def train_oracle(config: OracleConfig, real: Labelled, drawn: Labelled, *, updates: int, seed: int) -> Trained:
    """AdamW. A fifth of both sets is held out; what is kept is the oracle with the smallest loss on it, for a few
    hundred real images are soon known by heart. Labels are left out of some, so that it can do without."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        oracle = Oracle(config)
    held_real, real = _part(real, generator)
    held_drawn, drawn = _part(drawn, generator)
    optimizer = torch.optim.AdamW(oracle.parameters(), LR, weight_decay=WEIGHT_DECAY)
    best, kept, at = torch.inf, copy.deepcopy(oracle), 0
    for update in range(1, updates + 1):
        loss = torch.zeros((), device="cpu")
        for images, target in ((real, 1.0), (drawn, 0.0)):
            one = images.take(torch.randint(len(images), (BATCH,), generator=generator, device="cpu"))
            labels = one.labels
            if labels is not None:
                drop = torch.rand(BATCH, generator=generator, device="cpu") < LABEL_DROP
                labels = labels.masked_fill(drop, config.classes)
            scores = oracle(one.images, labels)
            loss = loss + F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if update % CHECK_EVERY == 0 or update == updates:
            held = _held_out_loss(oracle, held_real, held_drawn)
            if held < best:
                best, kept, at = held, copy.deepcopy(oracle), update
    kept = kept.eval().requires_grad_(False)
    auc = separation(kept(held_real.images, held_real.labels), kept(held_drawn.images, held_drawn.labels))
    return Trained(kept, auc, at)


def separation(above: Tensor, below: Tensor) -> float:
    """How often a value of `above` [n] is larger than one of `below` [m], ties counting half: the area under the ROC
    curve."""
    larger = (above[:, None] > below).double() + (above[:, None] == below).double() / 2
    return float(larger.mean())


@torch.no_grad()
def _held_out_loss(oracle: Oracle, real: Labelled, drawn: Labelled) -> float:
    """Both sets count alike, however many they are."""
    right, wrong = oracle(real.images, real.labels), oracle(drawn.images, drawn.labels)
    return float(F.softplus(-right).mean() + F.softplus(wrong).mean()) / 2


def _part(images: Labelled, generator: torch.Generator) -> tuple[Labelled, Labelled]:
    order = torch.randperm(len(images), generator=generator, device="cpu")
    held = max(1, len(images) // 5)
    return images.take(order[:held]), images.take(order[held:])
