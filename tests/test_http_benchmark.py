"""The suite http: its arithmetic by hand, its clients against a server of a few lines, and all of it on a tiny model.
No second is asserted."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path

import numpy as np
import pytest

import adadiff
from benchmarks import __main__ as run
from benchmarks import rows
from benchmarks.baselines.http_client import GOOD, LEAVES, MALFORMED, SLOW, Answer, Ask, Clients, Run
from benchmarks.baselines.service import Facts
from benchmarks.baselines.simulation import workload
from benchmarks.report import http_section, tables
from benchmarks.suites import http
from sampler import shell

PAGE = """# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
process_cpu_seconds_total 12.5
process_resident_memory_bytes 3.5e+08
process_open_fds 17.0
adadiff_num_requests_running{model="a"} 3.0
adadiff_num_requests_running{model="b"} 4.0
adadiff_num_requests_waiting{model="a"} 0.0
adadiff_image_count_total{model="a"} 64.0
adadiff_image_count_created{model="a"} 1.7e+09
"""


def test_what_a_service_says_of_itself() -> None:
    assert Facts.of(PAGE) == Facts(cpu=12.5, memory=3.5e8, files=17, running=7, waiting=0, images=64)


def test_growth_by_hand() -> None:
    assert http.growth([100.0, 104.0, 102.0, 106.0], 10) == {
        "first": 100.0,
        "last": 106.0,
        "most": 106.0,
        "slope": pytest.approx(0.16),  # least squares: sum (x - 15)(y - 103) = 80, sum (x - 15)^2 = 500
    }
    assert http.growth([5.0], 10)["slope"] == 0.0


def test_latencies_by_hand() -> None:
    found = http.Latencies(np.array([1.0, 2.0, 3.0, 8.0]), np.array([10, 20, 10, 20]), busy=0.4).row(step=0.02)
    # alone 0.2, 0.4, 0.2, 0.4 s: 5, 5, 15 and 20 times as long
    assert found["attained"] == {"5": 0.5, "10": 0.5, "20": 1.0}
    assert (found["seconds"]["median"], found["busy_per_request"]) == (2.5, 0.1)
    assert found["p95"] == pytest.approx(3 + 0.85 * 5)


def answer(kind: str = GOOD, status: int = 200, whole: bool = True) -> Answer:
    return Answer(kind, status, 1.0, whole, 1.0)


def test_who_got_what_it_waited_for() -> None:
    good = [answer(), answer(MALFORMED, 400), answer(SLOW)]
    bad = [answer(status=500), answer(whole=False), answer(status=0), answer(MALFORMED), answer(MALFORMED, 500)]
    assert [http.is_whole(one) for one in good + bad] == [True] * 3 + [False] * 5
    asks = [Ask(0.0, "", kind) for kind in (GOOD, GOOD, MALFORMED, SLOW, LEAVES)]
    found = http.counts(asks, Run([answer(), answer(status=429), *good[1:], answer(LEAVES, 0, False)], 1.0, 1.0))
    assert found["asked"] == {GOOD: 2, MALFORMED: 1, SLOW: 1, LEAVES: 1}
    assert found["whole"] == {GOOD: 1, MALFORMED: 1, SLOW: 1, LEAVES: 0}
    with pytest.raises(RuntimeError, match="1 of 2 requests got no image, the first status 429"):
        http.answered(Run([answer(), answer(status=429)], 1.0, 1.0))
    http.answered(Run([answer(), answer(LEAVES, 0, False)], 1.0, 1.0))


def test_the_same_requests_from_clients_that_do_not_behave() -> None:
    requests = workload(2000, 50.0)
    calm, mixed = http.misbehaving(requests, step=0.01)
    assert [ask.arrival for ask in calm] == [ask.arrival for ask in mixed] == [one.arrival for one in requests]
    assert {ask.kind for ask in calm} == {GOOD}
    assert all(one == other for one, other in zip(calm, mixed, strict=True) if other.kind == GOOD)
    share = {kind: sum(ask.kind == kind for ask in mixed) / 2000 for kind in (LEAVES, MALFORMED, SLOW)}
    assert share == pytest.approx({LEAVES: 0.3, MALFORMED: 0.05, SLOW: 0.05}, abs=0.03)  # 3 standard errors
    for asked, ask in zip(requests, mixed, strict=True):
        if ask.kind == LEAVES:
            assert 0.05 <= ask.after / (0.01 * asked.steps) <= 0.65  # of the time that it takes alone
        elif ask.kind == SLOW:
            assert ask.arrival + ask.after > requests[-1].arrival
            assert json.loads(ask.body)["partial_images"] == asked.steps - 1
    assert {ask.body for ask in mixed if ask.kind == MALFORMED} == set(http.BODIES)


def test_bodies_ask_for_what_the_engine_is_asked_for() -> None:
    (asked,) = workload(1, None)
    assert json.loads(http.body(http.settings_of(asked), n=2)) == {
        "seed": asked.seed,
        "class_label": asked.label,
        "num_inference_steps": asked.steps,
        "policy": http.POLICY,
        "n": 2,
    }


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine]


def talk(handler: Handler, asks: list[Ask]) -> Run:
    async def work() -> Run:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            return await Clients(host, port).run(asks)

    return asyncio.run(asyncio.wait_for(work(), 60))


async def requested(reader: asyncio.StreamReader) -> dict:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    (size,) = (int(line.split(": ")[1]) for line in head.split("\r\n") if line.startswith("Content-Length"))
    return json.loads(await reader.readexactly(size))


def reply(status: int, body: bytes, *more: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *more, "", ""]).encode() + body


ONE = b'{"data": [1]}'


def test_connections_are_kept_and_answers_told_apart() -> None:
    connections = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while not reader.at_eof():
            try:
                asked = await requested(reader)
            except asyncio.IncompleteReadError:
                break
            kind = asked.get("seed")
            if kind == "closes":
                writer.write(reply(200, ONE, "connection: close"))
                break
            if kind == "chunks":
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\n" + ONE[:4] + b"\r\n")
                writer.write(b"9\r\n" + ONE[4:] + b"\r\n0\r\n\r\n")
            elif kind == "cut":
                writer.write(reply(200, ONE)[:-1])
                break
            else:
                writer.write(reply(400, b'{"error": {"message": "no"}}') if kind == "bad" else reply(200, ONE))
        writer.close()

    kinds = ["", "", "chunks", "closes", "", "cut", "bad", ""]
    apart = [
        Ask(0.05 * i, json.dumps({"seed": kind}), MALFORMED if kind == "bad" else GOOD) for i, kind in enumerate(kinds)
    ]
    got = talk(handler, [*apart, Ask(0.5, '{"n": 2}')])
    assert [(one.status, one.whole) for one in got.answers] == [
        *[(200, True)] * 5,
        (0, False),
        (400, True),
        (200, True),
        (200, False),  # one image of two
    ]
    assert len(connections) == 3  # a new one after the close and after the cut


def test_clients_leave_and_slow_readers_block_their_own_connection_alone() -> None:
    left, blocked = [], []
    event = b"event: image_generation.completed\ndata: {}\n\n"

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await requested(reader)
        if "n" not in asked:
            left.append(await reader.read())  # until the client is gone
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            sent = asyncio.create_task(send(writer))
            await asyncio.sleep(0.2)
            blocked.append(not sent.done())
            await sent
        writer.close()

    async def send(writer: asyncio.StreamWriter) -> None:
        for _ in range(64):  # 16 MiB, more than a socket takes
            writer.write(b"40000\r\n" + b":" * (2**18 - 2) + b"\n\n\r\n")
            await writer.drain()
        writer.write(b"%x\r\n" % (2 * len(event)) + 2 * event + b"\r\n0\r\n\r\n")

    got = talk(handler, [Ask(0.0, "{}", LEAVES, after=0.1), Ask(0.0, '{"n": 2}', SLOW, after=0.5)])
    assert [(one.status, one.whole) for one in got.answers] == [(0, False), (200, True)]
    assert (left, blocked) == ([b""], [True])


def test_requests_are_sent_when_they_arrive_and_counted_from_then() -> None:
    order = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        order.append((await requested(reader))["seed"])
        await asyncio.sleep(0.1)
        writer.write(reply(200, ONE, "connection: close"))
        writer.close()

    got = talk(handler, [Ask(0.2, '{"seed": 1}'), Ask(0.0, '{"seed": 0}')])
    assert order == [0, 1]
    assert got.seconds == max(one.end for one in got.answers)
    assert [one.end - one.seconds for one in got.answers] == pytest.approx([0.2, 0.0])


class Pretended:
    """In place of a service's process: processor seconds, memory and answers by hand."""

    def __init__(self) -> None:
        self.asked: list[list[Ask]] = []

    @property
    def facts(self) -> Facts:
        done = sum(map(len, self.asked))
        return Facts(cpu=0.5 * done, memory=1e8 + 64 * done, files=20, running=0, waiting=0, images=done)

    def settled(self) -> Facts:
        return self.facts

    def ask(self, asks: list[Ask]) -> Run:
        self.asked.append(asks)
        status = {LEAVES: 0, MALFORMED: 400}
        answers = [
            Answer(ask.kind, status.get(ask.kind, 200), 0.25, ask.kind != LEAVES, ask.arrival + 0.25) for ask in asks
        ]
        return Run(answers, 2.0, 0.1)


