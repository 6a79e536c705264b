"""Speed up a pipeline of diffusers without training, and let a budget choose its thresholds.

    python examples/diffusers_pipeline.py

The pipeline here has random weights, so that nothing is downloaded. With your own, replace `tiny_pipeline()` by
`DiTPipeline.from_pretrained(...)` or any other of adadiff/pipelines/README.md; nothing else changes.

Takes 12 s of CPU time and prints:

    threshold 0.2: 36% of the blocks left out, difference 0.1180
    budget 50 %: difference 0.1403; each row is a lane, each column a step:
    transformer: policy 'cache:budget=0.5', 8 blocks
    each step: 20 steps, 8 lanes (# all blocks, . reused)
       0 ######.##...........  60% reused
       1 #####..#..........#.  65% reused
       2 ##########.#...#.#.#  30% reused
       3 #########.....#.....  50% reused
       4 ######.#...........#  60% reused
       5 ####...#..........#.  70% reused
       6 #########......#..#.  45% reused
       7 ######.##...#....#..  50% reused
    47.0% of the blocks left out in 20 calls, ... s in them; 0.1 MiB kept
    disabled: difference 0.0000
"""

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import adadiff


def tiny_pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=8, sample_size=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    decoder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    pipe = DiTPipeline(transformer.eval(), decoder.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    pipe, call = tiny_pipeline(), {"num_inference_steps": 20, "output_type": "np"}
    labels = [207, 360, 387, 974]
    full = torch.from_numpy(pipe(labels, generator=torch.manual_seed(1), **call).images)

    def difference() -> float:
        images = torch.from_numpy(pipe(labels, generator=torch.manual_seed(1), **call).images)
        return float((images - full).square().mean().sqrt())

    record = adadiff.enable(pipe, "cache:threshold=0.2")
    error = difference()
    print(f"threshold 0.2: {record.left_out:.0%} of the blocks left out, difference {error:.4f}")
    adadiff.disable(pipe)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cache.json"
        adadiff.calibrate(pipe, [1, 2, 3, 4], budget=0.5, path=file, progress=False, **call)
        adadiff.enable(pipe, file)
    error = difference()
    print(f"budget 50 %: difference {error:.4f}; each row is a lane, each column a step:")
    print(adadiff.summary(pipe))
    adadiff.disable(pipe)
    print(f"disabled: difference {difference():.4f}")


if __name__ == "__main__":
    main()
