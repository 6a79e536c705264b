"""The one command for a GPU, without one: its parts, its limits, and a folder that is complete after each part."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.gpu import testing as gpu_testing
from benchmarks.gpu import verdict as gpu_verdict
from benchmarks.gpu.verdict import Outcome, Part, Run

ROOT = Path(__file__).resolve().parents[1]

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/python:{ROOT}/benchmarks"}


def python(code: str, name: str = "part", limit: float = 60.0, **given: object) -> Part:
    return Part(name, limit, lambda run, limit: [sys.executable, "-c", code, *(["no"] if run.dry else [])], **given)


def summary(run: Run) -> dict:
    return json.loads((run.out / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "limit", "status", "why"),
    [
        ("print('fine')", 60.0, "ok", ""),
        ("print('one'); print('ValueError: bad'); raise SystemExit(3)", 60.0, "failed", "ValueError: bad"),
        ("import time; time.sleep(60)", 0.4, "late", "not finished after 0 s"),
        (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
            0.6,
            "late",
            "after 1 s",
        ),
    ],
)
def test_a_part_says_what_came_of_it(tmp_path: Path, code: str, limit: float, status: str, why: str, capsys) -> None:
    run = Run(tmp_path, "a commit", dry=True)
    outcome = run.run(python(code, limit=limit, most=0.0))
    assert (outcome.part, outcome.status) == ("part", status)
    assert why in outcome.why
    run.note(outcome)
    log = (tmp_path / "log.txt").read_text()
    assert log == capsys.readouterr().out
    assert "part, at most" in log
    assert summary(run)["parts"] == [vars(outcome)]
    assert summary(run)["commit"] == "a commit"


def test_workers_of_a_late_part_end_with_it(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    code += "print(p.pid, flush=True); time.sleep(60)"
    Run(tmp_path, "a commit", dry=True).run(python(code, limit=1.5, most=0.0))
    worker = int((tmp_path / "log.txt").read_text().split("\n")[-2])
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    raise AssertionError("the worker runs on")


def test_nothing_starts_too_late(tmp_path: Path) -> None:
    now = [0.0]
    run = Run(tmp_path, "a commit", dry=True, clock=lambda: now[0])
    assert run.run(python("")).status == "ok"
    now[0] = 541.0
    late = run.run(python(""))
    assert (late.status, late.why) == ("not run", "49 s were left")
    now[0] = 535.0
    memcheck = gpu_verdict.PARTS["memcheck"]
    assert run.run(python("", name=memcheck.name, most=memcheck.most)).status == "ok"  # 55 s will do
    now[0] = 546.0
    assert run.run(python("", name=memcheck.name, most=memcheck.most)).status == "not run"


def test_the_limits_fit_into_ten_minutes() -> None:
    """Even if every part before them takes all of its time, the verdict itself has been given."""
    later = ("serving", "decision", "mlp", "memcheck")
    first = [part for part in gpu_verdict.chosen_parts(None) if part.name not in later]
    assert sum(part.limit for part in first) <= gpu_verdict.END
    second = gpu_verdict.chosen_parts("tests,network64,dit64,dit8")
    assert sum(part.limit for part in second) <= 400


def test_what_the_build_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_verdict, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_verdict.shutil, "which", lambda name, path=None: None)
    run = Run(tmp_path, "a commit", dry=True)
    outcome = run.run(gpu_verdict.PARTS["build"])
    assert outcome == Outcome(
        "build", "left out", 0.0, "missing: setuptools, pybind11, cmake, ninja, a C++ compiler, nvcc"
    )
    assert run.run(gpu_verdict.PARTS["tests"]) == Outcome("tests", "left out", 0.0, "missing: pytest")


@pytest.mark.parametrize(("code", "status"), [(0, "ok"), (9, "failed"), (255, "left out")])
def test_a_sanitizer_that_cannot_work_fails_nothing(tmp_path: Path, monkeypatch, code: int, status: str) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho Device not supported\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_verdict.shutil, "which", lambda name: str(tool))
    run = Run(tmp_path, "a commit", dry=True)
    run.dry = False
    outcome = run.run(gpu_verdict.PARTS["memcheck"])
    assert outcome.status == status
    assert status != "left out" or outcome.why == "the tool does not work here: Device not supported"


def test_parts_are_chosen_by_name() -> None:
    names = [part.name for part in gpu_verdict.chosen_parts(None)]
    assert names[:3] == ["build", "small", "tests"]
    assert not {"dit64", "dit8"} & set(names)
    assert [part.name for part in gpu_verdict.chosen_parts("network64, tests")] == ["tests", "network64"]
    for only in ("tests,nothing", ","):
        with pytest.raises(ValueError, match=r"^no part .*; there are build, small, tests"):
            gpu_verdict.chosen_parts(only)


@pytest.mark.slow
def test_every_part_runs_dry_and_the_folder_is_complete(tmp_path: Path) -> None:
    """The commands as they will be run, each at its smallest: no argument, path or index fails there at first."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.gpu.verdict", "--dry", "--out", str(tmp_path), "--commit", "a commit"]
    command += [
        "--only",
        ",".join(name for name in gpu_verdict.PARTS if name != "build"),
    ]  # which test_build.py does
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [part["status"] for part in found["parts"]] == ["ok"] * (len(gpu_verdict.PARTS) - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("junit.xml", "log.txt", "summary.json", "trace-2.json.gz", "trace-3.json.gz"),
    ]
    assert int(ET.parse(tmp_path / "junit.xml").getroot()[-1].get("failures")) == 0


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_no_process(tmp_path: Path, sign: signal.Signals) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.verdict", "--dry", "--out", str(tmp_path), "--only", "tests,small"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # what a script runs in the background inherits that SIGINT is ignored
    heeds = partial(signal.signal, sign, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, preexec_fn=heeds, **pipes)
    for line in process.stdout:
        if "benchmarks.gpu.small" in line:
            process.send_signal(sign)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "small: interrupted" in rest
    assert "Traceback" not in rest
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [part["status"] for part in found["parts"]] == ["interrupted"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_without_a_gpu_one_line_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.verdict"], env=ENVIRONMENT, capture_output=True, text=True
    )
    if done.returncode == 0:
        pytest.skip("there is a GPU")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-verdict: PyTorch finds no CUDA device here (")
    assert not done.stdout


@pytest.mark.slow
def test_every_test_is_in_one_shard(tmp_path: Path) -> None:
    code = "import pytest\n@pytest.mark.parametrize('n', range(7))\ndef test_one(n): pass\ndef test_other(): pass\n"
    (tmp_path / "test_shards.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-p",
        "benchmarks.gpu.shards",
        "-k",
        "one",
        str(tmp_path),
    ]

    def collected(shard: str) -> list[str]:
        more = ["--shard", shard, "--rootdir", str(tmp_path)]
        done = subprocess.run([*command, *more], env=ENVIRONMENT, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if "::" in line]

    shards = [collected(f"{i}/3") for i in range(3)]
    assert sorted(test for shard in shards for test in shard) == sorted(collected("0/1"))
    assert [len(shard) for shard in shards] == [3, 2, 2]


@pytest.mark.parametrize("xdist", [False, True])
def test_tests_are_run_by_whatever_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xdist: bool) -> None:
    monkeypatch.setattr(gpu_testing, "find_spec", lambda name: xdist or None)
    stage = gpu_testing.stages(dry=False)[0]
    made = gpu_testing.commands(stage, tmp_path, 4)
    assert len(made) == (1 if xdist else 4)
    for i, (command, report) in enumerate(made):
        assert f"--junitxml={report}" in command
        assert command[command.index("-m", 3) + 1] == "gpu and not slow"
        assert ("-n" in command) == xdist
        assert xdist or command[command.index("--shard") + 1] == f"{i}/4"
    assert {"tests/gpu/test_engine.py", "tests/gpu/test_kernels.py"} <= set(stage.paths)
    assert "tests/sampler/test_cli.py" not in stage.paths


