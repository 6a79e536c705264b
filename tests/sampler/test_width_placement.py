"""Narrow networks whose exits are decided on the device, their pieces captured."""

import pytest
import torch

from adadiff.engine.engine import Engine
from adadiff.forward.narrow import narrow
from adadiff.forward.options import ExecutionOptions
from adadiff.policies.width import Width
from pretend import PretendDevice, moved
from recorder import recorded
from sampler.slim import slim_served

FOLLOWED = Width((200.0, 480.0, 777.0), (1.0, 0.25, 0.8, 0.5))


def test_pieces_of_every_width_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes at different times, some guided, that exit: as on the CPU."""
    wanted = [
        {"seed": i, "steps": 3 + i, "class_labels": i % 3, "guidance_scale": 1 + i % 2, "policy": policy}
        for i, policy in enumerate([("exit:depth=2.5", FOLLOWED), FOLLOWED, "full", "width:0.25"])
    ]
    with Engine(slim_served(), 5, threaded=False) as engine:
        on_cpu = [engine.submit(**request) for request in wanted]
    model = moved(slim_served())
    execution = ExecutionOptions(runner="captured", count_sync="lagged")
    with recorded(monkeypatch) as graphs, PretendDevice():
        with Engine(model, 5, threaded=False, execution=execution) as engine:
            handles = [engine.submit(**request) for request in wanted]
        assert len({narrow(model, width) for width in FOLLOWED.widths}) == 4
    assert graphs.replays > graphs.captures > 0
    for handle, usual in zip(handles, on_cpu, strict=True):
        assert torch.equal(handle.report.exit_layer, usual.report.exit_layer)
        image = usual.result(0)
        torch.testing.assert_close(handle.result(0), image, rtol=1e-3, atol=1e-3 * float(image.abs().max()))
