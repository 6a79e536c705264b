"""Adapter to the API of this commit, see base.py."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from cases import BATCH, STEPS, Case, N
from torch import Tensor

import adadiff
from adadiff import ExecutionOptions
from adadiff.forward import forward as forward_pass
from adadiff.forward import spaces
from adadiff.policies.exits import Threshold
from adadiff.sampling import batch
from adadiff.sampling.batch import Batch
from adadiff.sampling.sample_batch import SampleBatch
from adadiff.uem import ExitConfig
from adadiff_kernels import dispatch
from adadiff_kernels.compaction import device_set


def policy(case: Case) -> str:
    n = case.numbers
    if case.policy == "full":
        return "full"
    if "theta" in n:
        kind = "" if case.policy == "threshold" else f"{case.policy}="
        more = ",patience=0" if case.policy == "batch-mean" else ""
        return f"exit:{kind}{n['theta']},min_layer={n['first']}{more}"
    return f"exit:{case.policy}={n.get('depth', n.get('share'))}"


def settings(case: Case, model: object) -> dict:
    labels = model.config.classes
    given = {
        "policy": policy(case),
        "solver": case.solver,
        "steps": case.by_sample(STEPS),
        "class_labels": [i % labels for i in range(N)],
        "guidance_scale": case.by_sample(case.scales),
        "tied": case.tied,
    }
    return given if case.interval is None else given | {"guidance_interval": case.interval}


def sample(model: object, case: Case, **options: object) -> dict[str, Tensor]:
    images, report = adadiff.sample(model, N, batch=BATCH, **settings(case, model), **options)
    return {"images": images, "exits": report.exit_layer, "macs": torch.tensor([report.macs, report.macs_full])}


def engine(model: object, case: Case) -> dict[str, Tensor]:
    given, exits = settings(case, model), torch.zeros(max(STEPS), N, 2, dtype=torch.uint8)
    by_sample = {name: given.pop(name) for name in ("steps", "class_labels", "guidance_scale")}
    with adadiff.Engine(model, 2 * BATCH, threaded=False) as serving:
        handles = [
            serving.submit(seed=i, **{name: values[i] for name, values in by_sample.items()}, **given) for i in range(N)
        ]
        while serving.step():
            pass
        totals = serving.report.batch
    for i, handle in enumerate(handles):
        exits[: by_sample["steps"][i], i] = handle.report.exit_layer[:, 0]
    images = torch.stack([handle.result(0) for handle in handles])
    return {"images": images, "exits": exits, "macs": torch.tensor([totals.macs, totals.macs_full])}


def counts(strategy: str) -> dict:
    """Option of `sample` for how the host learns the number of running rows from a device."""
    return {"execution": ExecutionOptions(count_sync=strategy)}


def invariant() -> dict:
    return {"execution": ExecutionOptions(batch_invariant=True)}


def forward(model: object, x: Tensor, t: Tensor, labels: Tensor | None, theta: float, **options: object) -> object:
    """One forward pass without exits in which every block is scored."""
    return adadiff.forward(model, x, t, labels, policy=Threshold(theta), **options)


def compiled() -> dict:
    """Options of `forward` for compiled blocks."""
    return {"execution": ExecutionOptions(runner="compiled")}


def budget(model: object, x: Tensor, t: Tensor, labels: Tensor, share: float) -> object:
    """One forward pass with the model's calibrated policy for `share`."""
    return adadiff.forward(model, x, t, labels, policy=model.calibration.policy("budget", share))


def draw(model: object, n: int, steps: int, theta: float, labels: list[int] | None, batch: int) -> Tensor:
    return adadiff.sample(model, n, steps=steps, policy=f"exit:{theta}", class_labels=labels, batch=batch)[0]


def shared_head() -> ExitConfig:
    return ExitConfig(shared_head=True)


@contextmanager
def noop_launches() -> Iterator[None]:
    """The device placement on CPU tensors, with launches of our kernels as no-ops. What remains is the host's time and
    PyTorch's operators, which the plain network has, too."""
    kernels = [importlib.import_module(f"adadiff_kernels.{name}.kernel") for name in KERNELS]
    sets: dict[int, device_set.DeviceSet] = {}

    @contextmanager
    def prepared(B: int, device: torch.device) -> Iterator[device_set.DeviceSet]:
        if B not in sets:
            sets[B] = Prepared(B, device)
        sets[B].start()
        yield sets[B]

    class Prepared(device_set.DeviceSet):
        """A device set whose kernel is a no-op."""

        def __init__(self, lanes: int, device: torch.device) -> None:
            super().__init__(lanes, device)
            self._kernel, self._address, self._word = True, 8, Everybody()

        def seen(self) -> device_set.CountSnapshot:
            return device_set.CountSnapshot(0, self._started)

        def wait(self, layer: int) -> int:
            return self._started

    with ExitStack() as patches:

        def patch(owner: object, name: str, value: object) -> None:
            patches.enter_context(mock.patch.object(owner, name, value))

        for module in kernels:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch(module, name, NoLaunch())
        patch(dispatch, "choose", lambda *given, **named: "triton")
        core = SimpleNamespace(compact=nothing, start=nothing)
        patch(device_set, "extension", SimpleNamespace(core=core))
        patch(device_set, "_stream", lambda tensor: (0, 0))
        patch(forward_pass, "device_set", prepared)
        patch(forward_pass, "check_execution", nothing)
        patch(batch, "check_execution", nothing)
        patch(spaces, "DeviceSet", Prepared)
        patch(spaces, "graphs_on", lambda device: NoGraphs())
        patch(spaces, "_spaces", type(spaces._spaces)())
        yield


KERNELS = ("residual_uem", "join_skip", "settle_rows", "solver_step")


class NoGraphs:
    """Graphs whose launch is a no-op."""

    def aside(self, work: Callable[[], None]) -> None:
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return nothing


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


def ticks(model: object, n: int, theta: float) -> Callable[[], object]:
    """A call that runs a tick of a batch of n samples with captured passes; no sample finishes."""
    made = Batch(model, n, execution=ExecutionOptions(runner="captured", count_sync="lagged"))
    made.admit(SampleBatch.of(model, n, policy=f"exit:{theta}", solver="ddim", steps=1000), np.arange(n))
    return made.tick


def ways_of_the_device() -> dict[str, dict]:
    """Options of `forward` by name; the first is compared with other commits."""
    return {
        "ours": counts("lagged"),
        "captured": {"execution": ExecutionOptions(runner="captured", count_sync="lagged")},
    }
