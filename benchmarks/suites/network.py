"""U-ViT-S/2 at its CIFAR-10 shape, random weights: time of replayed exit patterns compared with the plain network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import adadiff
from adadiff import ForwardOutput, Model
from adadiff.forward.structure import structure_of
from adadiff.policies.exits import Full, Replay
from adadiff.policies.interface import ExitPolicy
from adadiff.sampling.capacity import peak_bytes
from adadiff.uem import PAPER
from benchmarks.baselines.attainable import Call, PlainPieces, kinds, rows_per_layer, share_of_flop_ideal
from benchmarks.harness import Comparison, best_micro_batch, interleave, threads
from benchmarks.rows import Rows, dtype_name, say

SUITE = "network"
PRESET = "cifar10_uvit_small"
PLAIN = "plain, one batch"


@dataclass(frozen=True)
class Setting:
    """Setting of one comparison. limit: seconds, see `interleave`; compiled: also measure torch.compile."""

    batch: int
    dtype: torch.dtype
    threads: int
    repeats: int = 5
    limit: float = 120.0
    compiled: bool = False

    def __str__(self) -> str:
        return f"batch {self.batch}, {dtype_name(self.dtype)}, {self.threads} thread(s)"


def patterns(batch: int, num_layers: int) -> dict[str, Tensor]:
    """Exit layer of each lane, float [batch], as thresholds of the policy `Replay`."""
    lane = torch.arange(batch)
    spread = torch.linspace(3, num_layers, batch).round()
    shuffled = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    deep = torch.tensor(float(num_layers))
    return {
        "nobody leaves": deep.expand(batch),
        "same": torch.full((batch,), 7.0),
        "spread": spread[shuffled],
        "two-phase": torch.where(lane % 2 == 0, 2.0, deep),  # every other lane: most rows to move
        "two-phase, ordered": torch.where(lane < batch // 2, deep, 2.0),  # by expected depth: no rows to move
    }


def run(rows: Rows, settings: Sequence[Setting]) -> None:
    for setting in settings:
        say(f"network: {setting}")
        with threads(setting.threads):
            measure(rows, setting)


def measure(rows: Rows, setting: Setting) -> None:
    """Measures baselines, patterns and pieces of the plain network in turns, and writes rows for the first two."""
    B = setting.batch
    torch.manual_seed(0)
    model = adadiff.build(PRESET, exits=PAPER).to(setting.dtype)
    x, t = torch.randn(B, *model.backbone.sample_shape), torch.rand(B) * 999
    baselines = {PLAIN: lambda: model.backbone(x, t)}
    best = best_micro_batch(lambda m: model.backbone(x[:m], t[:m]), B)
    compiled_block = None
    if setting.compiled:
        compiled, compiled_block = compile_network(model, x, t)
        if compiled is not None:
            baselines["plain, compiled"] = lambda: compiled(x, t)
    if best < B:
        baselines[f"plain, batches of {best}"] = in_batches(model.backbone, (x, t), best)
        if "plain, compiled" in baselines:
            baselines[f"plain, compiled, batches of {best}"] = in_batches(compiled, (x, t), best)

    runs = {"engine, no exits": pass_of(model, Full(), x, t, None)}
    replayed = patterns(B, model.num_layers)
    for name, exit_layer in replayed.items():
        runs[name] = pass_of(model, Replay(), x, t, exit_layer)
    # one run of each before timing, to count bytes and to warm up
    results: dict[str, ForwardOutput] = {}
    peaks = {PLAIN: peak_bytes(baselines[PLAIN])}
    for name, call in runs.items():
        peaks[name] = peak_bytes(lambda name=name, call=call: results.update({name: call()}))

    counts = [rows_per_layer(result.exit_layer, model.num_layers) for result in results.values()]
    sizes = {best, structure_of(model.backbone).group_size}
    pieces = PlainPieces(model.backbone, (x, t, None), counts_by_kind(model, counts), sizes, compiled_block)
    ways = pieces.variants()
    with torch.inference_mode():
        for name, call in (*baselines.items(), *ways.items()):
            if "compiled" in name:
                call()  # compiles
    found = interleave(ways, setting.repeats, warmup=0, turn=0.02, limit=setting.limit / 4, label="pieces")
    ideal = {attainable(name): pieces.replay(found, counts[number]) for number, name in enumerate(results)}
    measured = interleave(
        {**baselines, **runs, **ideal},
        setting.repeats,
        warmup=0,
        pairs={name: attainable(name) for name in results},
        turn=0.02,
        limit=setting.limit,
        label=str(setting),
    )
    write(rows, setting, model, measured, list(baselines), results, peaks)


def write(
    rows: Rows,
    setting: Setting,
    model: Model,
    measured: Comparison,
    baselines: Sequence[str],
    results: dict[str, ForwardOutput],
    peaks: dict[str, int],
) -> None:
    B, L = setting.batch, model.num_layers
    parameters = {"preset": PRESET, "batch": B}
    fastest = min(baselines, key=measured.median)
    for name in baselines:
        rows.write(
            SUITE,
            "baseline",
            name,
            parameters,
            dtype=dtype_name(setting.dtype),
            **measured.row(name),
            evaluations_per_second=B / measured.median(name),
            speedup=measured.ratio(fastest, name).median,
            fastest_plain=fastest,
        )
    for name, result in results.items():
        seconds = measured.median(name)
        speedup = measured.ratio(fastest, name).median
        counts = rows_per_layer(result.exit_layer, L)
        share = measured.ratio(attainable(name), name)
        rows.write(
            SUITE,
            "pattern",
            name,
            parameters,
            dtype=dtype_name(setting.dtype),
            **measured.row(name),
            evaluations_per_second=B / seconds,
            speedup=speedup,
            fastest_plain=fastest,
            mean_exit_layer=sum(counts) / B,
            blocks=sum(counts),
            blocks_full=B * L,
            macs=result.macs,
            macs_full=result.macs_full,
            share_of_attainable=share.median,
            share_of_attainable_spread=[share.quantile(0.2), share.quantile(0.8)],
            share_of_flop_ideal=share_of_flop_ideal(speedup, result.macs, result.macs_full),
            rows_moved=result.rows_moved,
            peak_bytes=peaks[name],
            peak_bytes_plain=peaks[PLAIN],
        )


def attainable(name: str) -> str:
    """Name of the variant with only the plain pieces that a pattern needs."""
    return f"{name}: plain pieces"


def pass_of(
    model: Model, policy: ExitPolicy, x: Tensor, t: Tensor, exit_layer: Tensor | None
) -> Callable[[], ForwardOutput]:
    return lambda: adadiff.forward(model, x, t, policy=policy, threshold=exit_layer)


def in_batches(network: Callable[..., Tensor], inputs: Sequence[Tensor], size: int) -> Call:
    return lambda: torch.cat([network(*part) for part in zip(*(v.split(size) for v in inputs), strict=True)])


def counts_by_kind(model: Model, counts: Sequence[Sequence[int]]) -> dict[str, set[int]]:
    """kind of block -> all numbers of rows with which the patterns run it."""
    by_kind: dict[str, set[int]] = {}
    for rows in counts:
        for kind, n in zip(kinds(model.backbone), rows, strict=True):
            by_kind.setdefault(kind, set()).add(n)
    return by_kind


def compile_network(
    model: Model, *inputs: Tensor | None
) -> tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]:
    """The network compiled for fixed batch sizes, and a function for its blocks compiled for any; None if that
    fails."""
    torch.compiler.reset()
    network = torch.compile(model.backbone, dynamic=False)
    block = torch.compile(run_block, dynamic=True)
    return (network, block) if compiles(lambda: network(*inputs)) else (None, None)


def compiles(*calls: Callable[[], object]) -> bool:
    """Runs calls through torch.compile for the first time. False, with a message, if compiling fails."""
    try:
        with torch.inference_mode():
            for call in calls:
                call()
        return True
    except (RuntimeError, OSError) as error:  # Inductor and a missing compiler raise both
        say(f"torch.compile fails here; the compiled baseline is left out: {str(error).splitlines()[0]}")
        return False


def run_block(block: torch.nn.Module, *inputs: Tensor) -> Tensor:
    return block(*inputs)
