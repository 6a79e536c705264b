"""Every example runs, shortened, and a network of one's own keeps what networks promise."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import adadiff
from adadiff import forward
from adadiff.config import PRESETS
from adadiff.models import FAMILIES
from adadiff.policies.exits import Full, Replay

EXAMPLES = Path(__file__).parents[1] / "examples"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(FAMILIES, "mine", None)  # restored, whatever the example registers
    monkeypatch.setitem(PRESETS, "mine", None)
    return loaded("own_network")


@torch.no_grad()
def test_a_network_of_ones_own(mine: ModuleType, tmp_path: Path) -> None:
    """Full depth is its own forward; each exit is that layer's prediction; saved and loaded it is the same."""
    model = adadiff.build("mine")
    torch.manual_seed(1)
    x, t = torch.randn(6, 1, 8, 8), torch.linspace(10, 900, 6)
    torch.testing.assert_close(forward(model, x, t, policy=Full()).prediction, model.backbone(x, t))
    depth = torch.tensor([1.0, 5, 3, 2, 4, 5])
    found = forward(model, x, t, policy=Replay(), threshold=depth)
    assert found.exit_layer.tolist() == depth.tolist()
    for lane in range(6):
        alone = forward(
            model, x[lane : lane + 1], t[lane : lane + 1], policy=Replay(), threshold=depth[lane : lane + 1]
        )
        torch.testing.assert_close(found.prediction[lane], alone.prediction[0], rtol=1e-4, atol=1e-5)
    adadiff.save(model, tmp_path / "mine.safetensors")
    assert torch.equal(adadiff.load(tmp_path / "mine.safetensors").backbone(x, t), model.backbone(x, t))


def test_the_example_of_a_network_runs(mine: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    mine.main(steps=3)
    shown = capsys.readouterr().out
    assert "mean exit layer 3.50 of 5" in shown
    assert "images [16, 1, 8, 8]" in shown
