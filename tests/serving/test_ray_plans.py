"""What can be said of Ray's workers and of the service's arguments without starting Ray."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adadiff.output.asked import Asked, digest
from adadiff.output.shards import Manifest
from adadiff.serving.ray.planning import MOST_PAYLOAD, Node, Workers, check_launch, check_payload, fault_of_files
from adadiff.serving.ray.workers import Drawer, fault, packed, unpacked, versions
from sampler import shell
from sampler.shell import error_line, run

tiny = shell.tiny
ON_CPU = Asked(model="digits", n=1, device="cpu")
ON_GPU = dataclasses.replace(ON_CPU, device="cuda")


def nodes(*resources: tuple[float, float]) -> list[Node]:
    return [Node(str(i), f"10.0.0.{i}", *own) for i, own in enumerate(resources)]


@pytest.mark.parametrize(
    ("workers", "machines", "missing", "count"),
    [
        (Workers.of(ON_CPU), [(3, 0), (2.5, 0)], 9, 5),  # half a CPU is of no use
        (Workers.of(ON_CPU), [(3, 0), (2.5, 0)], 2, 2),  # no worker without a shard
        (Workers.of(ON_CPU, cpus=2), [(3, 0), (1, 0), (4, 0)], 9, 3),  # an actor lies on one machine
        (Workers.of(ON_CPU, actors=4), [(3, 0), (2, 0)], 9, 4),
        (Workers.of(ON_GPU), [(64, 0), (64, 2), (3, 8)], 99, 5),
        (Workers.of(ON_GPU, cpus=2), [(3, 8)], 99, 1),
    ],
)
def test_as_many_workers_as_fit_and_have_work(
    workers: Workers, machines: list[tuple[float, float]], missing: int, count: int
) -> None:
    assert workers.count(nodes(*machines), missing) == count


@pytest.mark.parametrize(
    ("workers", "free", "words"),
    [
        (Workers.of(ON_CPU), {"CPU": 1.0}, None),
        (Workers.of(ON_CPU, cpus=2), {"CPU": 1.0}, "waiting for 2 CPUs: 1 CPUs and 0 GPUs of the cluster are free"),
        (Workers.of(ON_GPU), {"CPU": 8.0}, "waiting for 1 CPU and 1 GPU: 8 CPUs and 0 GPUs of the cluster are free"),
        (Workers.of(ON_CPU), {}, "waiting for 1 CPU: 0 CPUs and 0 GPUs of the cluster are free"),
    ],
)
def test_a_busy_cluster_is_told(workers: Workers, free: dict[str, float], words: str | None) -> None:
    assert workers.waits_for(free) == words


def test_only_machines_with_room_are_asked() -> None:
    """Such as a head that takes no work."""
    found = Workers.of(ON_GPU, cpus=2).usable(nodes((0, 0), (8, 0), (1, 1), (2, 1)))
    assert [node.id for node in found] == ["3"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Workers.of(ON_CPU, actors=0), "actors must be"),
        (lambda: Workers.of(ON_CPU, actors=2.0), "actors must be"),
        (lambda: Workers.of(ON_CPU, actors=10**6), "actors must be"),
        (lambda: Workers.of(ON_CPU, cpus=0), "cpus of an actor must be"),
        (lambda: Workers.of(ON_CPU, actors=6).count(nodes((3, 0), (2, 0)), 9), "6 actors of 1 CPU each do not fit"),
        (
            lambda: Workers.of(ON_GPU).usable(nodes((8, 0))),
            "an actor takes 1 CPU and 1 GPU, but the cluster's machines",
        ),
        (lambda: Workers.of(dataclasses.replace(ON_CPU, device="cuda:1")), "give device 'cuda' instead of 'cuda:1'"),
        (
            lambda: Workers.of(dataclasses.replace(ON_CPU, device="nowhere")),
            "draw on cpu or cuda, got device 'nowhere'",
        ),
        (lambda: check_launch({"RANK": "1", "WORLD_SIZE": "2"}), "start this without torchrun"),
        (lambda: check_launch({"PMI_RANK": "0", "PMI_SIZE": "2"}), "start this without torchrun"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()
    check_launch({"RANK": "0", "WORLD_SIZE": "1"})


@pytest.mark.parametrize(("array", "size"), [("images", 1), ("latents", 4)])
def test_shards_that_are_too_big_to_be_sent_are_refused(array: str, size: int) -> None:
    most = MOST_PAYLOAD // (size * 3 * 100 * 70)

    def manifest(n: int, shard: int) -> Manifest:
        return Manifest({"n": n, "shard": shard}, array, [100, 70, 3], 5)

    check_payload(manifest(10**6, most))
    check_payload(manifest(most, 10**6))  # nor is there more in it
    with pytest.raises(ValueError, match=f"give at most {most} samples a shard"):
        check_payload(manifest(10**6, most + 1))


def test_a_machine_says_what_it_lacks(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"digits": digest("digits"), tiny: digest(tiny)}
    assert fault_of_files(files) is None
    assert fault(files, versions()) is None
    assert fault_of_files({"digits": digest(tiny)}).startswith("digits differs from the file of that name here (")
    monkeypatch.chdir(tmp_path)
    assert f"(looked for in {tmp_path}; an absolute path helps)" in fault_of_files({"none.safetensors": "0"})
    assert "it has torch" in fault(files, {**versions(), "torch": "1.0"})


def test_a_drawer_checks_its_files_and_draws_what_a_run_would(tiny: str) -> None:
    """Two shards of five samples, the second of two."""
    asked = Asked(model=tiny, n=5, steps=3, class_labels=[3, 1], policy="exit:0.4", device="cpu")
    networks = asked.load()
    manifest = Manifest.of(networks.model, {**asked.configuration(networks.model), "shard": 3})
    drawer = Drawer(asked, manifest, None, asked.files(networks.model))
    row = {name: values[0] for name, values in drawer({"shard": np.array([1])}).items()}
    assert (row["shard"], row["error"]) == (1, "")
    arrays = unpacked(row["npz"])
    assert arrays["seeds"].tolist() == [3, 4]
    assert arrays["labels"].tolist() == [1, 3]
    assert row["blocks"] == arrays["exit_layer"].sum()
    np.testing.assert_equal(unpacked(packed(arrays)), arrays)
    with pytest.raises(ValueError, match="differs from the file of that name here"):
        Drawer(asked, manifest, None, {tiny: "0"})


def test_a_sample_that_is_not_finite_comes_back_as_words(tiny: str) -> None:
    """Raised, Ray would take it for a fault of the machine and draw it again."""
    asked = Asked(model=tiny, n=3, steps=3, class_labels=1, guidance_scale=1e38, device="cpu")
    networks = asked.load()
    manifest = Manifest.of(networks.model, {**asked.configuration(networks.model), "shard": 3})
    row = Drawer(asked, manifest, None, {})({"shard": np.array([0])})
    assert row["kind"] == ["FloatingPointError"]
    assert "holds NaN or infinity" in row["error"][0]
    assert row["npz"] == [b""]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ray --format png", "--ray writes arrays of many samples; leave --format png out"),
        ("--ray --decoder vae", "leave --decoder out"),
        ("--actors 2", "--actors is for --ray"),
        ("--actor-cpus 2", "--actor-cpus is for --ray"),
        ("--ray --actors 0", "actors must be"),
        ("--ray --device cuda:0", "Ray gives each actor a GPU of its own"),
        ("--ray --steps 0", "steps must be"),
        ("--ray --policy exit:depth=9", "this network has 3 blocks"),
        ("--parquet x", "--parquet is for --format npz"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: str, words: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if "--ray" in options:
        pytest.importorskip("ray.data")
    assert run(f"sample {tiny} --out {tmp_path}/out {options}") == 2
    assert words in error_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_refused_before_ray_is_started(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = pytest.importorskip("adadiff.serving.ray.offline", exc_type=ImportError)
    monkeypatch.setattr(offline.ray, "init", lambda **_: pytest.fail("it starts Ray"))
    line = f"sample {tiny} -n 3 --steps 2 --format npz --out {tmp_path}"
    assert run(line) == 0
    assert run(f"{line} --seed 1 --ray") == 2
    assert "holds samples drawn with another seed" in error_line(capsys.readouterr().err)
    with pytest.raises(ValueError, match="holds samples drawn with another seed"):
        offline.sample(tiny, 3, tmp_path, steps=2, seed=1)
    assert run(f"{line} --ray") == 0  # it is complete
    assert offline.sample(tiny, 3, tmp_path, steps=2)["samples"] == 3


def test_nothing_of_ray_is_imported_unasked() -> None:
    code = (
        "import sys, adadiff, adadiff.cli, adadiff.serving.ray\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('ray', 'pyarrow')]\n"
        "sys.modules['ray'] = None\n"
        "for name in ('sample', 'app'):\n"
        "    try:\n"
        "        getattr(adadiff.serving.ray, name)\n"
        "    except ImportError as error:\n"
        "        assert str(error).endswith(\"pip install 'adadiff_kernels[ray]'\"), error\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
        "sys.exit(adadiff.cli.main(['sample', 'digits', '-n', '2', '--ray', '--out', 'nowhere']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr
    assert error_line(ended.stderr).endswith("this needs ray.data: pip install 'adadiff_kernels[ray]'")


def arguments(**given: Any) -> Any:
    pytest.importorskip("pydantic")
    from adadiff.serving.ray.arguments import Arguments

    return Arguments.model_validate(given)


def test_arguments_are_texts_or_values() -> None:
    """Texts as `serve run` gives them, values as a config file does."""
    texts = arguments(models="digits,b=x.safetensors", policies="a=exit:0.1,min_layer=3;b=full", capacity="6")
    values = arguments(
        models=["digits", "b=x.safetensors"], policies={"a": "exit:0.1,min_layer=3", "b": "full"}, capacity=6
    )
    assert texts == values
    assert arguments().models == ["digits"]
    assert (arguments().settings().steps, arguments(max_steps=20).settings().steps) == (50, 20)
    fixed, varying = texts.deployment(), arguments(max_replicas="3", num_gpus="0.5").deployment()
    assert (fixed["num_replicas"], fixed["max_ongoing_requests"]) == (1, 12)
    assert "autoscaling_config" not in fixed
    assert "num_replicas" not in varying
    own = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 64.0}
    assert varying["autoscaling_config"] == own
    assert varying["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0.5}
    assert (texts.device, arguments(num_gpus=1).device) == ("cpu", "cuda")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"capacity": 8, "max_ongoing_requests": 7}, "max_ongoing_requests must be at least the capacity, 8"),
        ({"model": "digits"}, "model"),
        ({"models": []}, "models"),
        ({"models": "digits,digits"}, "two models are called 'digits'"),
        ({"capacity": "2GiB"}, "capacity"),
        ({"policies": "exit:0.1"}, "policies takes NAME=SPELLING"),
        ({"policies": {"a": "cascad:x"}}, "policy a=cascad:x"),
        ({"steps": 300}, "steps must be at most max_steps"),
        ({"admission": "size"}, "admission"),
        ({"shallow_model": "other=x"}, "--shallow-model takes NAME=FILE"),
        ({"t_switch": 600}, "--t-switch is where a shallow model hands over"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"runner": "compiled", "batch_invariant": True}, "leave one of the two out"),
        ({"num_replicas": 2, "max_replicas": 3}, "give either num_replicas or max_replicas"),
        ({"min_replicas": 2}, "min_replicas is for a varying number of replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas must be at most max_replicas, 2, got 3"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"drain_timeout": float("nan")}, "drain_timeout"),
    ],
)
def test_arguments_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        arguments(**given)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_replica_tells_ray_when_its_engine_has_died(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class as it is without Ray around it. It is the whole application, keys included."""
    online = pytest.importorskip("adadiff.serving.ray.online", exc_type=ImportError)
    from serving.apps import draw, httpx
    from serving.apps import run as run_async

    monkeypatch.setattr("adadiff.serving.logs.configure", lambda *_: None)
    plain = online.Replica.__mro__[1]
    key = "a-key-of-tests"

    async def work() -> None:
        replica = plain(arguments(models=f"tiny={tiny}", capacity=2, steps=2), (key,))
        replica.check_health()  # it is being made
        app = await replica.__serve_build_asgi_app__()
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                assert (await client.get("/ready")).status_code == 200
                assert (await draw(client)).status_code == 401
                client.headers["Authorization"] = f"Bearer {key}"
                assert (await draw(client)).status_code == 200
                replica.check_health()
                engine = app.state.service.models["tiny"].engine
                monkeypatch.setattr(engine, "_admit", lambda: 1 / 0)
                assert (await draw(client)).status_code in (500, 503)  # 503 where the engine was dead before it came
                engine._thread.join(60)
                with pytest.raises(RuntimeError, match="the engine of tiny is dead"):
                    replica.check_health()
        replica.check_health()  # it is ending

    run_async(work())


def test_a_replica_without_its_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    online = pytest.importorskip("adadiff.serving.ray.online", exc_type=ImportError)
    from serving.apps import run as run_async

    monkeypatch.setattr("adadiff.serving.logs.configure", lambda *_: None)
    replica = online.Replica.__mro__[1](arguments(models="/models/none.safetensors"), ())
    with pytest.raises(ValueError, match=r"no model '/models/none\.safetensors'"):
        run_async(replica.__serve_build_asgi_app__())
