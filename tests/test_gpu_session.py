"""What the GPU suites share, without a GPU: rows made once, limits of time, graphs that share memory, and what an image
may lack."""

import importlib.util
import json
import sys
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import rows
from benchmarks.gpu import lacking
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import session as gpu_session
from benchmarks.gpu.session import DeviceTimer, OutOfTime, Session, Task

CPU = torch.device("cpu")
GPU = {"gpu": "a GPU", "gpu_gib": 1.0}


class Kept(Session):
    """A dry run whose rows are kept, as if a device had measured them."""

    dry = True

    def __post_init__(self) -> None:
        pass


class Measured(Kept):
    dry = False


def test_rows_are_made_once_for_each_commit_and_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "gpu_state", dict)
    parameters = {"bytes": 4096}

    def missing(device: dict[str, object], commit: str, asked: dict[str, object] = parameters) -> bool:
        return Measured(CPU, rows.Rows(tmp_path, device, commit)).missing("gpu-ceilings", "copy", asked)

    first = Kept(CPU, rows.Rows(tmp_path, GPU, "one"))
    assert missing(GPU, "one")
    gpu_run.ceilings.copy(first, 4096)
    assert not missing(GPU, "one")
    assert missing(GPU, "other")
    assert missing({"gpu": "another"}, "one")
    assert missing(GPU, "one", {"bytes": 8192})
    lines = first.rows.path.read_text().splitlines()
    first.rows.path.write_text(json.dumps({**json.loads(lines[0]), "last": False}) + "\n")
    assert missing(GPU, "one")  # stopped between two rows of a comparison


def test_no_comparison_starts_after_the_deadline(tmp_path: Path) -> None:
    late = Measured(CPU, rows.Rows(tmp_path, GPU, "one"), deadline=0.0)
    with pytest.raises(OutOfTime):
        late.missing("gpu-ceilings", "copy", {})


def test_a_comparison_that_fails_costs_the_others_nothing(tmp_path: Path, capfd) -> None:
    ran = []

    def tasks(session: Session) -> list[Task]:
        return [Task("copy", {"n": n}, lambda n=n: ran.append(1 // n)) for n in (1, 0, 1)]

    suite = SimpleNamespace(SUITE="gpu-ceilings", tasks=tasks)
    assert gpu_run.run_suite(Measured(CPU, rows.Rows(tmp_path, GPU, "one")), suite) == 1
    assert ran == [1, 1]
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_rows_need_a_device(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows need a CUDA device, got cpu"):
        Session(CPU, rows.Rows(tmp_path, GPU))


def test_a_turn_is_one_stretch_over_many_calls() -> None:
    now, calls = [0.0], []

    def call() -> None:
        calls.append(now[0])
        now[0] += 3.0 if len(calls) == 1 else 1.0

    timer = DeviceTimer(CPU, turn=12.0, clock=lambda: now[0])
    assert timer(call) == 1.0  # the first call, 3 seconds long, says that four fill the turn
    assert len(calls) == 5
    assert DeviceTimer(CPU, turn=0.5, clock=lambda: now[0])(call) == 1.0  # a call longer than its turn counts itself
    assert len(calls) == 6


def test_the_limit_stops_what_has_begun(tmp_path: Path) -> None:
    """And is no failure of the comparison."""
    began = []

    def measure() -> None:
        began.append(1)
        time.sleep(60)

    suite = SimpleNamespace(
        SUITE="gpu-ceilings", tasks=lambda session: [Task("copy", {"n": n}, measure) for n in (1, 2)]
    )
    with pytest.raises(OutOfTime), gpu_session.limited(0.05):
        gpu_run.run_suite(Measured(CPU, rows.Rows(tmp_path, GPU, "one")), suite)
    assert began == [1]
    with gpu_session.limited(0.05):
        pass
    time.sleep(0.1)  # nothing is left over


class Pools:
    """PyTorch's rule: a pool that graphs have used is refused once they have all gone."""

    def __init__(self) -> None:
        self.users: dict[int, int] = {}

    def graph(self, graph: "Graph", pool: int | None = None) -> nullcontext:
        if pool is not None:
            assert self.users.get(pool) != 0, "use_count > 0 INTERNAL ASSERT FAILED"
            self.users[pool] = self.users.get(pool, 0) + 1
            weakref.finalize(graph, lambda: self.users.update({pool: self.users[pool] - 1}))
        return nullcontext()


class Graph: ...


def test_graphs_share_a_pool_from_comparison_to_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, some = Pools(), torch.zeros(1)
    for name, value in {"CUDAGraph": Graph, "graph": pools.graph, "graph_pool_handle": lambda: 7}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_session.torch, "zeros", lambda *_, **__: some)
    session = Session(torch.device("cuda", 0))
    assert pools.users == {7: 1}
    for _ in range(2):
        graph = Graph()
        with torch.cuda.graph(graph, pool=session.pool):
            assert pools.users == {7: 2}
        del graph
        assert pools.users == {7: 1}


def test_what_an_image_lacks_is_stood_in_for(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    names = {path for parts in lacking.STAND_INS.values() for path in parts}
    for path in names:
        monkeypatch.delitem(sys.modules, path, raising=False)
    monkeypatch.setattr(lacking, "find_spec", lambda name: None)
    assert lacking.missing() == ["tqdm", "safetensors", "hypothesis"]
    lacking.install(lacking.STAND_INS)
    assert [importlib.util.find_spec(path).origin for path in names] == [None] * len(names)
    made: dict[str, object] = {}
    exec(IMAGE, made)
    with pytest.raises(ImportError, match="safetensors is not installed here"):
        made["safe_open"]("a file", framework="pt")
    assert [mark.name for mark in made["test_random"].pytestmark] == ["slow", "skip"]
    assert list(made["tqdm"]([1, 2], desc="two")) == [1, 2]
    made["tqdm"].write("a line")
    assert capsys.readouterr().out == "a line\n"


IMAGE = """
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

settings.register_profile("own", suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("own")
numbers = st.lists(st.integers(0, 3) | st.none())

@st.composite
def runs(draw: st.DrawFn): ...

@given(numbers, run=runs())
@settings(max_examples=3)
@pytest.mark.slow
def test_random(numbers, run): ...

try:
    raise ValueError
except (SafetensorError, ValueError):
    pass
with tqdm(total=3) as bar:
    bar.update(1)
    bar.set_postfix(depth=1)
"""