SIZES = http.Sizes((2, 2, 2, 1), (4, 2, 4, 2), 40, (0.8,), 3, (5, 4))


def test_rows_tables_and_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, process, model = rows.Rows(tmp_path), Pretended(), adadiff.Model(shell.config()).eval()
    settings = [{"seed": i, "class_labels": 1, "steps": 2} for i in range(4)]
    measured = http.throughput(file, "digits", model, process, settings, 4, rounds=3)
    monkeypatch.setattr(http, "POLICY", "full")
    monkeypatch.setattr("benchmarks.baselines.simulation.STEPS", (1, 3))
    http.latency(file, model, process, SIZES, 4, rate=1000.0)
    http.behaviour(file, process, SIZES, 4, rate=100.0)
    http.memory(file, process, SIZES, 4)
    kinds = [(row["kind"], row["variant"]) for row in file.rows]
    assert kinds == [
        *[("throughput", http.ENGINE), ("throughput", http.SERVICE)],
        *[("latency", http.ENGINE), ("latency", http.SERVICE)] * 2,
        *[("behaviour", http.CALM), ("behaviour", http.MIXED)],
        ("memory", http.SERVICE),
    ]
    engine, service = file.rows[:2]
    assert measured.times[http.SERVICE].samples == (2.0,) * 3  # the clients' own seconds
    assert service["images_per_second"] == 2.0
    assert service["throughput_over_engine"] == pytest.approx(engine["seconds"]["median"] / 2.0)
    assert service["busy_per_request"] == 0.5
    assert service["busy_added"] == 0.5 - engine["busy_per_request"]
    assert (engine["busy_added"], engine["throughput_over_engine"]) == (0.0, 1.0)
    calm, mixed = (row for row in file.rows if row["kind"] == "behaviour")
    assert (calm["asked"][GOOD], calm["whole"][GOOD], calm["asked"][LEAVES]) == (40, 40, 0)
    assert sum(mixed["asked"].values()) == 40
    assert mixed["asked"][LEAVES] > mixed["whole"][LEAVES] == 0
    assert mixed["seconds"]["n"] == calm["seconds"]["n"] == mixed["asked"][GOOD]  # the same requests
    (memory,) = (row for row in file.rows if row["kind"] == "memory")
    assert (memory["parameters"]["requests"], memory["slope"], memory["first"]) == (
        15,
        pytest.approx(64),
        memory["points"][1],
    )
    shown = tables.all_tables(file.rows)
    assert [table.header[0].split(" ")[0] for table in shown] == ["bursts", "requests", "clients", "memory"]
    assert all(len(line) == len(table.header) for table in shown for line in table.body)
    section = http_section.section(file.rows)
    assert "digits" in section.lines[1]
    assert f"{mixed['asked'][LEAVES]} clients that disconnect" in " ".join(section.lines)
    assert http_section.section([]) is None


