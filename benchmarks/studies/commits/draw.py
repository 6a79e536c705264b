"""Draws every case with the packages on the path: python draw.py base|current OUT.pt. Called by compare.py."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Case, cases
from torch import Tensor, nn
from tqdm import tqdm

import adadiff


def on_pretended_device(model: nn.Module, call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Runs a call on the simulated device of the tests, which computes on the CPU and behaves like a GPU."""
    from pretend import OnDevice, PretendDevice

    for part in model.modules():
        part._parameters.update({k: OnDevice(v.detach()) for k, v in part._parameters.items() if v is not None})
    with PretendDevice():
        return call()


def drawn(dialect: object, case: Case) -> dict[str, Tensor]:
    model = adadiff.load(case.model)
    if case.placement.startswith("device"):
        options = dialect.counts(case.placement.rpartition(" ")[2])
        return on_pretended_device(model, lambda: dialect.sample(model, case, **options))
    if case.placement == "engine":
        return dialect.engine(model, case)
    return dialect.sample(model, case, **(dialect.invariant() if case.placement == "batch-invariant" else {}))


def main() -> None:
    dialect, target = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    found = {case.name: drawn(dialect, case) for case in tqdm(list(cases()), desc=sys.argv[1], disable=None)}
    torch.save(found, target)


if __name__ == "__main__":
    main()
