"""Serving: throughput with mixed timesteps (here), and latency of requests with random arrivals (latency.py).

Throughput: U-ViT-S/2 at its CIFAR-10 shape, random weights, saturated servers. In the noisy half of its steps each
sample exits after block 2, in the other half it runs every block; samples are at evenly spread steps. The servers take
turns, one tick each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

import adadiff
from adadiff import Engine, Model
from adadiff.diffusion.solvers import DDIM
from adadiff.diffusion.tables import pack
from adadiff.forward.forward import run_forward
from adadiff.forward.options import ExecutionOptions
from adadiff.forward.structure import structure_of
from adadiff.policies.interface import ExitPolicy
from adadiff.uem import PAPER
from adadiff_kernels import solver_step
from benchmarks.baselines import servers
from benchmarks.baselines.attainable import Call, PlainPieces, rows_per_layer
from benchmarks.baselines.servers import DepthTable, Plain, Recorder, Saturated
from benchmarks.harness import Comparison, best_micro_batch, interleave
from benchmarks.rows import Rows, say
from benchmarks.suites import drawing, latency
from benchmarks.suites.latency import DIGITS, DIGITS_POLICY
from benchmarks.suites.network import PRESET, counts_by_kind

SUITE = "serving"
STEPS = 50
ATTAINABLE = "plain pieces"
SAME_ROWS = (servers.OURS, servers.STATIC, servers.INVARIANT)  # servers that run the same rows as the pieces


@dataclass(frozen=True)
class Sizes:
    """ticks: of each saturated server; digits_ticks: for the overhead on the digits."""

    capacity: int = 32
    ticks: int = 48
    digits_ticks: int = 200
    arrivals: latency.Sizes = latency.FULL


FULL = Sizes()
QUICK = Sizes(capacity=4, ticks=3, digits_ticks=20, arrivals=latency.QUICK)


def run(rows: Rows, sizes: Sizes) -> None:
    throughput(rows, sizes)
    overhead(rows, sizes)
    latency.digits(rows, sizes.arrivals)
    latency.simulated(rows, sizes.arrivals)


@dataclass(frozen=True)
class Server:
    """A saturated server under measurement. call: runs one tick. engine: None for the plain network's server."""

    call: Saturated
    recorder: Recorder
    num_layers: int
    engine: Engine | None = None

    @staticmethod
    def plain(model: Model, capacity: int, best: int, spread: bool = True, **settings: object) -> "Server":
        recorder = Recorder(servers.plain_network(best))
        server = Plain(model, capacity, recorder)
        call = Saturated(server, model.backbone.sample_shape, capacity, STEPS, spread, **settings)
        return Server(call, recorder, model.num_layers)

    @staticmethod
    def of(
        model: Model, capacity: int, policy: ExitPolicy | str, batch_invariant: bool = False, **settings: object
    ) -> "Server":
        recorder = Recorder(run_forward)
        execution = ExecutionOptions(batch_invariant=batch_invariant)
        server = Engine(model, capacity, threaded=False, execution=execution, forward=recorder)
        call = Saturated(server, model.backbone.sample_shape, capacity, STEPS, policy=policy, **settings)
        return Server(call, recorder, model.num_layers, server)

    def results(self) -> dict[str, object]:
        """Entries for a row. outside_network: share of a tick outside the forward pass, including the solver step."""
        ticks, network = np.array(self.call.seconds), np.array(self.recorder.seconds)
        found = {
            "mean_exit_layer": self.recorder.mean_exit_layer,
            "rows_per_layer": self.recorder.rows_per_layer(self.num_layers),
            "outside_network": float(np.median(ticks - network) / np.median(ticks)),
        }
        if self.engine is not None:
            found["rows_moved_per_tick"] = self.engine.report.batch.rows_moved / len(ticks)
            found["rows_moved_unordered"] = self.recorder.unordered_moves()
        return found


def throughput(rows: Rows, sizes: Sizes) -> None:
    """Measures ticks of all servers, and of the plain network's fastest pieces on the same rows."""
    say(f"serving: throughput, capacity {sizes.capacity}, {sizes.ticks} ticks, {torch.get_num_threads()} thread(s)")
    torch.manual_seed(0)
    model = adadiff.build(PRESET, exits=PAPER)
    depths = servers.two_phase(model.num_layers)
    B = sizes.capacity
    x, t = torch.randn(B, *model.backbone.sample_shape), torch.rand(B) * 999
    best = best_micro_batch(lambda m: model.backbone(x[:m], t[:m]), B)

    every = {
        servers.OURS: Server.of(model, B, DepthTable(depths)),
        servers.PLAIN: Server.plain(model, B, best),
        servers.STATIC: Server.of(model, B, DepthTable(depths, needs_scores=False)),
        servers.LOCK_STEP: Server.plain(model, B, best, spread=False),
        servers.MEAN: Server.of(model, B, DepthTable(depths, together="mean")),
        servers.AGREE: Server.of(model, B, DepthTable(depths, together="all")),
        servers.INVARIANT: Server.of(model, B, DepthTable(depths), batch_invariant=True),
        servers.NO_EXITS: Server.of(model, B, "full"),
    }
    ideal = attainable(model, (x, t, None), depths, best)
    pairs = {servers.OURS: ATTAINABLE, servers.NO_EXITS: servers.PLAIN}
    measured = measure(every, sizes.ticks, pairs, {ATTAINABLE: ideal})
    write(rows, sizes, every, measured, best)


