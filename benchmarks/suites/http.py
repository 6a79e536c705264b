"""The HTTP service on the loopback interface, with clients in a separate process, compared with the engine alone.

Throughput: bursts, engine and service in turns, for U-ViT-S/2 at its CIFAR-10 shape (for seconds) and the digits (for
CPU time of a request). Latency: a burst, and Poisson arrivals at shares of the engine's burst throughput. Behaviour:
the same requests at the same times, once from well-behaved clients only, once with some that disconnect, send invalid
bodies or do not read. Memory: of the service's process over thousands of requests.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import adadiff
from adadiff import Engine, Model
from adadiff.uem import PAPER
from benchmarks.baselines.http_client import GOOD, LEAVES, MALFORMED, SLOW, Answer, Ask, Run
from benchmarks.baselines.service import ServiceProcess, service
from benchmarks.baselines.simulation import RealClock, Request, serve, workload
from benchmarks.harness import AA_TOLERANCE, Comparison, Times, interleave, threads
from benchmarks.rows import Rows, say
from benchmarks.suites import drawing
from benchmarks.suites.latency import BURST, DIGITS
from benchmarks.suites.network import PRESET

SUITE = "http"
ENGINE, SERVICE = "engine", "service"
CALM, MIXED = "all behave", "some do not"
POLICY = "exit:0.135,min_layer=3"  # of the digits
NETWORK_POLICY = "exit:depth=7.5"  # the mean depth of the suite serving
SLOS = (5, 10, 20)  # multiples of the latency of the request alone
LEAVING, NONSENSE, RELUCTANT = 0.3, 0.05, 0.05  # shares of clients that disconnect, send invalid bodies, do not read
BEHAVIOUR_LOAD = 0.5
SLOW_IMAGES = 4  # images of a client that does not read, with a preview of each step
BODIES = (  # invalid bodies, refused for different reasons
    *("{", "[]", '{"n": NaN}', '{"seed": 1e999}', '{"unknown": 1}', '{"class_label": 99}', '{"model": "none"}'),
    *('{"size": "9x9"}', '{"policy": "os:system"}', '{"n": ' + "[" * 99 + "]" * 99 + "}"),
)


@dataclass(frozen=True)
class Sizes:
    """network: requests of a burst, steps, capacity and rounds for U-ViT-S/2; digits: the same for the digits."""

    network: tuple[int, int, int, int] = (32, 10, 16, 3)
    digits: tuple[int, int, int, int] = (512, 20, 64, 5)
    requests: int = 512  # of a run of latencies
    loads: tuple[float, ...] = (0.5, 0.8, 0.95)
    alone: int = 20  # requests one after the other
    memory: tuple[int, int] = (500, 21)  # requests of a burst, of 2 steps; number of bursts, the first not counted


FULL = Sizes()
QUICK = Sizes((4, 2, 2, 1), (32, 5, 16, 1), 32, (0.8,), 4, (50, 4))


def run(rows: Rows, sizes: Sizes) -> None:
    network(rows, sizes)
    with threads(1):  # a second thread would spend most of its CPU time waiting
        digits(rows, sizes)


def network(rows: Rows, sizes: Sizes) -> None:
    n, steps, capacity, rounds = sizes.network
    say(f"http: throughput of {PRESET}, capacity {capacity}, bursts of {n} requests of {steps} steps")
    torch.manual_seed(0)
    model = adadiff.build(PRESET, exits=PAPER)
    with _served(model, PRESET, capacity, n) as process:
        settings = {"steps": steps, "policy": NETWORK_POLICY}
        throughput(rows, PRESET, model, process, [{"seed": i, **settings} for i in range(n)], capacity, rounds)


def digits(rows: Rows, sizes: Sizes) -> None:
    n, steps, capacity, rounds = sizes.digits
    model = drawing.load(DIGITS)
    say(f"http: throughput of the digits, capacity {capacity}, bursts of {n} requests of {steps} steps")
    with _served(model, DIGITS, capacity, SLOW_IMAGES * max(n, sizes.requests)) as process:
        asked = [{"seed": i, "class_labels": i % 10, "steps": steps, "policy": POLICY} for i in range(n)]
        measured = throughput(rows, DIGITS, model, process, asked, capacity, rounds)
        rate = n / measured.median(ENGINE)
        say(f"http: latency of the digits, {sizes.requests} requests a run")
        latency(rows, model, process, sizes, capacity, rate)
        say(f"http: {LEAVING:.0%} of the clients leave, others send nonsense or do not read")
        behaviour(rows, process, sizes, capacity, rate)
    with service(DIGITS, "--capacity", str(capacity), "--queue", str(sizes.memory[0])) as process:
        say(f"http: memory over {sizes.memory[0] * (sizes.memory[1] - 1):,} requests")
        memory(rows, process, sizes, capacity)


@contextmanager
def _served(model: Model, name: str, capacity: int, queue: int) -> Iterator[ServiceProcess]:
    """The service with this model."""
    limits = ("--capacity", str(capacity), "--queue", str(queue))
    if name == DIGITS:
        with service(name, *limits) as process:
            yield process
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        adadiff.save(model, path, {})
        with service(f"{name}={path}", *limits) as process:
            yield process


def body(settings: Mapping[str, object], **more: object) -> str:
    """Body of the HTTP request for the same sample that the engine draws with `settings`."""
    names = {"class_labels": "class_label", "steps": "num_inference_steps"}
    return json.dumps({**{names.get(name, name): value for name, value in settings.items()}, **more})


@dataclass
class Burst:
    """A call submits all requests at once, waits for them, and returns the seconds. busy: CPU seconds of the drawing
    process for each request, by call."""

    draw: Callable[[], tuple[float, float]]
    n: int

    def __post_init__(self) -> None:
        self.busy: list[float] = []

    def __call__(self) -> float:
        seconds, busy = self.draw()
        self.busy.append(busy / self.n)
        return seconds

    @staticmethod
    def of_engine(engine: Engine, asked: Sequence[Mapping[str, object]]) -> "Burst":
        def draw() -> tuple[float, float]:
            busy, began = time.process_time(), time.perf_counter()
            for handle in [engine.submit(**settings) for settings in asked]:
                handle.result()
            return time.perf_counter() - began, time.process_time() - busy

        return Burst(draw, len(asked))

    @staticmethod
    def of_service(process: ServiceProcess, asked: Sequence[Mapping[str, object]]) -> "Burst":
        asks = [Ask(0.0, body(settings)) for settings in asked]

        def draw() -> tuple[float, float]:
            busy = process.facts.cpu
            run = answered(process.ask(asks))
            return run.seconds, process.facts.cpu - busy

        return Burst(draw, len(asked))


def answered(run: Run) -> Run:
    """RuntimeError unless every well-behaved client got its answer."""
    if lost := [answer for answer in run.answers if answer.kind == GOOD and not is_whole(answer)]:
        raise RuntimeError(
            f"{len(lost)} of {len(run.answers)} requests got no image, the first status {lost[0].status}"
        )
    return run


def is_whole(answer: Answer) -> bool:
    """Whether the client got what it waited for: images, or the error for an invalid body."""
    return answer.whole and (400 <= answer.status < 500 if answer.kind == MALFORMED else answer.status == 200)


def throughput(
    rows: Rows,
    name: str,
    model: Model,
    process: ServiceProcess,
    asked: Sequence[Mapping[str, object]],
    capacity: int,
    rounds: int,
) -> Comparison:
    with Engine(model, capacity, queue=len(asked)) as engine:
        every = {ENGINE: Burst.of_engine(engine, asked), SERVICE: Burst.of_service(process, asked)}
        measured = interleave(every, rounds, pairs={SERVICE: ENGINE}, label=f"http, {name}", timer=lambda call: call())
    busy = {variant: Times(tuple(burst.busy[-rounds:])).median for variant, burst in every.items()}
    parameters = {"model": name, "capacity": capacity, "requests": len(asked), "steps": asked[0]["steps"]}
    for variant in every:
        rows.write(
            SUITE,
            "throughput",
            variant,
            parameters,
            dtype="float32",
            **measured.row(variant),
            images_per_second=len(asked) / measured.median(variant),
            throughput_over_engine=measured.ratio(ENGINE, variant).median,
            busy_per_request=busy[variant],
            busy_added=busy[variant] - busy[ENGINE],
        )
    return measured


def alone(process: ServiceProcess, n: int) -> float:
    """Median seconds for each step of a request that is alone in the service."""
    asked = [{"seed": i, "class_labels": i % 10, "steps": 20, "policy": POLICY} for i in range(n)]
    answers = [answered(process.ask([Ask(0.0, body(settings))])).answers[0] for settings in asked[:2]]
    apart = 3 * max(answer.seconds for answer in answers)
    run = answered(process.ask([Ask(i * apart, body(settings)) for i, settings in enumerate(asked)]))
    return Times(tuple(answer.seconds for answer in run.answers)).median / 20


def settings_of(request: Request) -> dict[str, object]:
    return {"seed": request.seed, "class_labels": request.label, "steps": request.steps, "policy": POLICY}


@dataclass(frozen=True)
class Latencies:
    """seconds: float [n], latency of each request; steps: int [n]; busy: CPU seconds of the drawing process."""

    seconds: np.ndarray
    steps: np.ndarray
    busy: float

    def row(self, step: float) -> dict[str, object]:
        """step: seconds for each step of a request alone. attained: multiple of a request's latency alone -> share of
        requests within it."""
        times = Times(tuple(self.seconds.tolist()))
        attained = {str(slo): float((self.seconds <= slo * step * self.steps).mean()) for slo in SLOS}
        return {
            "seconds": times.row(),
            "p95": times.quantile(0.95),
            "p99": times.quantile(0.99),
            "attained": attained,
            "seconds_alone_per_step": step,
            "busy_per_request": self.busy / len(self.seconds),
        }


def latency(rows: Rows, model: Model, process: ServiceProcess, sizes: Sizes, capacity: int, rate: float) -> None:
    """rate: the engine's throughput in requests a second for a burst of 20 steps, the mean of the requests here."""
    step = alone(process, sizes.alone)
    for load in (BURST, *sizes.loads):
        requests = workload(sizes.requests, None if load == BURST else load * rate)
        of = {ENGINE: partial(engine_latencies, model, capacity), SERVICE: partial(service_latencies, process)}
        runs = {name: of[name.removesuffix(" again")](requests) for name in (ENGINE, SERVICE, f"{ENGINE} again")}
        aa_ratio = runs[f"{ENGINE} again"].busy / runs[ENGINE].busy
        parameters = {"model": DIGITS, "capacity": capacity, "requests": sizes.requests, "load": load}
        for name in of:
            usable = abs(aa_ratio - 1) <= AA_TOLERANCE
            found = {**runs[name].row(step), "aa_ratio": aa_ratio, "usable": usable}
            rows.write(SUITE, "latency", name, parameters, dtype="float32", **found)


