"""python benchmarks/run.py: `python -m benchmarks` with the repository on the path, from any folder."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    path = [str(Path(__file__).resolve().parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])
