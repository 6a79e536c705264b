"""A small classifier of letters (data/letters.py); its penultimate layer gives the features for distances.

It is trained on training families only. `python -m adadiff.metrics.letters_network letters.npz` trains it again (one
thread, fixed seed) and writes the shipped file.
"""

import argparse
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import built, read_tensors, write_tensors
from ..data.glyphs import CHARACTERS, SIZE
from ..data.image_sets import Pixels
from ..data.letters import load_letters
from .features import shift

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "letters_features.safetensors"
CLASSES = len(CHARACTERS)
FEATURES = 64
CHUNK = 1024  # images at a time


class LettersNet(nn.Module):
    """Four convolutions and two linear layers; 200,000 parameters at width 32.

    No layer mixes samples of a batch. SiLU rather than ReLU, because a dead feature would make the covariance singular.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, w, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(w, 3 * w // 2, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(3 * w // 2, 2 * w, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * w, 3 * w, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.penultimate = nn.Linear(3 * w * 4 * 4, FEATURES)
        self.classify = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """images: float32 [N, 1, 32, 32] in [-1, 1]. Returns float32 [N, 64]. Raises ValueError for others."""
        if images.shape[1:] != (1, SIZE, SIZE) or images.dtype != torch.float32:
            raise ValueError(
                f"the letters features take float32 [N, 1, 32, 32], got {images.dtype} {list(images.shape)}"
            )
        return F.silu(self.penultimate(self.convolutions(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """images: float32 [N, 1, 32, 32] in [-1, 1]. Returns logits float32 [N, 62]."""
        return self.classify(self.features(images))


def train(
    data: Pixels, *, updates: int, seed: int = 0, batch: int = 128, width: int = 32, lr: float = 2e-3
) -> LettersNet:
    """Cross-entropy with label smoothing 0.05, AdamW, learning rate with warm-up and cosine, random shifts by one
    pixel. Convolutions run in bfloat16, channels last, which takes a third of the time on CPUs that support it.

    The result depends only on the arguments, the PyTorch build and the number of threads; the global random state is
    unchanged. Raises ValueError if there is nothing to train on.
    """
    if updates < 1 or batch < 1 or len(data) == 0:
        raise ValueError(f"training takes updates, batch and images >= 1, got {updates=}, {batch=}, {len(data)} images")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LettersNet(width).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    warmup = max(1, updates // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 0.05, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, updates - warmup)),
        ],
        [warmup],
    )
    for _ in range(updates):
        images, labels = data.batch(torch.randint(len(data), (batch,), generator=generator, device="cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(shift(images, generator))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return network.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


@torch.inference_mode()
def read(network: LettersNet, data: Pixels) -> Tensor:
    """The network's prediction for each image: labels, int64 [n]."""
    chunks = torch.arange(len(data), device="cpu").split(CHUNK)
    return torch.cat([network(data.batch(rows)[0]).argmax(1) for rows in chunks])


def load(path: Path = CHECKPOINT) -> LettersNet:
    """The network of `path`, in float32 whatever its stored dtype, in evaluation mode and without gradients.

    Raises ValueError for a file that is missing, truncated or of another network.
    """
    tensors, _ = read_tensors(path)
    tensors = {name: value.float() for name, value in tensors.items()}
    return built(LettersNet, tensors, str(path)).eval().requires_grad_(False)


@cache
def letters_network() -> LettersNet:
    """The shipped network, read once."""
    return load()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m adadiff.metrics.letters_network", description=__doc__)
    parser.add_argument("data", type=Path, help="file that `adadiff data letters` wrote")
    parser.add_argument("--updates", type=int, default=4000, help="of 128 images each (default: 4000)")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="file to write (default: the shipped one)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same summation order on every machine
    network = train(load_letters(options.data, "train"), updates=options.updates)
    stored = {name: value.half() for name, value in network.state_dict().items()}
    write_tensors(options.out, stored, {"updates": options.updates})
    network = load(options.out)
    for split in ("train", "test"):
        data = load_letters(options.data, split)
        right = read(network, data) == data.labels
        print(f"{split}: {int(right.sum())} of {len(data)} read correctly ({float(right.double().mean()):.4f})")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
