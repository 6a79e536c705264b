"""The samples in flight, each at its own step and in its own slot. One tick is one forward pass and one solver step.

A tick is transactional: a sample's new state is written only when its forward pass and solver step are complete. So a
tick that runs out of memory is repeated in halves, and one that fails for another reason is bisected until the failing
sample is found.
"""

import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from adadiff_kernels import Guidance, Noise, solver_step, upload

from ..diffusion.noise import SOLVER_STEP, initial_noise
from ..diffusion.tables import TableSet
from ..forward.decision import PolicyFailure
from ..forward.forward import check_execution, run_forward
from ..forward.narrow import narrow
from ..forward.networks import NetworkChoice, run_networks
from ..forward.options import ExecutionOptions
from ..forward.output import ForwardOutput
from ..forward.reuse_lanes import NONE
from ..forward.warming import warm
from ..model import Model
from ..policies.estimated import EstimatedReuse
from ..policies.interface import ExitPolicy, LaneIds
from ..policies.parts import FULL
from ..policies.policy_set import PolicySet
from .capacity import one_context
from .faults import is_interrupt, is_memory_error
from .lanes import Lanes, lanes_of
from .network_set import NetworkSet
from .ordering import ExpectedDepth
from .pass_size import PassSize
from .records import PassRecord
from .reports import Totals
from .reuse_slots import ReuseSlots
from .sample_batch import SampleBatch
from .slots import SlotState
from .stages import INDICES
from .tick import Step, Tick
from .uploads import StepIndices, step_indices

SPARE = 64  # unused tables and policies are dropped when there are more


