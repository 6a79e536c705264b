"""Prometheus metrics for /metrics. Names are those of other image services, with the prefix `adadiff_`."""

import time
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .drawn import Drawn
from .served import ServedModel

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
STEPS = (1, 2, 4, 8, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 250, 500, 1000)
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RECENT = 64  # images whose mean time in the queue is suggested to refused clients
MOST_RETRY = 60  # seconds


class Metrics:
    """Counts events of the event loop, and reads the engines at each scrape. It has its own registry, so that a process
    can hold several."""

    def __init__(self, models: Mapping[str, ServedModel]):
        self.registry = CollectorRegistry()
        shared = {"registry": self.registry, "namespace": "adadiff"}
        by_model = ("model",)
        self._e2e = Histogram(
            *("e2e_request_latency_s", "Seconds from a request's arrival to its reply", by_model),
            buckets=SECONDS,
            **shared,
        )
        self._wait = Histogram(
            "request_queue_wait_s", "Seconds an image waited for a slot", by_model, buckets=SECONDS, **shared
        )
        self._steps = Histogram("num_inference_steps", "Steps of an image", by_model, buckets=STEPS, **shared)
        self._step_seconds = Histogram(
            *("denoise_step_latency_s", "Seconds of a step, the mean of each image", by_model),
            buckets=STEP_SECONDS,
            **shared,
        )
        self._left_out = Histogram(
            "share_left_out", "Share of the network's blocks that an image left out", by_model, buckets=SHARES, **shared
        )
        self._images = Counter("image_count", "Images drawn", by_model, **shared)
        self._failed = Counter(
            "requests_failed", "Requests that failed, by the code of the error", ("reason",), **shared
        )
        self._http = Counter("http_requests", "Replies", ("path", "status"), **shared)
        # counts by exit layer; entry 0, of unconditional halves that were not computed, is not reported
        self._exits = {name: np.zeros(served.model.num_layers + 1, np.int64) for name, served in models.items()}
        self._models = models
        self._waits: deque[float] = deque(maxlen=RECENT)
        self.registry.register(_Engines(models, self._exits))  # type: ignore[arg-type]
        ProcessCollector(registry=self.registry)
        for name in models:  # so that rates begin at 0
            self._images.labels(name)

    def drawn(self, model: str, image: Drawn) -> None:
        self._exits[model] += np.bincount(image.layers.ravel(), minlength=len(self._exits[model]))
        self._images.labels(model).inc()
        self._wait.labels(model).observe(image.waited)
        self._steps.labels(model).observe(image.steps)
        self._step_seconds.labels(model).observe(image.seconds / max(image.steps, 1))
        self._left_out.labels(model).observe(image.share_left_out)
        self._waits.append(image.waited)

    def replied(self, model: str, began: float) -> None:
        """Counts a completed request. began: its arrival, on `time.perf_counter`."""
        self._e2e.labels(model).observe(time.perf_counter() - began)

    def failed(self, reason: str) -> None:
        self._failed.labels(reason).inc()

    def http(self, path: str, status: int) -> None:
        self._http.labels(path, str(status)).inc()

    def retry_after(self) -> int:
        """Whole seconds, 1 to 60: the mean time in the queue of recent images."""
        mean = sum(self._waits) / len(self._waits) if self._waits else 1.0
        return max(1, min(MOST_RETRY, round(mean)))

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Engines:
    """Collector of the engines' gauges and totals, and of exit layers, which are too many to observe one by one."""

    def __init__(self, models: Mapping[str, ServedModel], exits: Mapping[str, np.ndarray]):
        self._models, self._exits = models, exits

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("adadiff_num_requests_running", "Images being drawn", labels=["model"])
        waiting = GaugeMetricFamily("adadiff_num_requests_waiting", "Images waiting for a slot", labels=["model"])
        up = GaugeMetricFamily("adadiff_engine_up", "1 if the engine is alive", labels=["model"])
        capacity = GaugeMetricFamily("adadiff_engine_lanes", "Most lanes of a forward pass", labels=["model"])
        ticks = CounterMetricFamily("adadiff_engine_ticks", "Steps of the engine", labels=["model"])
        blocks = CounterMetricFamily("adadiff_blocks", "Blocks run, counted for each lane", labels=["model"])
        full = CounterMetricFamily("adadiff_blocks_full", "Blocks that full networks would have run", labels=["model"])
        macs = CounterMetricFamily("adadiff_multiply_adds", "Multiply-adds spent", labels=["model"])
        macs_full = CounterMetricFamily(
            "adadiff_multiply_adds_full", "Multiply-adds that full networks would have taken", labels=["model"]
        )
        exits = HistogramMetricFamily("adadiff_exit_layer", "Blocks that a lane ran in a step", labels=["model"])
        for name, served in self._models.items():
            report, layers = served.engine.report, served.model.num_layers
            totals = report.batch
            running.add_metric([name], report.running)
            waiting.add_metric([name], report.waiting)
            up.add_metric([name], served.engine.alive)
            capacity.add_metric([name], served.engine.capacity)
            ticks.add_metric([name], totals.ticks)
            blocks.add_metric([name], totals.blocks)
            full.add_metric([name], totals.passes * layers)
            macs.add_metric([name], totals.macs)
            macs_full.add_metric([name], totals.macs_full)
            counts = self._exits[name][1:]
            below = counts.cumsum().tolist()
            buckets = [(f"{k + 1}.0", float(below[k])) for k in range(layers)] + [("+Inf", float(below[-1]))]
            exits.add_metric([name], buckets, sum_value=float(counts @ np.arange(1, layers + 1)))
        return [running, waiting, up, capacity, ticks, blocks, full, macs, macs_full, exits]
