"""Adapter to the API of commit 28883ee, with which later commits are compared. Needs its packages on the path."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from cases import BATCH, STEPS, Case, N
from torch import Tensor

import adadiff
from adadiff.engine import device as device_engine
from adadiff.exits import ExitConfig
from adadiff.rules import Threshold
from adadiff_kernels import device_set, ops


def rule(case: Case) -> str:
    n = case.numbers
    if case.policy == "full":
        return "full"
    if "theta" in n:
        return f"{case.policy}:{n['theta']},first={n['first']}"
    return f"{case.policy}:{n.get('depth', n.get('share'))}"


def settings(case: Case, model: object) -> dict:
    labels = model.config.classes
    given = {
        "rule": rule(case),
        "solver": case.solver,
        "steps": case.by_sample(STEPS),
        "labels": [i % labels for i in range(N)],
        "guidance": [scale - 1 for scale in case.by_sample(case.scales)],
        "tied": case.tied,
    }
    return given if case.interval is None else given | {"guidance_interval": case.interval}


def sample(model: object, case: Case, **options: object) -> dict[str, Tensor]:
    images, report = adadiff.sample(model, N, batch=BATCH, **settings(case, model), **options)
    return {"images": images, "exits": report.exit_layer, "macs": torch.tensor([report.macs, report.macs_full])}


def engine(model: object, case: Case) -> dict[str, Tensor]:
    given, exits = settings(case, model), torch.zeros(max(STEPS), N, 2, dtype=torch.uint8)
    steps, labels, guidance = given.pop("steps"), given.pop("labels"), given.pop("guidance")
    with adadiff.Engine(model, 2 * BATCH, start=False) as serving:
        handles = [
            serving.submit(seed=i, steps=steps[i], label=labels[i], guidance=guidance[i], **given) for i in range(N)
        ]
        while serving.step():
            pass
        totals = serving.report.batch
    for i, handle in enumerate(handles):
        exits[: steps[i], i] = handle.report.exit_layer[:, 0]
    images = torch.stack([handle.result(0) for handle in handles])
    return {"images": images, "exits": exits, "macs": torch.tensor([totals.macs, totals.macs_full])}


def counts(strategy: str) -> dict:
    """Option of `sample` for how the host learns the number of running rows from a device."""
    return {"counts": strategy}


def invariant() -> dict:
    return {"batch_invariant": True}


def forward(model: object, x: Tensor, t: Tensor, labels: Tensor | None, theta: float, **options: object) -> object:
    """One forward pass without exits in which every block is scored."""
    return adadiff.evaluate(model.backbone, model.exits, Threshold(theta), x, t, labels, **options)


def compiled() -> dict:
    """Options of `forward` for compiled blocks."""
    return {"compiled": True}


def budget(model: object, x: Tensor, t: Tensor, labels: Tensor, share: float) -> object:
    """One forward pass with the model's calibrated policy for `share`."""
    return adadiff.evaluate(model.backbone, model.exits, model.calibration.rule("budget", share), x, t, labels)


def draw(model: object, n: int, steps: int, theta: float, labels: list[int] | None, batch: int) -> Tensor:
    return adadiff.sample(model, n, steps=steps, rule=f"threshold:{theta}", labels=labels, batch=batch)[0]


def shared_head() -> ExitConfig:
    return ExitConfig(shared_head=True)


@contextmanager
def noop_launches() -> Iterator[None]:
    """The device placement on CPU tensors, with launches of our kernels as no-ops. What remains is the host's time and
    PyTorch's operators, which the plain network has, too."""
    kernels = [importlib.import_module(f"adadiff_kernels.triton_{name}") for name in KERNELS]
    sets: dict[int, device_set.DeviceSet] = {}

    @contextmanager
    def prepared(B: int, device: torch.device) -> Iterator[device_set.DeviceSet]:
        if B not in sets:
            sets[B] = made = device_set.DeviceSet(B, device)
            made._kernel, made._address, made._word = True, 8, Everybody()
            made.seen = lambda: device_set.Seen(0, B)
            made.wait = lambda layer: B
        sets[B].start()
        yield sets[B]

    with ExitStack() as patches:

        def patch(owner: object, name: str, value: object) -> None:
            patches.enter_context(mock.patch.object(owner, name, value))

        for module in kernels:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch(module, name, NoLaunch())
        patch(ops, "choose", lambda *given, **named: "triton")
        patch(device_set, "_C", SimpleNamespace(compact=nothing, start=nothing))
        patch(device_set, "_place", lambda tensor: (0, 0))
        patch(device_engine, "_device_set", prepared)
        yield


KERNELS = ("residual_uem", "rows", "save_rows", "solver_step")


class NoLaunch:
    """kernel[grid](...)"""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return nothing


class Everybody:
    """Replaces the pinned count; always reads 0."""

    device_address = 8

    def read(self) -> int:
        return 0


def nothing(*_: object, **__: object) -> None: ...


def ways_of_the_device() -> dict[str, dict]:
    return {"ours": {"counts": "lagged"}}