class Batch:
    """Up to `capacity` samples of one model. Slots of finished and failed samples become free by `take` or `release`; a
    sample's result does not depend on its slot.

    Data for decisions of the host is on the CPU, data of network and solver on `device` (default: the model's). Exit
    layers of a tick are read after the next tick is queued, or when samples are done; the order of lanes adapts one
    tick late.
    whole: set to False when a tick begins to write new states; a caller with records of its own sets it to True once
    these are written, too.
    late: also read the exit layers of samples that are done a tick late: with the next tick, or by `flush`. Then no
    tick waits for the device.
    choice: network choice for all samples, such as `TwoStage`. forward: replaces `run_forward`, for experiments and
    tests.
    """

    @torch.inference_mode(False)  # a thread in another mode may continue
    def __init__(
        self,
        model: Model,
        capacity: int,
        *,
        execution: ExecutionOptions | None = None,
        choice: NetworkChoice | None = None,
        forward: Callable[..., ForwardOutput] | None = None,
        device: torch.device | None = None,
        late: bool = False,
    ):
        self.model, self.capacity, self.totals = model, capacity, Totals()
        self._num_layers = model.num_layers
        self.execution, self.device = execution or ExecutionOptions(), device or model.device
        self._forward, self._choice, self._networks = forward or run_forward, choice, NetworkSet(model)
        self._tables, self._policies = (
            TableSet(model.schedule, self.device, model.config.prediction_type),
            PolicySet[ExitPolicy](),
        )
        self._slots = SlotState(capacity, model.backbone.sample_shape, self.device)
        self._reuse = ReuseSlots(capacity, model, self.device)
        self._expected = ExpectedDepth(model.num_layers, capacity)
        self._steps: list[Step] = []  # of the last tick
        self._reported = 0  # how many of their records have been returned
        self._size = PassSize(capacity)
        self.late = late and self.device.type != "cpu"
        self._most_lanes, self._captured = 0, self.execution
        self.whole = True

    @property
    def count(self) -> int:
        """Samples in flight."""
        return self.capacity - self._slots.free

    @property
    def free(self) -> int:
        return self._slots.free

    def tenancy(self, slot: int) -> int:
        """The number of samples that the slot has held; (slot, tenancy) identifies a sample in a record."""
        return int(self._slots.tenancy[slot])

    @torch.inference_mode(False)
    def admit(self, samples: SampleBatch, index: np.ndarray) -> np.ndarray:
        """Starts samples index: int64 [k] of `samples`, k at most `free`. Returns their slots, int64 [k].

        Raises ValueError, with nothing changed, for more samples, and for a policy that the execution options exclude.
        """
        if len(index) > self.free:
            raise ValueError(f"{len(index)} samples for {self.free} free slots")
        self.check(samples)
        self._drop_spare()
        chosen = torch.from_numpy(index)
        seeds, steps, first = samples.seeds[chosen], samples.steps[chosen].numpy(), samples.first[chosen].numpy()
        table, policy = self._tables.add(samples.solver, steps, first), self._policies.add(samples.policy)
        x = self._begin_at(samples, chosen, seeds, table, first)
        choice = self._networks.add(samples.choice if self._choice is None else self._choice)
        then = np.array([table, np.full_like(table, policy), np.full_like(table, choice)])
        if (draft := samples.draft) is not None:  # the student's stage is the first
            then[0] = self._tables.add(draft.teacher_solver, steps, first)
            table, policy = self._tables.add(draft.solver, np.full_like(steps, draft.steps)), self._policies.add(FULL)
            choice = self._networks.add(draft.file.choice)
        reserved = self._reuse.reserve(samples, index)
        try:
            slots = self._slots.add(samples, index, table, policy, choice, x, self._tables.packed, then)
        except BaseException:
            self._reuse.give_back(reserved)
            raise
        self._reuse.begin(slots, reserved, first)
        self._expected.forget(slots)
        return slots

    def check(self, samples: SampleBatch) -> None:
        """Raises ValueError for samples that this batch cannot draw."""
        check_execution(self.execution, (samples.policy,), self.device)
        alone = samples.choice is not None or isinstance(samples.parts.reuse, EstimatedReuse)
        if self._choice is not None and alone:
            raise ValueError(f"shallow_model cannot be combined with policy '{samples.parts}'; leave one of them out")

    @torch.inference_mode()
    def tick(self) -> Tick:
        """Makes one step of every running sample."""
        state = self._slots
        running = state.running.nonzero()[0]
        waiting = self._size.parts(running)
        steps: list[Step] = []
        failed: dict[int, BaseException] = {}
        while waiting:
            slots = waiting.pop(0)
            try:
                step = self._advance(slots)
            except PolicyFailure as failure:
                traceback.clear_frames(failure.__traceback__)  # frees tensors; keeps the policy's frames
                own = np.array([self._policies.kinds[i] is failure.policy for i in state.policy[slots]])
                own |= self._reuse.owns(slots, failure.policy)
                if not own.any():  # a bug of this package; a retry would fail the same way
                    raise RuntimeError(f"policy '{failure.policy}' failed, and no sample follows it") from failure
                failed |= dict.fromkeys(slots[own].tolist(), failure.error)
                waiting[:0] = [slots[~own]] if not own.all() else []
            except BaseException as error:
                if is_interrupt(error):
                    raise
                if len(slots) == 1:
                    failed[int(slots[0])] = error
                    traceback.clear_frames(error.__traceback__)  # so that the error keeps no tensors alive
                    continue
                half = (len(slots) + 1) // 2
                if is_memory_error(error):
                    self._size.shrink(half)
                    self._most_lanes = 0
                    self.totals.halvings += 1
                    waiting = self._size.parts(np.concatenate([slots, *waiting]))
                else:
                    waiting[:0] = [slots[:half], slots[half:]]
            else:
                steps.append(step)
        self._size.tick_is_done(len(running))
        return self._finish(steps, failed)

    def _finish(self, steps: list[Step], failed: dict[int, BaseException]) -> Tick:
        """Writes the samples' new states, and learns from the exits of the previous tick."""
        state, self.whole = self._slots, False
        self.totals.ticks += 1
        if failed:
            state.running[list(failed)] = False
        for step in steps:
            state.solver.put(step.there, step.solver)
            for update in step.updates:
                self._reuse.store.write(update)
            state.step[step.slots] += 1
            if step.switch is not None:
                state.switch(step.switch)
                self._expected.forget(step.switch.slots)
        records = self.flush()  # waits for the previous tick, with this one queued
        for step in self._steps:
            self._learn(step.record)
        self._steps, self._reported = [step.without_solver() for step in steps], 0
        slots = np.concatenate([np.zeros(0, dtype=np.int64), *(step.slots for step in steps)])
        done = slots[state.step[slots] == state.steps[slots]]
        state.running[done] = False
        if len(done) and not self.late:
            records += self.flush()
        return Tick(slots, done, failed, tuple(records))

    def warm(self) -> None:
        """Captures the CUDA graphs of forward passes ahead of the first tick, at every width that the model was trained
        at, see `ExecutionOptions.runner`. The graphs belong to the calling thread."""
        execution, context, widths = self._execution_for(1), one_context(self.model), self.model.config.widths
        for network in (self.model,) if widths is None else (narrow(self.model, width) for width in widths):
            warm(network, execution, context, self.device)

    def flush(self) -> list[PassRecord]:
        """Records of the last tick that no `Tick` has returned yet; waits for the device."""
        records = [step.record for step in self._steps[self._reported :]]
        for record in records:
            self._count(record)
        self._reported = len(self._steps)
        return records

    def take(self, slots: np.ndarray) -> Tensor:
        """The images at slots: int64 [k], as float32 [k, C, H, W] on `device`; frees the slots."""
        images = self.peek(slots)
        self.release(slots)
        return images

    def peek(self, slots: np.ndarray) -> Tensor:
        """A copy of the present state x of the samples at slots: int64 [k], float32 [k, C, H, W]."""
        return self._slots.solver.x[self._slots.there(slots)]

    def predicted_x0(self, slot: int) -> Tensor:
        """x0 by the sample's last prediction, for predicted noise (x - sigma eps) / alpha: float32 [C, H, W]. Raises
        ValueError for a sample that has made no step yet."""
        for step in self._steps:
            found = (step.slots == slot) & (step.record.tenancy == self._slots.tenancy[slot])
            if found.any():
                return step.predicted_x0(int(found.argmax()), self.model)
        raise ValueError(f"the sample in slot {slot} has made no step yet")

    def replace(self, slots: np.ndarray, x: Tensor) -> None:
        """Replaces the state of samples at slots: int64 [k] by x: float [k, C, H, W]. Only between whole (macro-)steps
        of their solvers. Raises ValueError for another shape or dtype."""
        solver = self._slots.solver
        wanted = [len(slots), *solver.x.shape[1:]]
        if not isinstance(x, Tensor) or not x.is_floating_point() or list(x.shape) != wanted:
            given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
            raise ValueError(f"latents must be a float tensor {wanted}, got {given}")
        there, x = self._slots.there(slots), upload(x.detach(), self.device)
        for value in (solver.x, solver.base):
            if value is not None:
                value[there] = x.to(value.dtype)

    def release(self, slots: np.ndarray) -> None:
        """Frees slots: int64 [k]; their samples are dropped, finished or not."""
        self._slots.release(slots)
        self._reuse.release(slots)

    def _begin_at(
        self, samples: SampleBatch, chosen: Tensor, seeds: Tensor, table: np.ndarray, first: np.ndarray
    ) -> Tensor:
        """The initial x of the samples: noise, or their initial image with noise added."""
        # one by one: rounding may depend on an element's position in a vector
        parts = seeds.split(1) if self.execution.batch_invariant and len(seeds) else (seeds,)
        x = torch.cat([initial_noise(part, self.model.backbone.sample_shape, self.device) for part in parts])
        if samples.init_image is None:
            return x
        level = (value.view(-1, 1, 1, 1) for value in self._tables.alpha_sigma(table, first))
        alpha, sigma = (upload(value, self.device) for value in level)
        return (alpha * upload(samples.init_image[chosen], self.device) + sigma * x).float()

    def _advance(self, slots: np.ndarray) -> Step:
        """One forward pass and one solver step of samples at slots: int64 [k]; nothing is written back."""
        state, step, tables = self._slots, self._slots.step[slots], self._tables.packed
        row = tables.locate(state.table[slots], step)
        t, (*_, noisy) = tables.t[row], tables.needs_of(row)
        lanes = lanes_of(state, slots, t, self._policies.kinds, self._num_layers, self._expected)
        there = step_indices(state, lanes, slots, row, step, noisy)
        x = state.solver.x.index_select(0, there.slots)
        recorded = state.record_scores[slots]
        output = self._run(lanes, there, slots, x, t, step, np.count_nonzero(recorded) > 0)
        reuses = self._reuse.policy[slots][lanes.sample] != NONE if len(self._reuse) else None
        made, narrowing = step + state.stages.before[slots], None
        if len(self._networks):
            narrowing = self._networks.narrowing(state.choice[slots][lanes.sample], t[lanes.sample])
        record = PassRecord(slots, state.tenancy[slots], made, t, recorded, lanes, output, reuses, narrowing)
        guidance = None
        if there.unconditional is not None:
            guidance = Guidance(output.prediction, there.unconditional, there.weight, there.channels)
        rows = tables.take(row, there.row)
        solver = state.solver.take(there.slots)  # only now: the pass's memory is free again
        noise = Noise(there.seed, there.step, SOLVER_STEP) if noisy else None
        eps, variance = output.prediction, output.variance
        if (own := there.conditional) is not None:
            eps, variance = eps.index_select(0, own), None if variance is None else variance.index_select(0, own)
        elif guidance is not None:
            eps, variance = eps[: len(slots)], None if variance is None else variance[: len(slots)]
        if self.execution.batch_invariant:
            for i in range(len(slots)):
                one = torch.tensor([i], dtype=torch.int64, device=self.device)
                own = None if variance is None else variance[one]
                solver_step(
                    *(solver, eps[one], rows.take(one), one),
                    variance=own,
                    guidance=guidance and guidance.take(one),
                    noise=noise and noise.take(one),
                )
        else:
            solver_step(solver, eps, rows, variance=variance, guidance=guidance, noise=noise)
        switch = state.stages.judge(state, slots, solver.x, self.execution.batch_invariant)
        record.judged = None if switch is None else switch.judged
        return Step(slots, there.slots, solver, x, output.prediction, guidance, record, switch, output.updates)

    def _run(
        self,
        lanes: Lanes,
        there: StepIndices,
        slots: np.ndarray,
        x: Tensor,
        t: np.ndarray,
        step: np.ndarray,
        record_scores: bool,
    ) -> ForwardOutput:
        state, slot = self._slots, slots
        if there.sample is not None:
            x, t, slot = x.index_select(0, there.sample), t[lanes.sample], slots[lanes.sample]
        context = None if there.context is None else state.context.index_select(0, there.context)
        forward, network = self._forward, self._networks.now(state.choice[slot], t) if len(self._networks) else None
        if network is not None:
            own = torch.from_numpy(network)
            forward = partial(run_networks, self._networks.networks, own, run=self._forward)
        ids = None
        if any(policy.needs_ids for policy in lanes.policies):
            ids = LaneIds(*map(torch.from_numpy, (state.number[slot], step[lanes.sample], lanes.half)))
        reuse = {}
        if len(self._reuse):
            given = lanes, slot, step[lanes.sample], state.steps[slot], network, self._networks
            reuse = {} if (found := self._reuse.of_lanes(*given)) is None else {"reuse": found}
        return forward(
            *(() if network is not None else (self.model,)),
            x,
            torch.from_numpy(t),
            context,
            policies=lanes.policies,
            policy_index=None if lanes.policy_index is None else torch.from_numpy(lanes.policy_index),
            threshold=self._thresholds(lanes, slot),
            cfg_partner=None if lanes.partner is None else torch.from_numpy(lanes.partner),
            execution=self._execution_for(len(lanes.sample)),
            record_scores=record_scores,
            ids=ids,
            **reuse,
        )

    def _execution_for(self, lanes: int) -> ExecutionOptions:
        """Sets max_lanes: captured passes of all sizes share memory, which is allocated for the most lanes seen."""
        if self.execution.runner != "captured" or self.execution.max_lanes is not None:
            return self.execution
        most = max(self._most_lanes, self._size.most, lanes)
        if most != self._most_lanes:
            self._most_lanes, self._captured = most, replace(self.execution, max_lanes=most)
        return self._captured

    def _thresholds(self, lanes: Lanes, slot: np.ndarray) -> Tensor | None:
        """float32 [B], or None if all lanes use the threshold of a single policy."""
        own, asked = lanes.policies[0].threshold, self._slots.threshold[slot]
        if not lanes.may_exit:
            return None
        if len(lanes.policies) == 1 and own is not None and not np.count_nonzero(asked != np.float32(own)):
            return None
        return torch.from_numpy(asked)

    def _count(self, record: PassRecord) -> None:
        record.read()
        totals = self.totals
        totals.passes += len(record.by_lane)
        totals.blocks += int(record.by_lane.sum())
        totals.macs += record.macs
        totals.macs_full += record.macs_full
        totals.rows_moved += record.rows_moved
        totals.reused += int(np.count_nonzero(record.reused))
        acted = (record.by_lane < self._num_layers) | record.reused
        totals.asked += int(np.count_nonzero(record.asks))
        totals.exited += int(np.count_nonzero(record.asks & acted))
        for name, lanes in record.parts.items():
            setattr(totals, name, getattr(totals, name) + lanes)

    def _learn(self, record: PassRecord) -> None:
        lanes = record.lanes
        if lanes.may_exit:
            t, slots, sample = record.t, record.slots, lanes.sample
            same = record.tenancy == self._slots.tenancy[slots]
            if not lanes.in_order:
                t, slots, same = t[sample], slots[sample], same[sample]
            self._expected.learn(t, slots, lanes.half, record.by_lane, same)

    def _drop_spare(self) -> None:
        """Drops unused tables, policies and choices, which would pile up in a server."""
        for name, kinds in zip(INDICES, (self._tables, self._policies, self._networks), strict=True):
            if len(kinds) > SPARE + self.count:
                self._slots.keep(name, kinds)
        if len(self._reuse) > SPARE + self.count:
            taken = self._slots.taken
            self._reuse.policy[taken] = self._reuse.keep(self._reuse.policy[taken])