def engine_latencies(model: Model, capacity: int, requests: Sequence[Request]) -> Latencies:
    clock, busy = RealClock(), time.process_time()
    engine = Engine(model, capacity, queue=len(requests), threaded=False, clock=clock)
    served = serve(engine, requests, clock, settings_of)
    return Latencies(np.array(served.latencies), _steps(requests), time.process_time() - busy)


def service_latencies(process: ServiceProcess, requests: Sequence[Request]) -> Latencies:
    busy = process.facts.cpu
    run = answered(process.ask([Ask(request.arrival, body(settings_of(request))) for request in requests]))
    seconds = np.array([answer.seconds for answer in run.answers])
    return Latencies(seconds, _steps(requests), process.facts.cpu - busy)


def _steps(requests: Sequence[Request]) -> np.ndarray:
    return np.array([request.steps for request in requests])


def misbehaving(requests: Sequence[Request], step: float) -> tuple[list[Ask], list[Ask]]:
    """The same requests from well-behaved clients only, and with some misbehaving ones. step: seconds for each step of
    a request alone. Clients that disconnect do so before their image can be finished; clients that do not read start
    reading after all requests have arrived."""
    random, last = np.random.default_rng(0), max(request.arrival for request in requests)
    ends = np.cumsum([LEAVING, NONSENSE, RELUCTANT])
    calm, mixed = [], []
    for request, place, share in zip(requests, random.random(len(requests)), random.random(len(requests)), strict=True):
        good = Ask(request.arrival, body(settings_of(request)))
        other = good
        if place < ends[0]:
            other = replace(good, kind=LEAVES, after=float(0.05 + 0.6 * share) * step * request.steps)
        elif place < ends[1]:
            other = replace(good, kind=MALFORMED, body=BODIES[len(mixed) % len(BODIES)])
        elif place < ends[2]:
            good = replace(good, body=body(settings_of(request), n=SLOW_IMAGES))
            stream = {"n": SLOW_IMAGES, "stream": True, "partial_images": request.steps - 1}
            text = body(settings_of(request), **stream)
            other = Ask(request.arrival, text, SLOW, after=last - request.arrival + 1.0)
        calm.append(good)
        mixed.append(other)
    return calm, mixed


