"""What reuse moves in memory beside the blocks' own work, counted in rows: seconds would not tell."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adadiff
from adadiff.policies.reuse import ReuseContext, ReusePolicy

B, BLOCKS, TOKENS, CHANNELS = 7, 5, 3, 6
ROW = TOKENS * CHANNELS  # numbers of a lane


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return torch.addcmul(hidden_states, self.map(hidden_states).tanh(), temb[:, None])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb = (1 + torch.arange(CHANNELS) / CHANNELS).expand(len(hidden_states), -1).contiguous()
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return hidden_states


class Given(ReusePolicy):
    gate = "residual"
    full: tuple[int, ...] = ()

    def reuse_mask(self, change: Tensor | None, context: ReuseContext) -> Tensor:
        return ~torch.isin(torch.arange(B), torch.tensor(self.full))

    def __str__(self) -> str:
        return "given"


MOVE = (
    "clone",
    "index_select",
    "index_copy",
    "index_copy_",
    "copy_",
    "cat",
    "where",
    "sub",
    "add",
    "abs",
    "abs_",
)


class Written(TorchDispatchMode):
    """Rows of hidden states, and of gates, that operators write which blocks do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        moved = args[3] if name == "index_copy_" else output
        if isinstance(moved, Tensor) and moved.shape[1:] in ((TOKENS, CHANNELS), (ROW,)) and name in MOVE:
            self.rows[name] += len(moved)
        return output


def written(full: tuple[int, ...], network: nn.Module) -> dict[str, int]:
    """In a call that is neither the first nor the first that leaves anything out."""
    policy, x = Given(), torch.randn(B, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1))
    inputs = [x + 0.1 * step for step in range(3)]
    adadiff.enable(network, policy)
    for step, lanes in enumerate((tuple(range(B)), full, full)):
        policy.full = lanes
        with torch.no_grad(), Written() as counted:
            network(inputs[step], torch.tensor(1.0 - 0.1 * step))
    adadiff.disable(network)
    return dict(counted.rows)


def ready() -> Network:
    return Network().eval().requires_grad_(False)


@pytest.mark.parametrize("full", [(0, 2, 3, 5, 6), (0, 3)], ids=["most run", "few run"])
def test_rows_that_run_are_taken_once_and_put_back_once(full: tuple[int, ...]) -> None:
    n = len(full)
    moved = min(n, B - n)  # of the gate's reference, the fewer
    assert written(full, ready()) == {
        "index_select": 3 * n + moved,  # what goes into the first later block, twice, and the gate for its norm
        "index_copy_": (BLOCKS - 1) * n + n + moved,  # what each later block gives, and what they have added
        "sub": 2 * B + n,  # the gate, its change, what was added
        "add": B,  # what is reused, onto what goes into the later blocks
        "abs": n,
        "abs_": B,
    }


def test_rows_that_lie_together_are_not_taken_out() -> None:
    n = 3
    assert written((2, 3, 4), ready()) == {
        "copy_": (BLOCKS - 1) * n + n + n,
        "sub": 2 * B + n,
        "add": B,
        "abs": n,
        "abs_": B,
    }


def test_nobody_and_everybody() -> None:
    """Nothing is copied where nothing has to be kept apart."""
    assert written((), ready()) == {"sub": 2 * B, "add": B, "abs_": B}
    assert written(tuple(range(B)), ready()) == {"sub": 3 * B, "abs": B, "abs_": B}


class Touching(Network):
    """Changes in place, from call number `since` on, what went into block number `place`, after the block has run."""

    def __init__(self, place: int, since: int) -> None:
        super().__init__()
        self.place, self.since, self.calls = place, since, 0

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb, last = (1 + torch.arange(CHANNELS) / CHANNELS).expand(len(hidden_states), -1), hidden_states * 1.0
        self.calls += 1
        for i, block in enumerate(self.blocks):
            output = block(last, temb)
            if i == self.place and self.calls > self.since:
                last.mul_(-2.0)
            last = output
        return last


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_goes_in_may_be_changed_in_place(place: int, inference: bool) -> None:
    """Where it is at the first call it is copied, and where such changes are not counted; the first block's and the
    second's input are read again after these have run."""
    network, policy = Touching(place, since=0).eval().requires_grad_(False), Given()
    x, t = torch.randn(B, TOKENS, CHANNELS), torch.tensor(1.0)
    plain = network(x, t)
    record = adadiff.enable(network, policy)
    with torch.inference_mode() if inference else torch.no_grad():
        for step, policy.full in enumerate((tuple(range(B)), (1, 4), (), (1, 2))):
            torch.testing.assert_close(network(x, t - 0.1 * step), plain, rtol=0, atol=1e-5)
    assert [int(step.full.sum()) for step in record.steps] == [B, 2, 0, 2]
    assert all(float(step.change.max()) < 1e-5 for step in record.steps[1:])


@pytest.mark.parametrize("place", [1])
def test_what_is_changed_in_place_unlike_at_first_is_refused(place: int) -> None:
    network, policy = Touching(place, since=2).eval().requires_grad_(False), Given()
    x, t = torch.randn(B, TOKENS, CHANNELS), torch.tensor(1.0)
    adadiff.enable(network, policy)
    with torch.no_grad():
        network(x, t)
        policy.full = (1, 4)
        network(x, t - 0.1)
        with pytest.raises(ValueError, match=r"changed in place, unlike at its first call$"):
            network(x, t - 0.2)


class Reading(Network):
    """Reads what an inner block gives, outside of the blocks."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb, inner = torch.ones(len(hidden_states), CHANNELS), []
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
            inner.append(hidden_states)
        return hidden_states + 0.1 * inner[2]


@pytest.mark.parametrize("full", [(1, 4), ()])
def test_a_network_that_reads_what_inner_blocks_give_is_refused(full: tuple[int, ...]) -> None:
    """Of samples that reuse there is nothing to read. It is found the first time anybody reuses."""
    network, policy = Reading().eval().requires_grad_(False), Given()
    x, t = torch.randn(B, TOKENS, CHANNELS), torch.tensor(1.0)
    adadiff.enable(network, policy)
    for _ in range(2):
        with torch.no_grad():
            policy.full = tuple(range(B))
            network(x, t)
            policy.full = full
            with pytest.raises(ValueError, match=r"it reads outputs of inner blocks outside of the blocks$"):
                network(x, t - 0.1)
