"""Trains the oracle of a cascade to tell real images from a student's, with binary cross-entropy."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sampling.oracle import Oracle, OracleConfig

BATCH, LR, WEIGHT_DECAY, LABEL_DROP = 64, 1e-3, 0.05, 0.1
CHECK_EVERY = 50  # updates between evaluations of the held-out loss


@dataclass(frozen=True)
class Labelled:
    """images: float32 [n, C, H, W]; labels: int64 [n], or None without classes."""

    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor | slice) -> "Labelled":
        return Labelled(self.images[index], None if self.labels is None else self.labels[index])


@dataclass(frozen=True)
class Trained:
    """held_out_auc: area under the ROC curve, held-out real images against held-out images of the student; update: at
    which the held-out loss was smallest, the one that is kept."""

    oracle: Oracle
    held_out_auc: float
    update: int


def train_oracle(config: OracleConfig, real: Labelled, drawn: Labelled, *, updates: int, seed: int) -> Trained:
    """Trains with AdamW and returns the oracle with the smallest loss on a held-out fifth of both sets (early stopping:
    it soon overfits a few hundred real images). Labels are dropped at random, so that it also works without them."""
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
            batch = images.take(torch.randint(len(images), (BATCH,), generator=generator, device="cpu"))
            labels = batch.labels
            if labels is not None:
                drop = torch.rand(BATCH, generator=generator, device="cpu") < LABEL_DROP
                labels = labels.masked_fill(drop, config.classes)
            scores = oracle(batch.images, labels)
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
    """Area under the ROC curve: the share of pairs in which the value of `above` [n] exceeds that of `below` [m], ties
    counting half."""
    larger = (above[:, None] > below).double() + (above[:, None] == below).double() / 2
    return float(larger.mean())


@torch.no_grad()
def _held_out_loss(oracle: Oracle, real: Labelled, drawn: Labelled) -> float:
    """Binary cross-entropy; both sets have the same weight, whatever their sizes."""
    right, wrong = oracle(real.images, real.labels), oracle(drawn.images, drawn.labels)
    return float(F.softplus(-right).mean() + F.softplus(wrong).mean()) / 2


def _part(images: Labelled, generator: torch.Generator) -> tuple[Labelled, Labelled]:
    order = torch.randperm(len(images), generator=generator, device="cpu")
    held = max(1, len(images) // 5)
    return images.take(order[:held]), images.take(order[held:])