def counts(asks: Sequence[Ask], run: Run) -> dict[str, dict[str, int]]:
    """By kind of client: their number, and how many got a complete reply."""
    kinds = (GOOD, MALFORMED, SLOW, LEAVES)
    asked = {kind: sum(ask.kind == kind for ask in asks) for kind in kinds}
    return {"asked": asked, "whole": {kind: sum(is_whole(a) for a in run.answers if a.kind == kind) for kind in kinds}}


def behaviour(rows: Rows, process: ServiceProcess, sizes: Sizes, capacity: int, rate: float) -> None:
    step = alone(process, sizes.alone)
    requests = workload(sizes.requests, BEHAVIOUR_LOAD * rate)
    calm, mixed = misbehaving(requests, step)
    same = np.array([ask.kind == GOOD for ask in mixed])  # requests that are the same in both plans
    plans = {CALM: calm, MIXED: mixed, f"{CALM} again": calm}
    found: dict[str, dict[str, object]] = {}
    busy: dict[str, float] = {}
    for name, asks in plans.items():
        before = process.facts
        run = process.ask(asks)
        after = process.settled()
        busy[name] = after.cpu - before.cpu
        seconds = np.array([answer.seconds for answer in run.answers])[same]
        row = Latencies(seconds, _steps(requests)[same], busy[name]).row(step)
        row["longest"] = float(seconds.max())
        left = {"running": after.running, "waiting": after.waiting, "files": after.files - before.files}
        found[name] = {**row, **counts(asks, run), "left_behind": left, "images": after.images - before.images}
    aa_ratio = busy[f"{CALM} again"] / busy[CALM]
    parameters = {"model": DIGITS, "capacity": capacity, "requests": sizes.requests, "load": BEHAVIOUR_LOAD}
    for name in (CALM, MIXED):
        usable = abs(aa_ratio - 1) <= AA_TOLERANCE
        more = {"aa_ratio": aa_ratio, "usable": usable}
        rows.write(SUITE, "behaviour", name, parameters, dtype="float32", **found[name], **more)


def memory(rows: Rows, process: ServiceProcess, sizes: Sizes, capacity: int) -> None:
    n, bursts = sizes.memory
    points = []
    for i in range(bursts):
        asked = ({"seed": i * n + k, "class_labels": k % 10, "steps": 2, "policy": POLICY} for k in range(n))
        answered(process.ask([Ask(0.0, body(settings)) for settings in asked]))
        points.append(process.settled().memory)
    parameters = {"model": DIGITS, "capacity": capacity, "requests": n * (bursts - 1), "steps": 2}
    rows.write(SUITE, "memory", SERVICE, parameters, dtype="float32", **growth(points[1:], n), points=points)


def growth(points: Sequence[float], n: int) -> dict[str, float]:
    """points: bytes of memory after every n requests. slope: bytes for each request, by least squares."""
    done = n * np.arange(len(points))
    slope = float(np.polyfit(done, points, 1)[0]) if len(points) > 1 else 0.0
    return {"first": points[0], "last": points[-1], "most": max(points), "slope": slope}
