"""First-block cache per lane: a lane may reuse the rest of the network from an earlier step.

After F blocks a lane either continues (a *full* step) or leaves by the same compaction as an exit. If it leaves, its
prediction is head(h_F + rest) over the patches, where rest = h_k - h_F of its last full step, k is the layer at which
that step ended (the last layer or an exit), and the head is that of layer k. With a policy of order 1, its prediction
is head(h_F + rest + age * growth), where growth is what rest grew by a step between its last two full steps, and 0 if
there was one only, or if they ended at different layers. A lane whose exit policy lets it exit at layer F or earlier
makes no full step; its cached rest is kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adadiff_kernels import upload

from ..models.interface import Backbone
from ..policies.reuse import ESTIMATE, GATES, ReuseContext, ReusePolicy, check_reuse_policy, extrapolated, growth
from .branch_plan import Branches, kinds_of_branches, reuses_branches
from .decision import call_policy
from .feature_store import Kind, StoreUpdate, entry_bytes
from .lane_by_lane import LaneRunner, lane_by_lane
from .placement import DevicePlacement, HostPlacement
from .reuse_lanes import LaneEntries, ReuseLanes
from .runner import BlockRunner


def kinds_of(policy: ReusePolicy, backbone: Backbone, dtype: torch.dtype) -> dict[str, Kind]:
    """The store values of a lane of `policy`. rest, growth: [N, D], over the patches; ended: k. reference: [T, D],
    which the gate compares with. total, for the gate "input": the change accumulated since the last full step.
    estimate, for that gate: the mean of the policy's estimates, and estimates, their number. For a policy that reuses
    branches: the branches."""
    T, D = backbone.tokens, backbone.dim
    if reuses_branches(policy):
        return kinds_of_branches(Branches.of(backbone.blocks, T).of_policy(policy), (T, D), dtype)
    kinds = {"rest": Kind((T - backbone.num_prefix_tokens, D), dtype), "ended": Kind((), torch.int32)}
    if policy.order:
        kinds["growth"] = kinds["rest"]
    if policy.gate in GATES:
        kinds["reference"] = Kind((T, D), dtype)
    if policy.gate == "input":
        kinds["total"] = Kind((), torch.float32)
    if policy.gate == ESTIMATE:
        kinds |= {"estimate": Kind((), torch.float32), "estimates": Kind((), torch.int32)}
    return kinds


def reuse_bytes(policy: ReusePolicy, backbone: Backbone, exits: bool, dtype: torch.dtype) -> int:
    """Additional bytes of a lane that follows `policy`: its store entry; during a pass the values to be written to it,
    and hidden states before and after the first F blocks; without exits, also saved hidden states. Branches are written
    to the store directly."""
    if reuses_branches(policy):
        return entry_bytes(kinds_of(policy, backbone, dtype))
    hidden = backbone.tokens * backbone.dim * dtype.itemsize
    return 2 * entry_bytes(kinds_of(policy, backbone, dtype)) + hidden * (2 if exits else 3)


def check_reuse(policy: ReusePolicy, backbone: Backbone) -> None:
    """Raises ValueError for a policy that this network cannot follow, or under which no lane could ever reuse."""
    num_layers = len(backbone.blocks)
    if reuses_branches(policy):
        Branches.of(backbone.blocks, backbone.tokens).of_policy(policy)
        return
    check_reuse_policy(policy)
    if policy.last:
        raise ValueError(
            f"policy '{policy}': last blocks that always run are for pipelines; here the head reads the reused output "
            "directly, so leave last out"
        )
    if policy.first >= num_layers:
        raise ValueError(
            f"policy '{policy}' leaves nothing out: this network has {num_layers} blocks, and the first {policy.first} "
            f"always run; take first of {num_layers - 1} or less"
        )
    if policy.gate == "input" and not hasattr(backbone.blocks[0], "branches"):
        raise ValueError(
            f"policy '{policy}': gate=input needs blocks that expose their branches, which this network does not have; "
            "use gate=residual"
        )


def reuses_rest(lanes: ReuseLanes) -> bool:
    """Whether any lane may reuse the rest of the network; if not, all follow policies that reuse branches, or none."""
    present = set(lanes.index.tolist())
    return any(k in present and not reuses_branches(policy) for k, policy in enumerate(lanes.policies))


class RestOfNetwork:
    """Reuse of the rest of the network in one forward pass of B lanes. layers: layers after which a policy decides.
    hidden: [B, T, D], the first block's input.

    reused, full: bool [B], lanes that reuse, and lanes whose step is a full one, as decided so far in this pass.
    """

    def __init__(
        self,
        lanes: ReuseLanes,
        backbone: Backbone,
        t: Tensor,
        hidden: Tensor,
        runner: BlockRunner | LaneRunner,
        invariant: bool,
    ) -> None:
        num_layers = len(backbone.blocks)
        self._lanes = lanes = lanes.without(
            [policy.first >= num_layers or reuses_branches(policy) for policy in lanes.policies]
        )
        self._store, self._invariant, self._t, device = lanes.store, invariant, t, hidden.device
        self._prefix, self._num_layers = backbone.num_prefix_tokens, num_layers
        present = set(lanes.index.tolist())
        self._policies = {k: policy for k, policy in enumerate(lanes.policies) if k in present}
        self.layers = frozenset(policy.first for policy in self._policies.values())
        self._own = LaneEntries(lanes, device)
        self.reused = torch.zeros(len(hidden), dtype=torch.bool, device=device)
        self.full = torch.zeros_like(self.reused)
        gates = {policy.gate for policy in self._policies.values()}
        self._input = hidden if "residual" in gates else None
        self._base: Tensor | None = None  # [B, T, D] by lane, after each lane's own first blocks
        self._read: Tensor | None = None  # [B, T, D], the input of the first block's first branch
        if "input" in gates:
            self._read = runner.first_read(hidden)
            grown = self._by_lane(_growth, self._read, self._kept("reference"))
            self._total = self._kept("total") + grown  # float32 [B]

    def leave(
        self, layer: int, hidden: Tensor, exits: Tensor | None, placement: HostPlacement | DevicePlacement
    ) -> Tensor:
        """bool [n]: rows that leave after `layer`, by their exit policy or because they reuse. hidden: [n, T, D];
        exits: bool [n], rows that may exit; None: none may."""
        entries, lanes, running = self._own, placement.row_to_lane.long(), placement.running()
        asked = torch.zeros(len(lanes), dtype=torch.bool, device=hidden.device)
        index, reuse = entries.index.index_select(0, lanes), torch.zeros_like(asked)
        for k, policy in self._policies.items():
            if policy.first != layer:
                continue
            chosen = index == k if running is None else (index == k) & running
            asked |= chosen
            reuse |= self._who_reuses(policy, hidden, lanes, chosen, on_host=running is None)
        if exits is not None:
            exits = placement.both_tied(exits)
            reuse &= ~exits
        reuse = placement.both_tied(reuse)
        left = reuse if exits is None else reuse | exits
        self.reused.index_copy_(0, lanes, self.reused.index_select(0, lanes) | reuse)
        self.full.index_copy_(0, lanes, self.full.index_select(0, lanes) | (asked & ~left))
        self._keep_base(hidden, lanes, asked)
        return left

    def _who_reuses(self, policy: ReusePolicy, hidden: Tensor, lanes: Tensor, chosen: Tensor, on_host: bool) -> Tensor:
        """bool [n]: rows of chosen: bool [n] that reuse. If only the device knows the running rows, the policy is
        called for all rows."""
        entries, found = self._own, torch.zeros_like(chosen)
        rows = chosen.nonzero().squeeze(1) if on_host else torch.arange(len(chosen), device=chosen.device)
        if not len(rows):
            return found
        lanes, hidden = lanes[rows], hidden if len(rows) == len(chosen) else hidden[rows]
        usable = entries.valid.index_select(0, lanes) & chosen[rows]
        change = self._change(policy, hidden, lanes, usable)
        context = ReuseContext(
            entries.step.index_select(0, lanes),
            entries.age.index_select(0, lanes),
            entries.steps_left.index_select(0, lanes),
            self._t.to(lanes.device).index_select(0, lanes),
        )
        known = None if policy.gate is None else change.where(usable, torch.nan)
        mask = call_policy(policy, policy.reuse_mask, known, context)
        call_policy(policy, _check_mask, mask, len(lanes), lanes.device)
        found[rows] = mask & usable & ~change.isnan()
        return found

    def _change(self, policy: ReusePolicy, hidden: Tensor, lanes: Tensor, usable: Tensor) -> Tensor:
        """float32 [n]: the change measured by the policy's gate; NaN if the lane holds NaN. usable: bool [n], rows that
        have something to reuse."""
        if policy.gate in (None, ESTIMATE):
            known = self._kept("estimate", lanes) if policy.gate else 0.0
            return torch.where(hidden.isnan().flatten(1).any(1), torch.nan, known).float()
        if policy.gate == "input":
            return self._total.index_select(0, lanes)
        given = hidden, self._input.index_select(0, lanes), self._kept("reference", lanes)
        if policy.whole_batch:
            return _change_of_all(*given, usable).expand(len(lanes))
        return self._by_lane(_change, *given)

    def _by_lane(self, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """function(*given), float32 [n], for tensors [n, T, D]; lane by lane if results must not depend on n."""
        if not self._invariant:
            return function(*given)
        n, device = len(given[0]), given[0].device
        if not n:
            return torch.zeros(0, dtype=torch.float32, device=device)

        def one(row: int) -> Tensor:
            return function(*(value[row : row + 1].clone() for value in given))

        return torch.cat(lane_by_lane(one, n, device))

    def _kept(self, name: str, lanes: Tensor | None = None) -> Tensor:
        """The stored values of all lanes, or of lanes: int64 [k]."""
        entry = self._own.entry if lanes is None else self._own.entry.index_select(0, lanes)
        return self._store[name].index_select(0, entry)

    def _keep_base(self, hidden: Tensor, lanes: Tensor, asked: Tensor) -> None:
        if self._base is None:
            self._base = hidden.new_empty(len(self.reused), *hidden.shape[1:])
        if len(self.layers) > 1:  # keeps the rows of lanes with another F
            hidden = torch.where(asked[:, None, None], hidden, self._base.index_select(0, lanes))
        self._base.index_copy_(0, lanes, hidden)

    # ---- at the end of the pass ----

    def head_layer(self) -> Tensor:
        """int32 [B]: for lanes that reuse, the layer whose head they use; 0 for the others."""
        if not self.layers:
            return torch.zeros(len(self.reused), dtype=torch.int32, device=self.reused.device)
        return self._kept("ended").where(self.reused, 0)

    def completed(self, patches: Tensor) -> Tensor:
        """patches: [B, N, D], of lanes when they left. Returns them with the cached rest added for lanes that reuse."""
        if not self.layers or (patches.is_cpu and not bool(self.reused.any())):
            return patches
        rest = self._kept("rest")
        ordered = [k for k, policy in self._policies.items() if policy.order]
        if ordered:
            grows = torch.stack([self._own.index == k for k in ordered]).any(0)[:, None, None]
            age = self._own.age[:, None, None].to(rest.dtype)
            rest = torch.where(grows, extrapolated(rest, self._kept("growth"), age), rest)
        return torch.where(self.reused[:, None, None], patches + rest, patches)

    def updates(self, placement: HostPlacement | DevicePlacement) -> tuple[StoreUpdate, ...]:
        """The updates of the store, for the entries of lanes that follow a policy."""
        made = []
        for k, policy in self._policies.items():
            lanes = upload((self._lanes.index == k).nonzero().squeeze(1), self.reused.device)
            if lanes.is_cpu and policy.gate != "input":  # only full steps write; a device would wait for their number
                lanes = lanes[self.full[lanes]]
            if len(lanes):
                made.append(self._update(policy, lanes, placement))
        return tuple(made)

    def _update(self, policy: ReusePolicy, lanes: Tensor, placement: HostPlacement | DevicePlacement) -> StoreUpdate:
        """The update for lanes: int64 [k] of `policy`: new values after a full step, the old ones otherwise."""
        entries, full = self._own, self.full.index_select(0, lanes)
        values: dict[str, Tensor] = {}

        def put(name: str, rows: Tensor, where: Tensor) -> None:
            old = self._kept(name, lanes)
            values[name] = torch.where(where.view(-1, *[1] * (old.ndim - 1)), rows.to(old.dtype), old)

        if self._base is not None:  # else no lane came this far
            base = self._base.index_select(0, lanes)
            put("made", entries.step.index_select(0, lanes), full)
            put("network", entries.network.index_select(0, lanes), full)
            put("ended", placement.exit_layer.index_select(0, lanes), full)
            rest = (placement.saved.index_select(0, lanes) - base)[:, self._prefix :]
            if policy.order:
                grown, known = self._growth_of(rest, lanes, placement)
                put("growth", grown, full)
                if policy.gate == ESTIMATE:
                    count, before = self._kept("estimates", lanes), self._kept("estimate", lanes)
                    found = self._estimate(policy, grown, lanes)
                    mean = torch.where(count > 0, before + (found - before) / (count + 1), found)
                    put("estimate", mean.where(known, torch.nan), full)
                    put("estimates", (count + 1).where(known, 0), full)
            put("rest", rest, full)
            if policy.gate == "residual":
                put("reference", base - self._input.index_select(0, lanes), full)
        if policy.gate == "input":  # its reference is the previous step, full or not
            seen = full | entries.valid.index_select(0, lanes)
            put("reference", self._read.index_select(0, lanes), seen)
            put("total", self._total.index_select(0, lanes).masked_fill(full, 0.0), seen)
        return StoreUpdate(entries.entry.index_select(0, lanes), values)

    def _growth_of(
        self, rest: Tensor, lanes: Tensor, placement: HostPlacement | DevicePlacement
    ) -> tuple[Tensor, Tensor]:
        """[k, N, D]: what `rest` has grown by a step since the last full step of lanes: int64 [k]; and bool [k],
        whether that is known, and both steps ran to the last layer."""
        entries, ended = self._own, placement.exit_layer.index_select(0, lanes)
        known = entries.valid.index_select(0, lanes) & (ended == self._kept("ended", lanes))
        age = entries.age.index_select(0, lanes)[:, None, None].to(rest.dtype)
        grown = growth(rest, self._kept("rest", lanes), age, known[:, None, None])
        return grown, known & (ended == self._num_layers)

    def _estimate(self, policy: ReusePolicy, grown: Tensor, lanes: Tensor) -> Tensor:
        """float32 [k]: the policy's estimates after full steps of lanes: int64 [k]. grown: [k, N, D]."""
        step = self._own.step.index_select(0, lanes)
        found = call_policy(policy, self._by_lane, policy.estimate, grown, step)
        call_policy(policy, _check_estimate, found, len(lanes), lanes.device)
        return found


