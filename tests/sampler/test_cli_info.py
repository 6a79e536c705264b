"""`adadiff info`: versions, devices, and what serves each operator there."""

import importlib
import os
import sys

import numpy as np
import pytest
import torch

import adadiff
import adadiff_kernels
from adadiff.commands import info
from adadiff_kernels import backends, extension
from sampler.shell import run


def told(capsys: pytest.CaptureFixture) -> dict[str, str]:
    """What is printed, by the name at the beginning of each line."""
    assert run("info") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = [line for line in captured.out.splitlines() if line]
    rows = {line[:25].strip(): line[26:].strip() for line in lines}
    assert len(rows) == len(lines)
    return rows


def test_versions(capsys) -> None:
    rows = told(capsys)
    assert rows["adadiff"] == adadiff.__version__
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (rows["torch"], rows["numpy"]) == (torch.__version__, np.__version__)
    assert rows["cuda of torch"] == (torch.version.cuda or "none")
    for name in ("triton", "diffusers"):
        try:
            wanted = importlib.import_module(name).__version__
        except ImportError:
            wanted = "not installed"
        assert rows[name] == wanted


def test_packages_that_are_missing_are_no_error(capsys, monkeypatch) -> None:
    for name in ("triton", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = told(capsys)
    assert (rows["triton"], rows["diffusers"]) == ("not installed", "not installed")


def test_every_operator_and_what_serves_it(capsys) -> None:
    rows = told(capsys)
    own = list(rows)
    assert tuple(own[own.index("kernels") + 1 :]) == adadiff_kernels.OPERATORS
    cpu = backends("cpu")
    gpu = backends("cuda") if torch.cuda.is_available() else dict.fromkeys(cpu, "no GPU")
    assert len(cpu) > 5
    for name in adadiff_kernels.OPERATORS:
        assert rows[name].split() == f"{cpu[name]} {gpu[name]}".split()
    assert {cpu[name] for name in ("residual_uem", "compaction", "settle_rows")} == {"C++"}


def test_without_the_extension_it_is_pytorch_and_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr(extension, "core", None)
    rows = told(capsys)
    for name in ("residual_uem", "compaction", "settle_rows"):
        assert rows[name].startswith("PyTorch: the extension is not built ")


def test_devices(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    rows = told(capsys)
    assert rows["cpu"].endswith(f", {torch.backends.cpu.get_cpu_capability()}")
    assert rows["threads"] == f"{torch.get_num_threads()} of {os.cpu_count()}"
    assert rows["gpu"].startswith("none: ")
    for version, why in ((None, "this PyTorch is built without CUDA"), ("13.0", "PyTorch finds no CUDA device")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert why in told(capsys)["gpu"]


def test_gpus_are_named_and_their_kernels(capsys, monkeypatch) -> None:
    """As if there were two: what would serve them is asked of `backends`."""

    class Properties:
        name, major, minor, total_memory = "NVIDIA Some", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    served = {"compaction": "CUDA", "philox": "PyTorch: no Triton"}

    def found(device: str) -> dict[str, str]:
        return backends(device) if device == "cpu" else dict.fromkeys(adadiff_kernels.OPERATORS, "Triton") | served

    monkeypatch.setattr(info, "backends", found)
    rows = told(capsys)
    assert rows["cuda:0"] == rows["cuda:1"] == "NVIDIA Some, compute capability 9.0, 80 GiB"
    assert "gpu" not in rows
    ends = {"compaction": " CUDA", "philox": " PyTorch: no Triton", "residual_uem": " Triton"}
    assert all(rows[name].endswith(end) for name, end in ends.items())
