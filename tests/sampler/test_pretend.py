"""The pretended device has the manners of one (pretend.py), and what is run there alone keeps to them."""

import numpy as np
import pytest
import torch

from adadiff_kernels import settle_rows, upload_together
from pretend import DEVICE, OnDevice, PretendDevice, Waits


@pytest.mark.parametrize("inference", [False, True], ids=["usual", "inference"])
def test_the_pretended_device_has_the_manners_of_one(inference: bool) -> None:
    """What it lets pass is worth nothing unless it stops what a device would stop."""
    cpu, waits = torch.arange(4.0), pytest.raises(Waits)
    with torch.inference_mode(inference), PretendDevice(strict=True):
        x = torch.zeros(4, device=DEVICE)
        assert x.device == DEVICE
        x.copy_(cpu.pin_memory(), non_blocking=True)
        assert (x + 1)[1:].add_(1).device == DEVICE
        assert cpu.pin_memory().to(DEVICE, non_blocking=True)[1:].device == DEVICE
        with pytest.raises(RuntimeError, match="tensors on"):
            _ = x + cpu
        with pytest.raises(RuntimeError, match="tensors on"):
            torch.cat([x, cpu])
        for call in (
            lambda: int(x.sum()),
            lambda: bool((x > 1).any()),
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x[torch.tensor([0])],
            lambda: x.cpu(),
            lambda: cpu.to(DEVICE),
            lambda: cpu.to(DEVICE, non_blocking=True),  # from memory that is not pinned
            lambda: cpu.pin_memory().to(DEVICE),
            lambda: torch.equal(x, x),
            lambda: torch.tensor([1.0], device=DEVICE),
        ):
            with waits:
                call()
    assert x.held.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("used", [0, 1, 2])
def test_rows_settle_without_a_look_at_the_moves(used: int) -> None:
    """By PyTorch, where Triton is missing: of unused moves as of others, in any dtype."""
    moves = torch.tensor([[0, 3, 6], [2, 1, -1], [-1, -1, -1], [-1, -1, -1]][2 - used : 5 - used], dtype=torch.int32)
    for rows in (torch.arange(14.0).view(7, 2), (torch.arange(14) % 3 == 0).view(7, 2)):
        saved = torch.zeros_like(rows[:5])
        held = OnDevice(rows.clone()), OnDevice(saved.clone())
        for row, lane, source in moves.tolist()[:used]:
            saved[lane] = rows[row]
            rows[row] = rows[source if source >= 0 else row]
        with PretendDevice(strict=True):
            settle_rows(OnDevice(moves), *held)
            settle_rows(OnDevice(moves[:0]), *held)
        assert torch.equal(held[0].held, rows)
        assert torch.equal(held[1].held, saved)
    held, saved = OnDevice(torch.arange(7)), OnDevice(torch.full((7,), -1))
    with PretendDevice(strict=True):  # as many moves as rows exit, which is what a host's plan has
        settle_rows(OnDevice(torch.tensor([[0, 5, 6], [2, 4, -1]], dtype=torch.int32)[:used]), held, saved)
    assert held.held.tolist() == [[0, 1, 2, 3, 4, 5, 6], [6, 1, 2, 3, 4, 5, 6], [6, 1, 2, 3, 4, 5, 6]][used]
    assert saved.held.tolist() == [[-1] * 7, [*[-1] * 5, 0, -1], [*[-1] * 4, 2, 0, -1]][used]


def test_several_values_go_in_one_transfer() -> None:
    """Of any dtype and shape, gaps in memory and nothing at all included; and the host may change them at once."""
    values = [
        np.arange(5),
        None,
        torch.arange(6.0).view(2, 3).bfloat16(),
        np.array([True, False, True]),
        torch.arange(12, dtype=torch.float64)[::3],
        np.zeros(0, dtype=np.int64),
        torch.arange(3, dtype=torch.int32),
    ]
    wanted = [None if v is None else torch.as_tensor(v).clone() for v in values]
    assert upload_together(values, torch.device("cpu"))[0].data_ptr() == values[0].ctypes.data
    with PretendDevice(strict=True) as device:
        before = len(device._kept)
        found = upload_together(values, DEVICE)
        assert len(device._kept) == before + 1  # pieces of pinned memory
        values[0][:] = 7
    for value, want in zip(found, wanted, strict=True):
        assert (value is None) == (want is None)
        if want is not None:
            assert value.device == DEVICE
            assert (value.dtype, value.shape) == (want.dtype, want.shape)
            assert torch.equal(value.held, want)
