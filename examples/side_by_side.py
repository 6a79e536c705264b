"""Compare the full network with early exit, and tint each image by the blocks that it took.

    python examples/side_by_side.py

Top row: full network. Middle row: the same noises with early exit. Bottom row: the middle one in colours from blue (few
blocks) to yellow (many). The differences are root mean squares, of pixels in [-1, 1].

Takes 5 s of CPU time, writes side_by_side.png and prints:

    label  blocks a step  difference
        0            5.5        0.04
        1            5.5        0.17
        2            5.5        0.04
        3            6.4        0.02
        4            5.7        0.03
       10            7.8        0.04
       11            7.8        0.03
       12            7.8        0.05
       13            7.7        0.05
       14            7.7        0.04
    wrote side_by_side.png
"""

from pathlib import Path

import numpy as np
from torch import Tensor

import adadiff
from adadiff.output.pictures import make_grid, to_pixels, write_png

FEW, MANY = np.array([60, 110, 255]), np.array([255, 220, 60])


def tinted(image: Tensor, share: float) -> np.ndarray:
    """image: [1, H, W]; share: 0 for FEW, 1 for MANY. Returns uint8 [H, W, 3]."""
    colour = (1 - share) * FEW + share * MANY
    return (to_pixels(image)[..., None] / 255 * colour).astype(np.uint8)


def main() -> None:
    model = adadiff.load("canvases")
    labels = [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    settings = {"class_labels": labels, "steps": 20}
    full, _ = adadiff.sample(model, len(labels), policy="full", **settings)
    early, report = adadiff.sample(model, len(labels), policy="exit:budget=0.55", **settings)
    depth = report.exit_layer[:, :, 0].double().mean(0)  # [n], mean over the steps
    error = (full - early).square().flatten(1).mean(1).sqrt()
    print("label  blocks a step  difference")
    for label, blocks, apart in zip(labels, depth.tolist(), error.tolist(), strict=True):
        print(f"{label:5} {blocks:14.1f} {apart:11.2f}")
    share = (depth - depth.min()) / (depth.max() - depth.min())
    grey = [np.repeat(to_pixels(image)[..., None], 3, axis=2) for image in (*full, *early)]
    colours = [tinted(image, float(own)) for image, own in zip(early, share, strict=True)]
    write_png(Path("side_by_side.png"), make_grid([*grey, *colours], columns=len(labels)))
    print("wrote side_by_side.png")


if __name__ == "__main__":
    main()