def _growth(read: Tensor, before: Tensor) -> Tensor:
    """float32 [n]: relative change of the first branch's input since the previous step. Arguments: [n, T, D]."""
    return mean_abs(read - before) / mean_abs(before)


def _change(hidden: Tensor, begun: Tensor, reference: Tensor) -> Tensor:
    """float32 [n]: relative change of the residual hidden - begun since `reference`. Arguments: [n, T, D]."""
    return mean_abs(hidden - begun - reference) / mean_abs(reference)


def _change_of_all(hidden: Tensor, begun: Tensor, reference: Tensor, usable: Tensor) -> Tensor:
    """float32 [1]: relative change over all usable rows together: sum |change| / sum |reference|."""
    none = torch.zeros((), dtype=torch.float32, device=hidden.device)
    changed = mean_abs(hidden - begun - reference).where(usable, none).sum()
    return (changed / mean_abs(reference).where(usable, none).sum())[None]


def mean_abs(value: Tensor) -> Tensor:
    """float32 [n]: the mean absolute value of each lane."""
    return value.flatten(1).abs().mean(1, dtype=torch.float32)


def _check_estimate(found: object, n: int, device: torch.device) -> None:
    if not isinstance(found, Tensor) or found.shape != (n,) or found.dtype != torch.float32 or found.device != device:
        given = f"{found.dtype} {list(found.shape)} on {found.device}" if isinstance(found, Tensor) else repr(found)
        raise ValueError(f"estimate must return float32 [{n}] on {device}, got {given}")


def _check_mask(mask: object, n: int, device: torch.device) -> None:
    if not isinstance(mask, Tensor) or mask.shape != (n,) or mask.dtype != torch.bool or mask.device != device:
        given = f"{mask.dtype} {list(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"reuse_mask must return bool [{n}] on {device}, got {given}")
