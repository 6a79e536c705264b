"""What every test runs under: fixed seeds, NaN in fresh memory, one thread, Triton's interpreter."""

import os
import random
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Read by Triton when a kernel is decorated, hence set before any import of the package.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# An element nobody writes shows: fresh floats are NaN, fresh integers the largest.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
# The tensors are so small that a second thread costs more than it does, a hundredfold where the cores are busy.
torch.set_num_threads(1)

from adadiff_kernels import extension  # noqa: E402

# Fixtures choose an implementation or a seed and keep nothing from example to example.
settings.register_profile(
    "adadiff",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("adadiff")


def pytest_configure(config: pytest.Config) -> None:
    # The price of the flag above: operators without a deterministic form say so.
    config.addinivalue_line("filterwarnings", "ignore:.*use_deterministic_algorithms:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["extension", "pytorch"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType | None:
    """Runs a test twice: by the compiled core what it can do, then by PyTorch alone."""
    if request.param == "pytorch":
        monkeypatch.setattr(extension, "core", None)
        return None
    return pytest.importorskip("adadiff_kernels._C", reason="the extension is not built")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries under test draw from the global generator
    torch.manual_seed(0)
