"""`adadiff serve` as a process, and its metrics."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.baselines.http_client import Ask, Run, clients
from benchmarks.rows import ROOT

START = 120.0  # seconds that starting may take
GAUGES = {  # name in /metrics -> attribute of Facts
    "process_cpu_seconds_total": "cpu",
    "process_resident_memory_bytes": "memory",
    "process_open_fds": "files",
    "adadiff_num_requests_running": "running",
    "adadiff_num_requests_waiting": "waiting",
    "adadiff_image_count_total": "images",
}


@dataclass(frozen=True)
class Facts:
    """Values from /metrics, summed over models. cpu: seconds; memory: bytes; files: open files; running, waiting,
    images: numbers of images in progress, waiting and finished."""

    cpu: float
    memory: float
    files: float
    running: float
    waiting: float
    images: float

    @staticmethod
    def of(page: str) -> "Facts":
        found = dict.fromkeys(GAUGES.values(), 0.0)
        for line in page.splitlines():
            name, _, value = line.rpartition(" ")
            if (name := name.partition("{")[0]) in GAUGES:
                found[GAUGES[name]] += float(value)
        return Facts(**found)


class ServiceProcess:
    def __init__(self, process: subprocess.Popen, address: str):
        self.process, self.address = process, address
        host, _, port = address.removeprefix("http://").rpartition(":")
        self._host, self._port = host, int(port)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.address + path, timeout=30) as reply:
            return reply.read().decode()

    @property
    def facts(self) -> Facts:
        return Facts.of(self.get("/metrics"))

    def ask(self, asks: Sequence[Ask]) -> Run:
        return clients(self._host, self._port, asks)

    def settled(self, seconds: float = 30.0) -> Facts:
        """Metrics when no image is running or waiting, or after `seconds` at the latest."""
        until = time.monotonic() + seconds
        while (facts := self.facts).running + facts.waiting and time.monotonic() < until:
            time.sleep(0.02)
        return facts


@contextmanager
def service(*arguments: str) -> Iterator[ServiceProcess]:
    """`adadiff serve` with this process's number of threads, on a free port of the loopback interface, warmed up.
    RuntimeError if it does not start, or does not exit with 0."""
    path = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "adadiff", "serve", *arguments, "--port", "0", "--log-format", "json"]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"  # not a pipe, which would have to be read
        with log.open("wb") as out:
            process = subprocess.Popen(command, stderr=out, stdout=subprocess.DEVNULL, env=environment)
        try:
            yield _warm(process, log)
            process.send_signal(signal.SIGTERM)
            if process.wait(60):
                raise RuntimeError(f"the service ended with {process.returncode}: {log.read_text()[-2000:]}")
        finally:
            process.kill()
            process.wait()


def _warm(process: subprocess.Popen, log: Path) -> ServiceProcess:
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        if address := next((line["address"] for line in lines if line["event"] == "serving"), None):
            found = ServiceProcess(process, address)
            try:
                found.get("/ready")
                return found
            except (urllib.error.URLError, ConnectionError):
                pass
        time.sleep(0.05)
    raise RuntimeError(f"the service did not start: {log.read_text()[-2000:]}")