def measure(
    every: Mapping[str, Server], ticks: int, pairs: Mapping[str, str], more: Mapping[str, Call] | None = None
) -> Comparison:
    calls = {name: server.call for name, server in every.items()}
    return interleave({**calls, **(more or {})}, ticks, pairs=pairs, label="serving, ticks")


def attainable(model: Model, inputs: tuple[torch.Tensor | None, ...], depths: Sequence[int], best: int) -> Call:
    """The plain network's fastest pieces on the rows that each block runs in a tick of ours, and a solver step."""
    lanes = len(inputs[0])
    exit_layer = torch.tensor(depths).repeat(-(-lanes // len(depths)))[:lanes]
    counts = rows_per_layer(exit_layer, model.num_layers)
    sizes = {best, structure_of(model.backbone).group_size}
    pieces = PlainPieces(model.backbone, inputs, counts_by_kind(model, [counts]), sizes)
    replay = pieces.replay(interleave(pieces.variants(), 3, turn=0.02, label="pieces"), counts)
    step = solver(model, inputs[0])

    def call() -> None:
        replay()
        step()

    return call


def solver(model: Model, x: torch.Tensor) -> Call:
    """One solver step for all of x."""
    tables = pack([DDIM().table(model.schedule, STEPS)])
    state, eps = tables.start(x), torch.zeros_like(x)
    table = np.zeros(len(x), dtype=np.int64)

    def call() -> None:
        _, coefficients = tables.rows(table, table)
        solver_step(state, eps, coefficients)

    return call


def write(rows: Rows, sizes: Sizes, every: Mapping[str, Server], measured: Comparison, best: int) -> None:
    """Writes a row for each server, with ratios to other servers in the same rounds."""
    parameters = {"preset": PRESET, "capacity": sizes.capacity, "steps": STEPS}
    for name in every:
        seconds = measured.median(name)
        results = every[name].results()
        for column, other in (("ours", servers.OURS), ("static", servers.STATIC), ("plain", servers.PLAIN)):
            if other in every:
                results[f"seconds_over_{column}"] = measured.ratio(name, other).median
        if ATTAINABLE in measured.times and name in SAME_ROWS:
            share = measured.ratio(ATTAINABLE, name)
            results["share_of_attainable"] = share.median
            results["share_of_attainable_spread"] = [share.quantile(0.2), share.quantile(0.8)]
        rows.write(
            SUITE,
            "throughput",
            name,
            parameters,
            dtype="float32",
            **measured.row(name),
            images_per_second=sizes.capacity / seconds / STEPS,
            evaluations_per_second=sizes.capacity / seconds,
            speedup=measured.ratio(servers.PLAIN, name).median,
            micro_batch=best,
            **results,
        )


def overhead(rows: Rows, sizes: Sizes) -> None:
    """Measures the overhead of the engine over plain network and solver, on the small network of the digits."""
    capacity = sizes.arrivals.digits_capacity
    say(f"serving: overhead on the digits, capacity {capacity}, {sizes.digits_ticks} ticks")
    model = drawing.load(DIGITS)
    labels, t = torch.arange(capacity) % 10, torch.linspace(0, 999, capacity)
    x = torch.randn(capacity, *model.backbone.sample_shape)
    best = best_micro_batch(lambda m: model.backbone(x[:m], t[:m], labels[:m]), capacity)
    every = {
        servers.PLAIN: Server.plain(model, capacity, best, class_labels=1),
        servers.NO_EXITS: Server.of(model, capacity, "full", class_labels=1),
        servers.OURS: Server.of(model, capacity, DIGITS_POLICY, class_labels=1),
    }
    measured = measure(every, sizes.digits_ticks, {servers.NO_EXITS: servers.PLAIN})
    for name, server in every.items():
        rows.write(
            SUITE,
            "overhead",
            name,
            {"model": DIGITS, "capacity": capacity, "steps": STEPS},
            dtype="float32",
            **measured.row(name),
            seconds_over_plain=measured.ratio(name, servers.PLAIN).median,
            micro_batch=best,
            **server.results(),
        )
