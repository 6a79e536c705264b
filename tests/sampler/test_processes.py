"""Two processes on the CPU, joined by accelerate, against one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adadiff.checkpoint import read_tensors
from adadiff.training.config import TrainConfig, load_config
from adadiff.training.processes import Processes
from adadiff.training.run_folder import LOG, MODEL, STATE
from adadiff.training.trainer import Trainer

CONFIG = """
format_version = 2
steps = 4
batch = 8
warmup = 1
save_every = 2
log_every = 1
sample_every = 4
loss = "supervised"
accumulate = 2
network = { dim = 16, depth = 2, heads = 2 }
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def train(config: Path, out: Path, world: int) -> list[subprocess.CompletedProcess]:
    """`adadiff train` as many times as a launcher would start it."""
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "adadiff", "train", str(config), "--out", str(out)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        ended = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess("", p.returncode, *e) for p, e in zip(started, ended, strict=True)]


def moved(file: Path, start: dict[str, Tensor]) -> Tensor:
    state = read_tensors(file)[0]
    return torch.cat([(state[f"model.{key}"] - value).flatten() for key, value in start.items()])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["supervised", "official"])
def test_two_processes_train_as_one_does(loss: str, tmp_path: Path) -> None:
    """The same batches in two shares: gradients are averages over both, so only sums are taken in another order. Were
    they not averaged, or both shares the same, weights would part at once."""
    pytest.importorskip("accelerate")
    file = tmp_path / "c.toml"
    file.write_text(CONFIG.replace("supervised", loss))
    config = load_config(file, {})
    one = Trainer(config, tmp_path / "one")
    start = {key: value.clone() for key, value in one.model.state_dict().items()}
    one.run(progress=False)
    first, second = train(file, tmp_path / "two", 2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "wrote" in first.stdout
    assert second.stdout == ""
    own, wanted = (moved(tmp_path / name / STATE, start) for name in ("two", "one"))
    # Adam divides by the gradient's size, so where that is next to nothing even rounding shows
    assert float((own - wanted).norm() / wanted.norm()) < 0.02
    logs = [(tmp_path / name / LOG).read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 4
    assert Trainer(config, tmp_path / "two").step == 4  # one process goes on where two stopped
    assert (tmp_path / "two" / MODEL).is_file()


def test_a_batch_must_part_into_equal_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "__init__", lambda self: vars(self).update(rank=0, world=3, device="cpu"))
    with pytest.raises(ValueError, match="a batch of 8 cannot be split into 2 equal parts for each of 3 processes"):
        Trainer(TrainConfig(batch=8, accumulate=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_accelerate_several_processes_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ImportError, match=r"adadiff_kernels\[train\]"):
        Processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    alone = Processes()
    assert alone.main
    assert torch.equal(alone.mean(torch.ones(2)), torch.ones(2))
