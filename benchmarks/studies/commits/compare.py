"""Does this commit draw the same as an earlier one? Compares images, exits and multiply-adds of 64 seeds, for solvers,
policies and guidance, on the CPU, on a simulated device and in the engine.

python benchmarks/studies/commits/compare.py                   compares with commit 28883ee, on this machine
python benchmarks/studies/commits/compare.py --keep FOLDER     keeps the worktree and its results for later runs

Both commits are run on the same machine, because bits depend on the instruction set.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cases import COMMIT, PLACEMENTS
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


@contextmanager
def worktree(keep: Path | None) -> Iterator[Path]:
    """A worktree of the earlier commit, with its extension built."""
    with tempfile.TemporaryDirectory() as temporary:
        tree = (keep or Path(temporary)) / COMMIT
        if not tree.exists():
            subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), COMMIT], check=True)
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, check=True, env={**os.environ, "ADADIFF_CUDA": "0"})
        try:
            yield tree
        finally:
            if keep is None:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def python(tree: Path, *arguments: str) -> None:
    """Runs a script of this folder with the packages of a worktree."""
    path = os.pathsep.join(map(str, (tree, tree / "python", tree / "tests", HERE)))
    subprocess.run([sys.executable, *arguments], cwd=HERE, check=True, env={**os.environ, "PYTHONPATH": path})


def draw(tree: Path, dialect: str, target: Path) -> dict[str, dict[str, Tensor]]:
    python(tree, "draw.py", dialect, str(target))
    return torch.load(target)


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, divided by the largest value."""
    if torch.equal(one.isfinite(), other.isfinite()):
        one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def report(base: dict[str, dict[str, Tensor]], current: dict[str, dict[str, Tensor]]) -> bool:
    """Prints a line for each placement, and for each case that is not bit-identical. Returns whether all exits and
    multiply-adds are the same."""
    fine = True
    print("placement          cases same bits  images differ by other exits other MACs")
    for placement in PLACEMENTS:
        names = [name for name in base if name.startswith(f"{placement};")]
        differ = {name: difference(current[name]["images"], base[name]["images"]) for name in names}
        exits = [name for name in names if not torch.equal(current[name]["exits"], base[name]["exits"])]
        macs = [name for name in names if not torch.equal(current[name]["macs"], base[name]["macs"])]
        images = [name for name in names if not torch.equal(current[name]["images"], base[name]["images"])]
        most = max(differ.values(), default=0.0)
        print(f"{placement:18} {len(names):5} {len(names) - len(images):9} {most:17.1e} {len(exits):11} {len(macs):10}")
        fine &= not exits and not macs
        for name in dict.fromkeys([*exits, *macs, *images]):
            other = int((current[name]["exits"] != base[name]["exits"]).sum())
            print(f"    {name}: {other} of {base[name]['exits'].numel()} exits, images differ by {differ[name]:.1e}")
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the worktree and its results, reused if it exists")
    keep = parser.parse_args().keep
    keep = keep and keep.resolve()
    with worktree(keep) as tree, tempfile.TemporaryDirectory() as temporary:
        old = (keep or Path(temporary)) / "base.pt"
        base = torch.load(old) if old.exists() else draw(tree, "base", old)
        current = draw(ROOT, "current", Path(temporary) / "current.pt")
    sys.exit(not report(base, current))


if __name__ == "__main__":
    main()