def test_a_request_without_its_image_fails_the_measurement(tmp_path: Path) -> None:
    process = Pretended()
    process.ask = lambda asks: Run([answer(status=429)] * len(asks), 1.0, 0.1)
    with pytest.raises(RuntimeError, match="no image"):
        http.memory(rows.Rows(tmp_path), process, SIZES, 4)


def test_the_suite_is_chosen_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(run.http, "run", lambda file, sizes: chosen.append(sizes))
    for flags in ([], ["--quick"]):
        monkeypatch.setattr("sys.argv", ["run.py", "--suite", "http", "--out", str(tmp_path), *flags])
        run.main()
    assert chosen == [http.FULL, http.QUICK]
    with pytest.raises(SystemExit):
        run.arguments(["--suite", "http", "--quality-only"])


@pytest.mark.slow
def test_the_service_is_measured_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, on a real process: a tiny model in place of the digits."""
    pytest.importorskip("uvicorn")
    path = shell.saved(tmp_path / "digits.safetensors", shell.config())
    real = http.service
    monkeypatch.setattr(http, "service", lambda name, *limits: real(f"digits={path}", *limits))
    monkeypatch.setattr("benchmarks.suites.http.drawing.load", lambda name: adadiff.load(path))
    monkeypatch.setattr(http, "POLICY", "exit:depth=2")
    file = rows.Rows(tmp_path / "out")
    http.digits(file, SIZES)
    found = {(row["kind"], row["variant"]): row for row in file.rows}
    assert all(row["busy_per_request"] > 0 for row in file.rows if row["kind"] in ("throughput", "latency"))
    mixed = found["behaviour", http.MIXED]
    for kind in (GOOD, MALFORMED, SLOW):
        assert mixed["whole"][kind] == mixed["asked"][kind]
    assert (mixed["left_behind"]["running"], mixed["left_behind"]["waiting"]) == (0, 0)
    assert found["memory", http.SERVICE]["first"] > 2**20
