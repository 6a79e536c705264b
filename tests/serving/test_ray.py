"""Ray on a cluster of this machine: workers that draw shards and die, and the service behind Ray's proxy."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.data", reason="the extra `ray` is not installed")
pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
import httpx
import ray
from ray import serve

from adadiff.serving.ray import sample
from sampler import shell
from sampler.sharded import assert_equal, times
from sampler.shell import error_line, run
from serving.apps import client_of, draw, events, pixels
from serving.apps import tiny as served_tiny

tiny = shell.tiny
pytestmark = pytest.mark.slow
SECONDS = 300.0  # after which a test gives up
MARK = "ADADIFF_TEST_CLUSTER"
# Six shards of four, the last of two, each long enough to be killed in.
DRAWN = {"steps": 120, "class_labels": [3, 1, 4], "policy": "exit:0.4", "batch": 3, "seed": 5}
LINE = "-n 22 --shard 4 --format npz --steps 120 --class-labels 3,1,4 --policy exit:0.4 --batch 3 --seed 5"


def until(found: Callable[[], Any]) -> Any:
    """What it finds, as soon as it does."""
    end = time.monotonic() + SECONDS
    while not (value := found()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Room for two workers that draw. Its address; this process is connected to it. Its processes bear MARK, so that no
    others are killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, uuid.uuid4().hex)
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # on a busy machine workers would hardly run
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=150 * 2**20)
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()


def processes(title: str) -> list[int]:
    """Of the cluster, by the titles that Ray gives them."""
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if title in (folder / "cmdline").read_text() and mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it has ended
                continue
    return sorted(found)


@pytest.fixture(scope="module")
def whole(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is drawn without Ray."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(f"sample {tiny} {LINE} --out {folder}") == 0
    return folder


def test_a_killed_worker_costs_nothing(cluster: str, tiny: str, whole: Path, tmp_path: Path) -> None:
    """Two workers, one of them killed while it draws. Bits are those of a run without Ray, batch-invariant or not."""
    killed: list[int] = []

    def kill() -> None:
        until(lambda: times(tmp_path))
        killed.append(until(lambda: processes("MapBatches(Drawer)"))[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    totals = sample(tiny, 22, tmp_path, shard=4, actors=2, progress=False, device="cpu", **DRAWN)
    killer.join(SECONDS)
    assert killed
    assert totals["samples"] == 22
    assert_equal(tmp_path, whole)


def test_a_run_that_waits_says_so(cluster: str, tiny: str, tmp_path: Path, caplog: Any) -> None:
    """Another program holds all CPUs, and gives them back once it has been told."""

    @ray.remote(num_cpus=2)
    class Holder:
        def here(self) -> bool:
            return True

    holder = Holder.remote()
    assert ray.get(holder.here.remote(), timeout=SECONDS)
    until(lambda: not ray.available_resources().get("CPU"))

    def leave() -> None:
        until(lambda: "waiting for 1 CPU: 0 CPUs" in caplog.text)
        ray.kill(holder)

    leaver = threading.Thread(target=leave)
    leaver.start()
    totals = sample(tiny, 2, tmp_path, actors=1, progress=False, device="cpu", steps=2)
    leaver.join(SECONDS)
    assert totals["samples"] == 2


def shards_in(folder: Path) -> int:
    return sum(name.endswith(".npz") for name in times(folder)) if folder.exists() else 0


def test_a_killed_run_goes_on(cluster: str, tiny: str, tmp_path: Path, capsys: Any) -> None:
    """The command, killed; what it drew is kept. In batch-invariant mode, so with another number of workers."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    line = f"sample {tiny} {LINE} --batch-invariant"
    assert run(f"{line} --out {plain}") == 0
    command = [sys.executable, "-m", "adadiff", *f"{line} --out {out} --ray".split()]
    with subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": cluster}) as process:
        try:
            until(lambda: shards_in(out) >= 2 or process.poll() is not None)
        finally:
            process.kill()
    there = {name: time for name, time in times(out).items() if name.endswith(".npz")}
    assert 2 <= len(there) < 6
    capsys.readouterr()
    assert run(f"{line} --out {out} --ray --actors 1") == 0
    assert "samples are in" in capsys.readouterr().out
    assert there.items() <= times(out).items()
    assert_equal(out, plain)


