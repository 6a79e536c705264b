"""A small classifier of 8x8 digits; its penultimate layer gives the features for the Fréchet distance.

Inception features are meaningless at 8x8 pixels, so digits have their own network, trained on the train split only.
`python -m adadiff.metrics.features` trains it again (one thread, fixed seed) and writes the shipped file.
"""

import argparse
import hashlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import built, read_tensors, write_tensors
from ..data.digits import digits

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "digits_features.safetensors"
CLASSES = 10
# A covariance of F features from N images is singular for F >= N and poor near it. About 360 images are held out; 32 is
# far below even half of them.
FEATURES = 32


class DigitsNet(nn.Module):
    """Three convolutions and two linear layers; 28,000 parameters.

    No layer mixes samples of a batch. SiLU rather than ReLU, because a dead feature would make the covariance singular.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
        )
        self.penultimate = nn.Linear(32 * 4 * 4, FEATURES)
        self.classify = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """images: float32 [N, 1, 8, 8] in [-1, 1]. Returns float32 [N, 32]."""
        if images.shape[1:] != (1, 8, 8) or images.dtype != torch.float32:
            raise ValueError(f"the digits features take float32 [N, 1, 8, 8], got {images.dtype} {list(images.shape)}")
        return F.silu(self.penultimate(self.convolutions(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """images: float32 [N, 1, 8, 8] in [-1, 1]. Returns logits float32 [N, 10]."""
        return self.classify(self.features(images))


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each image of [N, 1, H, W] by -1, 0 or 1 pixel in both directions, filling with background (-1)."""
    N, _, H, W = images.shape
    windows = F.pad(images, (1, 1, 1, 1), value=-1.0).unfold(2, H, 1).unfold(3, W, 1)  # [N, 1, 3, 3, H, W]
    dy, dx = torch.randint(3, (2, N), generator=generator, device="cpu")
    return windows[torch.arange(N, device="cpu"), :, dy, dx]


def train(images: Tensor, labels: Tensor, *, epochs: int = 60, seed: int = 0, batch: int = 64) -> DigitsNet:
    """Cross-entropy with label smoothing 0.1, AdamW, cosine learning rate from 3e-3, random shifts by one pixel.

    images: float32 [N, 1, 8, 8]; labels: int64 [N]. The result depends only on the arguments, the PyTorch build and the
    number of threads; the global random state is unchanged. Raises ValueError for empty or mismatched data.
    """
    if epochs < 1 or batch < 1 or len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"training takes epochs, batch >= 1 and one label an image, got {epochs=}, {batch=}, "
            f"images {list(images.shape)}, labels {list(labels.shape)}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsNet()
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator, device="cpu").split(batch):
            logits = network(shift(images[rows], generator))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def fingerprint(images: Tensor) -> str:
    """SHA-256 of the pixels, stored in the checkpoint to identify the training images."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def load(path: Path = CHECKPOINT) -> DigitsNet:
    """The network of `path`, in evaluation mode and without gradients.

    Raises ValueError for a file that is missing, truncated or of another network.
    """
    tensors, _ = read_tensors(path)
    return built(DigitsNet, tensors, str(path)).eval().requires_grad_(False)


@cache
def digits_network() -> DigitsNet:
    """The shipped network, read once."""
    return load()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m adadiff.metrics.features", description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="file to write (default: the shipped one)")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # the same summation order on every machine
    images, labels = digits("train")
    network = train(images, labels)
    write_tensors(out, network.state_dict(), {"train_images": fingerprint(images)})
    for split in ("train", "test"):
        images, labels = digits(split)
        correct = int((network(images).argmax(1) == labels).sum())
        print(f"{split}: {correct} of {len(labels)} correct ({correct / len(labels):.4f})")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
