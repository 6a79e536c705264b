"""csrc/compaction.cu on a machine without a GPU: it imports, checks, and says what CUDA lacks.

What it computes is tested in csrc/compact_tests.cpp, thread by thread, and on a GPU in test_device_set.py; what it
takes of a GPU in test_compile_gpu.py.
"""

from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def cuda_core() -> ModuleType:
    core = pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")
    if not core.cuda_built:
        pytest.skip("the extension was built without CUDA")
    return core


def test_the_runtime_is_linked_in(cuda_core: ModuleType) -> None:
    """So the module imports where there is no CUDA, and beside whatever runtime PyTorch brings."""
    assert b"libcudart.so" not in Path(cuda_core.__file__).read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_says_itself_what_is_missing(cuda_core: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"^cudaGetDevice: (?!no error).+"):
        cuda_core.MappedWord(0)
    with pytest.raises(RuntimeError, match=r"^cudaGetDevice: (?!no error).+"):
        cuda_core.start(8, 8, 8, 8, 4, 4, 8, 0, 0)


GOOD = dict.fromkeys(("row_to_lane", "lane_to_row", "exit_layer", "state", "u", "threshold", "moves", "word"), 8) | {
    **dict.fromkeys(("mask", "partner", "snapshot", "device", "stream"), 0),
    "bound": 3,
    "num_lanes": 4,
    "count": 4,
    "layer": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_lanes": 32769}, r"num_lanes must lie in \[0, 32768\]"),
        ({"num_lanes": -1}, "num_lanes must lie"),
        ({"bound": 5}, r"bound must lie in \[0, num_lanes\]"),
        ({"bound": -1}, "bound must lie"),
        ({"layer": 0}, r"layer must lie in \[1, 65535\]"),
        ({"layer": 65536}, "layer must lie"),
        ({"lane_to_row": 0}, "row_to_lane, lane_to_row or exit_layer is null"),
        ({"state": 0}, "state or word is null"),
        ({"word": 0}, "state or word is null"),
        ({"moves": 0}, "moves is null"),
        ({"threshold": 0}, "u needs threshold"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_launched(
    cuda_core: ModuleType, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^compact: {message}"):
        cuda_core.compact(**{name: value for name, value in GOOD.items() if name != "count"} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_lanes": 32769}, r"num_lanes must lie in \[0, 32768\]"),
        ({"count": 5}, r"count must lie in \[0, num_lanes\]"),
        ({"count": -1}, "count must lie"),
        ({"exit_layer": 0}, "row_to_lane, lane_to_row or exit_layer is null"),
        ({"word": 0}, "state or word is null"),
    ],
)
def test_bad_starts_are_refused(cuda_core: ModuleType, change: dict[str, int], message: str) -> None:
    names = ("row_to_lane", "lane_to_row", "exit_layer", "state", "num_lanes", "count", "word", "device", "stream")
    with pytest.raises(ValueError, match=f"^start: {message}"):
        cuda_core.start(**{name: GOOD[name] for name in names} | change)