def test_too_many_workers_and_files_that_workers_lack_are_refused(
    cluster: str, tiny: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is removed, with --force, too. Workers do not live in this folder."""
    own = f"--ray -n 3 --steps 2 --out {tmp_path}/out"
    assert run(f"sample {tiny} {own} --actors 3") == 2
    assert "3 actors of 1 CPU each do not fit in this cluster, where 2 do" in error_line(capsys.readouterr().err)
    assert run(f"sample {tiny} {own} --actor-cpus 3") == 2
    assert "an actor takes 3 CPUs, but the cluster's machines have 2 CPUs" in error_line(capsys.readouterr().err)
    assert run(f"sample {tiny} {own} --device cuda") == 2
    assert "an actor takes 1 CPU and 1 GPU" in error_line(capsys.readouterr().err)
    Path(tmp_path, "own.safetensors").write_bytes(Path(tiny).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert run(f"sample own.safetensors {own}") == 2
    said = error_line(capsys.readouterr().err)
    assert "cannot draw: no model 'own.safetensors'" in said
    assert "an absolute path helps" in said
    assert run(f"sample {tiny} -n 3 --steps 2 --seed 1 --format npz --out {tmp_path}/out --force") == 0
    before = times(tmp_path / "out")
    assert before
    assert run(f"sample {tiny} {own} --actors 3 --force") == 2
    assert times(tmp_path / "out") == before


def test_a_sample_that_is_not_finite_ends_the_run(cluster: str, tiny: str, tmp_path: Path, capsys: Any) -> None:
    line = f"sample {tiny} -n 3 --steps 3 --class-labels 1 --guidance-scale 1e38 --out {tmp_path} --ray"
    assert run(line) == 2
    assert "holds NaN or infinity" in error_line(capsys.readouterr().err)
    assert times(tmp_path) == {}


def test_a_shard_that_kills_its_workers_ends_the_run(cluster: str, tiny: str, tmp_path: Path, capsys: Any) -> None:
    """And is not tried for ever. What other shards there are stays."""
    assert run(f"sample {tiny} -n 3 --steps 3 --policy serving.killing:Deadly --out {tmp_path} --ray") == 2
    said = error_line(capsys.readouterr().err)
    assert "workers died over a shard again and again" in said
    assert said.endswith(f"0 of 3 samples are in {tmp_path}; the same command goes on")


@pytest.fixture(scope="module")
def service(cluster: str, tiny: str) -> Iterator[httpx.Client]:
    """`serve run` as people type it; its HTTP proxy listens on a free port."""
    serve.start(http_options={"host": "127.0.0.1", "port": (port := free_port())})
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "adadiff.serving.ray:app", f"models=tiny={tiny}"]
    options = {
        "capacity": 4,
        "steps": 3,
        "max_steps": 1000,
        "policies": "broken=serving.killing:Killing",
        "batch_invariant": True,
        "num_cpus": 0.5,
        "health_check_period": 0.5,
    }
    command += [f"{name}={value}" for name, value in options.items()]
    with subprocess.Popen([*command, f"--address={cluster}"]) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
                until(lambda: process.poll() is not None or answers(client))
                assert process.poll() is None
                yield client
        finally:
            process.kill()  # a background job's children are deaf to Ctrl-C, and the service is gone already
            serve.shutdown()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def running(client: httpx.Client) -> int:
    page = client.get("/metrics").text
    (value,) = (line.split()[-1] for line in page.splitlines() if line.startswith("adadiff_num_requests_running"))
    return int(float(value))


def test_images_are_those_of_the_application_alone(service: httpx.Client, tiny: str) -> None:
    """The same bytes, whole and as a stream with its previews."""
    import adadiff

    body = {"class_label": 2, "seed": 4, "n": 2, "policy": "exit:0.4"}
    streamed = {"class_label": 2, "seed": 9, "stream": True, "partial_images": 2, "num_inference_steps": 200}

    async def alone() -> tuple[Any, Any]:
        async with client_of(served_tiny(model=adadiff.load(tiny)), steps=3) as client:
            return await draw(client, **body), await draw(client, **streamed)

    whole, stream = asyncio.run(alone())
    reply = service.post("/v1/images/generations", json=body)
    assert reply.status_code == 200
    for ours, theirs in zip(reply.json()["data"], whole.json()["data"], strict=True):
        assert np.array_equal(pixels(ours["b64_json"]), pixels(theirs["b64_json"]))
        assert ours["adadiff"]["exit_layers"] == theirs["adadiff"]["exit_layers"]
    found = events(service.post("/v1/images/generations", json=streamed).text)
    expected = events(stream.text)
    assert {name for name, _ in found[:-1]} == {"image_generation.partial_image"}
    assert found[-1][0] == "image_generation.completed"
    assert found[-1][1]["b64_json"] == expected[-1][1]["b64_json"]
    previews = [{data["adadiff"]["step"]: data["b64_json"] for _, data in own[:-1]} for own in (found, expected)]
    assert all(previews[1].get(step, picture) == picture for step, picture in previews[0].items())
    refused = service.post("/v1/images/generations", json={"n": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


def test_a_client_that_goes_away_frees_its_lanes(service: httpx.Client) -> None:
    long = {"num_inference_steps": 1000, "n": 3}
    with service.stream(
        "POST", "/v1/images/generations", json={**long, "stream": True, "partial_images": 60}
    ) as stream:
        lines = stream.iter_lines()  # which closes the connection when it is dropped
        assert next(lines) == "event: image_generation.partial_image"
        assert running(service) == 3
    until(lambda: running(service) == 0)
    with pytest.raises(httpx.ReadTimeout):
        service.post("/v1/images/generations", json=long, timeout=0.5)
    until(lambda: running(service) == 0)


@pytest.mark.parametrize("way", ["the process", "the engine"])
def test_a_dead_replica_is_replaced(way: str, service: httpx.Client) -> None:
    (before,) = processes("ServeReplica:")
    if way == "the process":
        os.kill(before, signal.SIGKILL)
    else:
        reply = service.post("/v1/images/generations", json={"policy": "broken"})
        assert reply.status_code == 500
    until(lambda: [pid for pid in processes("ServeReplica:") if pid != before])
    until(lambda: before not in processes("ServeReplica:"))
    until(lambda: answers(service))
    assert service.post("/v1/images/generations", json={"seed": 1}).status_code == 200


def test_what_is_in_flight_is_finished_when_the_service_ends(service: httpx.Client) -> None:
    """The last of these tests: afterwards there is no service."""
    body = {"num_inference_steps": 400, "stream": True, "partial_images": 60}
    with service.stream("POST", "/v1/images/generations", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        ending = threading.Thread(target=serve.delete, args=("default",))
        ending.start()
        names = [line for line in lines if line.startswith("event:")]
        ending.join(SECONDS)
    assert names[-1] == "event: image_generation.completed"
    assert serve.status().applications == {}
