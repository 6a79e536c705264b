"""One call of a transformer and of each of its blocks: which lanes run a block, and what the other lanes get."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..policies.reuse import ReusePolicy
from .compaction import Gather, Held, Rows, counted, mark_dynamic, version
from .families import Family
from .kept_rest import KeptRest
from .lane_cache import Decision, Kept, LaneCache
from .layout import BlockId, Layout, Outputs, Planned, outputs_of, split
from .private import Interceptor
from .runs import Visit
from .self_check import check_lanes


@dataclass
class Call:
    """One call of the transformer.

    layout: None at the first call of a shape, in which all lanes run all blocks and the order of blocks is learned.
    look: key of the calls for which blocks are checked once; check: whether this call checks them.
    sequence: the blocks called so far; base: inputs of each segment's first block, by argument; late: outputs of each
    segment's last blocks, while the order is learned; entered: inputs of each segment and of the network's first block
    (""), with their versions; began: position of each segment's first block; head_output: output of the first blocks,
    by argument. probe: whether this is the first call in which a block is skipped. compiled: whether any block is
    compiled.
    """

    policy: ReusePolicy
    family: Family
    B: int
    t: Tensor
    visit: Visit
    cache: LaneCache
    layout: Layout | None
    look: Any
    check: bool
    conditioning: Sequence[Kept]
    steps_left: int | None
    tied: bool
    name: str
    probe: bool
    compiled: bool
    sequence: list[Planned] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    base: dict[str, dict[str, Held]] = field(default_factory=dict)
    entered: dict[str, list[tuple[Tensor, int | None]]] = field(default_factory=dict)
    late: dict[str, deque[tuple[int, Outputs, list[Any]]]] = field(default_factory=dict)
    segments: dict[str, list[str]] = field(default_factory=dict)
    began: dict[str, int] = field(default_factory=dict)
    head_output: dict[str, Held] = field(default_factory=dict)
    gate_input: Held | None = None
    attention_input: Tensor | None = None
    decision: Decision | None = None
    rows: Rows | None = None
    gather: Gather | None = None
    irregular: bool = False
    head: int = 0

    def __post_init__(self) -> None:
        self.step = self.cache.step

    def decide(self, gate: Tensor | None, output: Tensor) -> None:
        """Decides after the first blocks which lanes reuse. gate, output: [B, ...]."""
        self.decision = self.cache.decide(
            self.policy, gate, output, self.conditioning, self.t, self.steps_left, self.tied
        )
        self.head = len(self.sequence)
        if bool(self.decision.reuse.any()):
            # views would make compiled blocks recompile
            self.rows = Rows((~self.decision.reuse).nonzero().flatten(), self.B, views=not self.compiled)
            self.gather = Gather(self.rows, self.family)

    def finish(self) -> Layout | None:
        """The layout after this call; None if blocks ran in another order than before. Raises ValueError for a policy
        that does not fit the sequence of blocks."""
        if self.layout is not None:
            self.irregular |= len(self.sequence) != len(self.layout.calls)
            if self.irregular and self.rows is not None:
                raise ValueError(f"{self.name} ran other blocks than at its first call, while some were skipped")
            return None if self.irregular else self.layout
        if self.decision is None:
            name, *_ = self.counts
            raise ValueError(
                f"'{self.policy}' decides after {self.policy.first} blocks, but {name}, the first list of {self.name}, "
                f"has only {self.counts[name]}"
            )
        tail = len(self.sequence) - self.policy.last
        final: dict[str, int] = {}
        for position, planned in enumerate(self.sequence[:tail]):
            if position >= self.head:
                final[planned.segment] = position
        if not final:
            raise ValueError(f"'{self.policy}' leaves nothing out: {self.name} runs {len(self.sequence)} blocks")
        inside = {
            name
            for name, began in self.began.items()
            if name in final and any(self.began[o] < began < end for o, end in final.items())
        }
        for name in inside:
            sources = self.sequence[final[name]].outputs.sources
            if all(source in (None, *self.head_output) for source in sources):
                self.base[name] = self.head_output
            elif final[name] == tail - 1:
                raise ValueError(
                    f"'{self.policy}' does not fit {self.name}, whose lists of blocks alternate; use last=0"
                )
        for name, position in final.items():
            outputs, parts = next((o, parts) for p, o, parts in self.late[name] if p == position)
            store_rest(self, name, outputs, parts, None)
        stays = [
            name for name, values in self.entered.items() if all(v is not None and v == version(x) for x, v in values)
        ]
        return Layout(tuple(self.sequence), self.head, tail, final, frozenset(stays), frozenset(inside))

    def blocks_run(self) -> Tensor:
        """int64 [B]: the number of blocks each lane ran."""
        total = torch.full((self.B,), len(self.sequence), dtype=torch.int64, device="cpu")
        if self.rows is None or self.layout is None or self.decision is None:
            return total
        return total - self.decision.reuse * (self.layout.tail - self.layout.head)


class BlockCall:
    """One call of a block. given: its arguments by name; the first `by_position` of them were passed by position."""

    def __init__(self, call: Call, block: Interceptor, given: Mapping[str, Any], by_position: int):
        self.call, self.block, self.given, self.by_position = call, block, given, by_position
        self.id: BlockId = block.label

    def run(self) -> Any:
        call, position = self.call, len(self.call.sequence)
        first_list = call.sequence[0].block.name if call.sequence else self.id.name
        if call.decision is None:
            return self._head(last=call.counts[first_list] + (self.id.name == first_list) == call.policy.first)
        if call.layout is None:
            return self._learn(position)
        layout = call.layout
        if position >= len(layout.calls) or layout.calls[position].block != self.id:
            call.irregular = True
            if call.rows is not None:
                raise ValueError(f"{call.name} runs {self.id} where other blocks ran at its first call")
            return self._plain(Planned(self.id, layout.calls[0].outputs))
        planned = layout.calls[position]
        if position >= layout.tail:
            return self._plain(planned)
        last = layout.final[planned.segment]
        begins = planned.segment not in call.base
        if begins:
            sources = [source for source in layout.calls[last].outputs.sources if source is not None]
            stays = planned.segment in layout.stays
            call.base[planned.segment] = (
                call.head_output
                if planned.segment in layout.inside and all(source in call.head_output for source in sources)
                else {source: Held.of(self.given[source], stays) for source in sources}
            )
        if call.rows is None:
            output = self._plain(planned)
            if position == last and not call.irregular:
                store_rest(call, planned.segment, planned.outputs, planned.outputs.parts(output), None)
            return output
        return self._compact(planned, position == last, begins)

    def _plain(self, planned: Planned) -> Any:
        self._note(planned)
        return self._called(self.given)

    def _note(self, planned: Planned) -> None:
        self.call.sequence.append(planned)
        self.call.counts[self.id.name] += 1

    def _called(self, given: Mapping[str, Any], lanes: int | None = None) -> Any:
        """Calls the block. lanes: the number of lanes in `given`; None: all."""
        streams = [v for v in given.values() if isinstance(v, Tensor) and v.ndim > 2]
        if self.block.compiled is not None and streams:  # one graph for any number of rows
            lanes = self.call.B if lanes is None else lanes
            dim = self.call.family.batch_dim
            mark_dynamic(given, Rows(torch.arange(lanes, device="cpu"), lanes), self.call.family, streams[0].shape[dim])
        args, kwargs = split(given, self.by_position)
        return self.block.call(*args, **kwargs)

    def _head(self, last: bool) -> Any:
        """Runs one of the first blocks, for all lanes; after the last of them, decides which lanes reuse."""
        call, begins, known = self.call, not self.call.sequence, self._known()
        held: dict[str, Held] = {}
        if begins and call.policy.gate == "residual":
            streams = {k: v for k, v in self.given.items() if isinstance(v, Tensor) and v.ndim > 2}
            if known is None or call.layout is None:
                call.entered[""] = [(value, version(value)) for value in streams.values()]
                held = {name: Held.of(value, stays=False) for name, value in streams.items()}
            else:
                source = self._source(known)
                held = {source: Held.of(streams[source], "" in call.layout.stays)}
        output = self._called(self.given)
        outputs = Outputs(None, ())
        if begins or last:
            outputs = self._outputs(output) if known is None else known
        if held:
            call.gate_input = held[self._source(outputs)]
        self._note(Planned(self.id, outputs))
        if last:
            parts = zip(outputs.sources, outputs.parts(output), strict=True)
            if call.layout is None or call.layout.inside:
                call.head_output = {k: Held.of(v, stays=False) for k, v in parts if k is not None}
            found, gate = outputs.parts(output)[outputs.sources.index(self._source(outputs))], None
            with counted():
                if call.gate_input is not None:
                    gate = _lanes_first(found - call.gate_input.get(), call)
                elif call.policy.gate == "input":
                    if call.attention_input is None:
                        raise ValueError(f"{self.id} of {call.name} has no attention to read; use gate=residual")
                    gate = call.attention_input.reshape(call.B, -1)  # attention has lanes first, whatever the block has
                call.decide(gate, found.movedim(call.family.batch_dim, 0).unflatten(0, (call.B, -1)))
        return output

    def _known(self) -> Outputs | None:
        """The outputs of this block at the first call, if it was at this position."""
        layout, position = self.call.layout, len(self.call.sequence)
        if layout is None or position >= layout.head or layout.calls[position].block != self.id:
            return None
        return layout.calls[position].outputs

    def _source(self, outputs: Outputs) -> str:
        return next(name for name in self.given if name in outputs.sources)

    def _outputs(self, output: Any) -> Outputs:
        try:
            return outputs_of(output, self.given, self.call.family, self.call.B)
        except ValueError as error:
            raise ValueError(f"{self.id} of {self.call.name} cannot be skipped: {error}") from None

    def _learn(self, position: int) -> Any:
        call = self.call
        kept = {k: v.clone() for k, v in self.given.items() if isinstance(v, Tensor) and v.ndim > 2}
        versions = {k: version(self.given[k]) for k in kept}
        output = self._called(self.given)
        outputs = self._outputs(output)
        streams = {source: kept[source] for source in outputs.sources if source is not None}
        segment = self._segment(streams)
        call.entered.setdefault(segment, [(self.given[source], versions[source]) for source in streams])
        self._note(Planned(self.id, outputs, segment))
        late = call.late.setdefault(segment, deque(maxlen=call.policy.last + 1))
        late.append((position, outputs, [None if p is None else p.clone() for p in outputs.parts(output)]))
        if call.check:
            self._check(outputs, late[-1][2], kept)
        return output

    def _segment(self, streams: Mapping[str, Tensor]) -> str:
        """The segment of the block's list that continues, or a new one if the streams differ."""
        call, made = self.call, self.call.segments.setdefault(self.id.name, [])
        base = call.base[made[-1]] if made else {}
        if not made or any(name not in base or base[name].value.shape != one.shape for name, one in streams.items()):
            made.append(f"{self.id.name}/{len(made)}")
            call.began[made[-1]] = len(call.sequence)
            call.base[made[-1]] = {name: Held(value) for name, value in streams.items()}
        return made[-1]

    def _check(self, outputs: Outputs, parts: Sequence[Any], kept: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless the block can be run for a subset of the lanes. kept: copies of its inputs, which it
        may have changed in place; parts: its outputs."""
        call, given = self.call, {name: kept.get(name, value) for name, value in self.given.items()}
        R = self._rows_of(outputs, kept)
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        Gather(Rows(first, call.B), call.family).arguments(given, R)  # raises if they cannot be split by lane

        def run(rows: Rows) -> list[Any]:
            return outputs.parts(self._called(Gather(rows, call.family).arguments(given, R), len(rows.lanes)))

        try:
            check_lanes(run, outputs, parts, kept, call.B, call.family.batch_dim)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            wrong = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{self.id} of {call.name} cannot be run for some lanes of {call.B}: {wrong}") from None

    def _rows_of(self, outputs: Outputs, given: Mapping[str, Any]) -> int:
        source = next(name for name in outputs.sources if name is not None)
        return given[source].shape[self.call.family.batch_dim]

    def _compact(self, planned: Planned, final: bool, begins: bool) -> Any:
        """Runs the block for the computing lanes, if any. The other lanes get their reused output from the final block
        of the segment, and undefined values from the blocks before it."""
        call, dim, outputs = self.call, self.call.family.batch_dim, planned.outputs
        self._note(planned)
        assert call.rows is not None
        assert call.gather is not None
        assert call.decision is not None
        R = self._rows_of(outputs, self.given)
        fresh: list[Any] = [None] * len(outputs.sources)
        if len(call.rows.lanes):
            fresh = outputs.parts(self._called(call.gather.arguments(self.given, R), len(call.rows.lanes)))
        parts: list[Any] = []
        with counted():
            for p, source in enumerate(outputs.sources):
                full = None
                if source is not None and final:
                    rest = call.cache.rest[planned.segment, p].reused(call.decision.age)
                    full = call.base[planned.segment][source].get().to(rest.device) + rest
                    full = full if fresh[p] is None else full.to(fresh[p])
                elif source is not None and fresh[p] is not None:
                    full = _unwritten(self.given[source].shape, fresh[p], call.probe)
                elif source is not None:  # a segment's first input may belong to the caller: do not overwrite it
                    full = self.given[source]
                    full = _unwritten(full.shape, full, call.probe) if begins else full
                if full is not None and fresh[p] is not None:
                    call.rows.put(full, dim, fresh[p])
                    call.gather.give(full, fresh[p], dim)
                parts.append(full)
            if final and len(call.rows.lanes):
                store_rest(call, planned.segment, outputs, fresh, call.rows)
        return outputs.join(parts)


def _unwritten(shape: torch.Size, like: Tensor, probe: bool) -> Tensor:
    """An output for lanes that skip the block; probe: filled with NaN, to detect whether it is read."""
    full = like.new_empty(shape)
    return full.fill_(torch.nan) if probe else full


def store_rest(call: Call, segment: str, outputs: Outputs, parts: Sequence[Any], rows: Rows | None) -> None:
    """Stores what the skippable blocks of a segment have added. parts: outputs of all lanes, or of those of `rows`."""
    dim, kept, decision = call.family.batch_dim, call.cache.rest, call.decision
    assert decision is not None
    with counted():
        for p, source in enumerate(outputs.sources):
            if source is not None:
                base = call.base[segment][source].get().to(parts[p].device)
                rest = kept.setdefault((segment, p), KeptRest(call.B, dim, call.policy.order))
                rest.store(parts[p], base, rows, decision.age, decision.grows)


def _lanes_first(value: Tensor, call: Call) -> Tensor:
    """[B, ...]"""
    return value.movedim(call.family.batch_dim, 0).reshape(call.B, -1)
