"""A forward pass with replayed exits, by every strategy of counting rows, compared with the plain network: eager,
compiled, and both as one CUDA graph. Random weights, bfloat16.

Blocks are compiled one by one (there are two kinds of block at any depth). The attainable time of a pattern is that of
another CUDA graph: stem, head, and each block in the faster way on exactly its rows, which are known in advance.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import adadiff
from adadiff import ExecutionOptions, ForwardOutput, Model
from adadiff.config import PRESETS as PRESETS_BY_NAME
from adadiff.models.dit import DiTConfig
from adadiff.models.interface import Backbone
from adadiff.models.uvit import UViTConfig
from adadiff.policies.exits import Replay
from adadiff.uem import PAPER
from benchmarks.baselines.attainable import PlainPieces, rows_per_layer, share_of_flop_ideal
from benchmarks.gpu.session import Call, Session, Task, check_close, teraflops
from benchmarks.harness import Comparison
from benchmarks.suites.network import attainable, counts_by_kind, run_block

SUITE = "gpu-network"
BRAIN = torch.bfloat16
PRESETS = ("imagenet256_uvit_large", "dit_xl_2_256", "imagenet256_uvit_huge", "cifar10_uvit_small")
BATCHES = (64, 8, 1, 256)
PIECES = {"runner": "captured"}
STRATEGIES = {
    "sync": ExecutionOptions(count_sync="sync"),
    "lagged": ExecutionOptions(count_sync="lagged"),
    "pieces sync": ExecutionOptions(**PIECES, count_sync="sync"),
    "pieces lagged": ExecutionOptions(**PIECES, count_sync="lagged:1"),
    "pieces": ExecutionOptions(**PIECES),
}
PLAIN, COMPILED = "plain, eager", "plain, compiled"
GRAPHS = {PLAIN: "plain, eager, graph", COMPILED: "plain, compiled, graph"}
TINY = {
    "uvit": UViTConfig(8, 1, 2, 64, 12, 4, num_classes=5),
    "dit": DiTConfig(8, 2, 2, 24, 13, 3, num_classes=5),
}
Inputs = tuple[Tensor, Tensor, Tensor | None]


def tasks(session: Session) -> Iterator[Task]:
    for preset in session.chosen(PRESETS, session.presets):
        made: list[Network] = []  # made by the first batch size that is measured
        for B in (5,) if session.dry else session.chosen(BATCHES, session.batches):
            yield Task("pattern", {"preset": preset, "batch": B}, partial(measure, session, made, preset, B))


def patterns(batch: int, num_layers: int) -> dict[str, Tensor]:
    """Exit layer of each lane, float [batch], by pattern: those of the CPU's suite, at any depth."""
    lane, deep = torch.arange(batch), torch.tensor(float(num_layers))
    spread = torch.linspace(3, num_layers, batch).round()
    return {
        "nobody": deep.expand(batch),
        "same": torch.full((batch,), float((num_layers + 1) // 2)),
        "spread": spread[torch.randperm(batch, generator=torch.Generator().manual_seed(0))],
        "two-phase": torch.where(lane % 2 == 0, 2.0, deep),
    }


class Network:
    """A model on the device, and its compiled blocks: for a fixed and for any number of rows."""

    def __init__(self, session: Session, preset: str) -> None:
        torch.compiler.reset()
        self.model = random_model(session, preset)
        self.fixed = session.compile(run_block, dynamic=False)
        self.dynamic = session.compile(run_block, dynamic=True)


def random_model(session: Session, preset: str) -> Model:
    """A bfloat16 model with exits and random parameters, including those initialised to zero (such as DiT's gates). In
    a dry run it is a tiny one of the same family."""
    torch.manual_seed(0)
    config = replace(PRESETS_BY_NAME[preset], exits=PAPER)
    if session.dry:
        config = replace(config, network=TINY[config.family], null_label=None, guided_channels=None)
    with session.device:
        model = Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.to(BRAIN).requires_grad_(False).eval()


def measure(session: Session, made: list[Network], preset: str, B: int) -> None:
    if not made:
        made.append(Network(session, preset))
    inputs = inputs_of(session, made[0].model, B)
    # kinds of block x batches x (one row, several): more variants than Dynamo's default limit
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=64):
        compare(session, made[0], inputs, {"preset": preset, "batch": B})


def compare(session: Session, network: Network, inputs: Inputs, parameters: dict[str, object]) -> None:
    model, B = network.model, len(inputs[0])

    def compiled() -> Tensor:
        return plain(model.backbone, network.fixed, inputs)

    baselines: dict[str, Call] = {PLAIN: lambda: model.backbone(*inputs), COMPILED: compiled}
    check_close("the compiled network", compiled(), baselines[PLAIN](), 2e-2)
    baselines |= {graph: session.captured(baselines[name], shared=True) for name, graph in GRAPHS.items()}

    results: dict[str, ForwardOutput] = {}
    runs: dict[str, Call] = {}
    wanted = {name: exits.to(session.device) for name, exits in patterns(B, model.num_layers).items()}
    for name, exits in wanted.items():
        for strategy, execution in strategies(session).items():
            run = f"{name}, {strategy}"
            runs[run] = pass_of(model, inputs, exits, execution)
            results[run] = warmed(runs[run], execution, 1 if session.dry else 8)
            check(run, results, exits, first=f"{name}, {next(iter(STRATEGIES))}")

    ideal = attainables(session, model, inputs, wanted, network.dynamic)
    measured = session.compare({**baselines, **runs, **ideal}, repeats=5)
    write(session, parameters, model, measured, tuple(baselines), results)


def inputs_of(session: Session, model: Model, B: int) -> Inputs:
    x = session.normal(B, *model.backbone.sample_shape, dtype=BRAIN)
    t = torch.linspace(1, 999, B, device=session.device)
    classes = model.config.network.num_classes
    labels = torch.arange(B, device=session.device) % classes if classes else None
    return x, t, labels


def plain(backbone: Backbone, through: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> Tensor:
    """The full network, with blocks called as `through(block, rows, cond)`, followed by `skip` if they have one."""
    rows, cond = backbone.embed(*inputs)
    outputs: list[Tensor] = []
    for block in backbone.blocks:
        skip = () if block.skip_from is None else (outputs[block.skip_from],)
        outputs.append(through(block, outputs[-1] if outputs else rows, cond, *skip))
    lanes = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    return backbone.head(outputs[-1][:, backbone.num_prefix_tokens :], cond, lanes)


def strategies(session: Session) -> dict[str, ExecutionOptions]:
    """The strategies that the device supports: captured ones need a GPU."""
    on_cpu = session.device.type == "cpu"
    return {name: own for name, own in STRATEGIES.items() if not on_cpu or own.runner != "captured"}


def pass_of(model: Model, inputs: Inputs, exits: Tensor, execution: ExecutionOptions) -> Callable[[], ForwardOutput]:
    given = {"policy": Replay(), "threshold": exits, "execution": execution}
    return lambda: adadiff.forward(model, *inputs, **given)


def warmed(run: Callable[[], ForwardOutput], execution: ExecutionOptions, passes: int) -> ForwardOutput:
    """The result of a pass after so many others, in which a captured runner records its graphs and times blocks."""
    for _ in range(passes if execution.runner == "captured" else 0):
        run()
    return run()


def check(name: str, results: dict[str, ForwardOutput], exits: Tensor, first: str) -> None:
    """Raises RuntimeError unless the run has the requested exits and the prediction of run `first`."""
    found, wanted = results[name].exit_layer.cpu(), exits.int().cpu()
    if not torch.equal(found, wanted):
        raise RuntimeError(f"{name}: lanes exited after {found.tolist()[:8]} blocks, not {wanted.tolist()[:8]}")
    check_close(name, results[name].prediction, results[first].prediction, 2e-2)


def attainables(
    session: Session,
    model: Model,
    inputs: Inputs,
    wanted: dict[str, Tensor],
    compiled: Callable[..., Tensor],
) -> dict[str, Call]:
    counts = {name: rows_per_layer(exits.cpu(), model.num_layers) for name, exits in wanted.items()}
    pieces = PlainPieces(model.backbone, inputs, counts_by_kind(model, list(counts.values())), compiled=compiled)
    ways = {name: session.captured(call, shared=True) for name, call in pieces.variants().items()}
    found = session.compare(ways, repeats=3)
    return {attainable(name): session.captured(pieces.replay(found, own), shared=True) for name, own in counts.items()}


def write(
    session: Session,
    parameters: dict[str, object],
    model: Model,
    measured: Comparison,
    baselines: Sequence[str],
    results: dict[str, ForwardOutput],
) -> None:
    B = parameters["batch"]
    fastest = min(baselines, key=measured.median)
    full = next(iter(results.values())).macs_full

    def common(name: str, macs: int) -> dict[str, object]:
        return {
            "evaluations_per_second": B / measured.median(name),
            "tflops": teraflops(measured.median(name), macs),
            "speedup": measured.ratio(fastest, name).median,
            "fastest_plain": fastest,
        }

    session.write(SUITE, "baseline", parameters, measured, {name: common(name, full) for name in baselines}, BRAIN)
    rows = {}
    for name, result in results.items():
        share = measured.ratio(attainable(name.rpartition(", ")[0]), name)
        counts = rows_per_layer(result.exit_layer.cpu(), model.num_layers)
        own = common(name, result.macs)
        rows[name] = {
            **own,
            "share_of_attainable": share.median,
            "share_of_attainable_spread": [share.quantile(0.2), share.quantile(0.8)],
            "share_of_flop_ideal": share_of_flop_ideal(own["speedup"], result.macs, full),
            "blocks": sum(counts),
            "blocks_full": B * model.num_layers,
            "macs": result.macs,
            "macs_full": full,
            "rows_run": sum(result.rows),  # includes rows of exited lanes, where the bound was too large
            "rows_moved": result.rows_moved,
        }
    session.write(SUITE, "pattern", parameters, measured, rows, BRAIN)