def test_reports_become_one_even_if_one_is_broken(tmp_path: Path) -> None:
    suite = '<testsuite tests="{}" failures="1" errors="0" skipped="2"><testcase name="a"/></testsuite>'
    text = f"<testsuites>{suite}</testsuites>"
    for name, tests in (("one", 5), ("two", 7)):
        (tmp_path / name).write_text(text.format(tests))
    (tmp_path / "broken").write_text("<testsuites><testsu")
    counts = gpu_testing.merge([tmp_path / name for name in ("one", "broken", "two")], tmp_path / "junit.xml")
    assert counts == {"tests": 12, "failures": 2, "errors": 0, "skipped": 4, "passed": 6}
    assert len(ET.parse(tmp_path / "junit.xml").getroot().findall("testsuite/testcase")) == 2


@pytest.mark.slow
def test_a_late_stage_reports_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(60)\n")
    monkeypatch.setattr(gpu_testing, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_testing, "find_spec", lambda name: None)
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    stage = gpu_testing.Stage("slow", [str(slow)], "not gpu")
    fine, reports = gpu_testing.run(stage, tmp_path, 1, 20.0)
    assert not fine
    counts = gpu_testing.merge(reports, tmp_path / "junit.xml")
    assert counts["tests"] >= 1 <= counts["passed"]


def test_sources_have_a_digest_of_their_own(tmp_path: Path) -> None:
    for name in ("adadiff_kernels", "benchmarks", "csrc", "python/adadiff"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "one.py").write_text(name)
    first = rows.source_digest(tmp_path)
    assert len(first) == 12
    (tmp_path / "python" / "adadiff" / "_C.so").write_text("built")
    (tmp_path / "README.md").write_text("text")
    assert rows.source_digest(tmp_path) == first
    (tmp_path / "csrc" / "one.py").write_text("changed")
    changed = rows.source_digest(tmp_path)
    assert changed != first
    (tmp_path / "csrc" / "one.py").rename(tmp_path / "csrc" / "two.py")
    assert rows.source_digest(tmp_path) not in (first, changed)
