"""Profiler traces of one forward pass of U-ViT-L/2 with exits, and a table of its kernels' times.

python3 -m benchmarks.gpu.traces --out DIR       writes DIR/trace-BATCH.json.gz, for Perfetto or chrome://tracing
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import adadiff
from adadiff import ForwardOutput
from adadiff.policies.exits import Threshold
from benchmarks.gpu.network import inputs_of, random_model
from benchmarks.gpu.session import Session, device_or_exit

PRESET, BATCHES = "imagenet256_uvit_large", (8, 64)
SHARE = 0.1  # of the uncertainties below the threshold: some rows exit, most stay
WARM_UPS = 3


def forward_pass(session: Session, B: int) -> Callable[[], object]:
    model = random_model(session, PRESET)
    x, t, labels = inputs_of(session, model, B)

    def call(threshold: float, record_scores: bool = False) -> ForwardOutput:
        return adadiff.forward(model, x, t, labels, policy=Threshold(threshold), record_scores=record_scores)

    scores = call(1e-6, record_scores=True).scores[:-1].float()
    threshold = float(scores.flatten().nanquantile(SHARE))
    return lambda: call(threshold)


@torch.inference_mode()
def trace(session: Session, call: Callable[[], object], target: Path) -> str:
    """Writes the trace, and returns a table of the kernels with the longest times."""
    cuda = session.device.type == "cuda"
    for _ in range(WARM_UPS):
        call()
    session.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        call()
        session.synchronize()
    part = target.with_name("part-" + target.name)  # still ends in .gz: so the profiler compresses it
    profiler.export_chrome_trace(str(part))
    part.replace(target)
    return profiler.key_averages().table(
        sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=25, max_name_column_width=60
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the traces")
    parser.add_argument("--dry", action="store_true", help="a tiny network on the CPU")
    chosen = parser.parse_args(argv)
    session = Session(torch.device("cpu") if chosen.dry else device_or_exit("benchmarks.gpu.traces"))
    chosen.out.mkdir(parents=True, exist_ok=True)
    for B in (2, 3) if chosen.dry else BATCHES:
        call = forward_pass(session, B)
        target = chosen.out / f"trace-{B}.json.gz"
        print(f"\n{target.name}\n{trace(session, call, target)}", flush=True)


if __name__ == "__main__":
    main()
