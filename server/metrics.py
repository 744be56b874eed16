"""Prometheus metrics of one server, in a registry of their own; names follow vLLM's with the
prefix herd_.

`adapter` is a real label: the adapter's name, or "" for the base model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.registry import AdapterRecord
from engine.api import EngineInfo, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SLOW_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_TOKENS = tuple(float(2**i) for i in range(18))
_LABELS = ("model_name", "adapter")


class Metrics:
    """Everything /metrics shows. Called from the event loop only."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.registry = CollectorRegistry(auto_describe=True)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"herd_{name}", text, (*_LABELS, *more), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"herd_{name}", text, _LABELS, registry=self.registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted sequences")
        self.generation_tokens = counter("generation_tokens", "Generated tokens")
        self.finished = counter(
            "request_success", "Sequences that ended, by reason", "finished_reason"
        )
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token", _FAST_S)
        self.itl = histogram("inter_token_latency_seconds", "Between tokens of a sequence", _FAST_S)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token", _SLOW_S)
        self.queue = histogram("request_queue_time_seconds", "Waiting in the engine", _FAST_S)
        self.prefill = histogram(
            "request_prefill_time_seconds", "First step to first token", _FAST_S
        )
        self.decode = histogram("request_decode_time_seconds", "First to last token", _SLOW_S)
        self.prompt_length = histogram(
            "request_prompt_tokens", "Prompt tokens per sequence", _TOKENS
        )
        self.output_length = histogram(
            "request_generation_tokens", "Generated tokens per sequence", _TOKENS
        )
        self.http = Counter(
            "herd_http_requests",
            "HTTP answers by route and status",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.adapter_load = Histogram(
            "herd_adapter_load_seconds",
            "Reading, checking and placing an adapter",
            _LABELS,
            registry=self.registry,
            buckets=_SLOW_S,
        )
        self.adapter_generation = Gauge(
            "herd_adapter_generation", "Current generation", _LABELS, registry=self.registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def watch(self, collector: Collector) -> None:
        self.registry.register(collector)


class RequestTimer:
    """Times one sequence from its arrival and books it when it ends."""

    def __init__(self, metrics: Metrics, adapter: str, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._labels = (metrics.model_name, adapter)
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0
        self._arrival = time.monotonic()
        self._first: float | None = None
        self._last = self._arrival
        self._is_booked = False
        # Looked up once: these two are booked with every token.
        self._generated = metrics.generation_tokens.labels(*self._labels)
        self._between = metrics.itl.labels(*self._labels)
        metrics.prompt_tokens.labels(*self._labels).inc(num_prompt_tokens)
        metrics.prompt_length.labels(*self._labels).observe(num_prompt_tokens)

    def tokens(self, count: int, queued_s: float) -> None:
        """`count` tokens arrived together; queued_s is that of the first delta."""
        if count == 0:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now
            waited = now - self._arrival
            self._metrics.ttft.labels(*self._labels).observe(waited)
            self._metrics.queue.labels(*self._labels).observe(queued_s)
            self._metrics.prefill.labels(*self._labels).observe(max(waited - queued_s, 0.0))
        else:
            for _ in range(count):
                self._between.observe((now - self._last) / count)
        self._last = now
        self._num_tokens += count
        self._generated.inc(count)

    def end(self, reason: str) -> None:
        """The first call counts: stop, length, cancelled or error."""
        if self._is_booked:
            return
        self._is_booked = True
        self._metrics.finished.labels(*self._labels, reason).inc()
        self._metrics.output_length.labels(*self._labels).observe(self._num_tokens)
        self._metrics.e2e.labels(*self._labels).observe(time.monotonic() - self._arrival)
        if self._first is not None:
            self._metrics.decode.labels(*self._labels).observe(self._last - self._first)


def engine_metrics(
    model_name: str, stats: EngineStats, info: EngineInfo | None, num_restarts: int
) -> Iterable[Metric]:
    """The worker's own counters and gauges, read when Prometheus asks."""

    def gauge(name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"herd_{name}", text, labels=["model_name"])
        family.add_metric([model_name], value)
        return family

    def counter(name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"herd_{name}", text, labels=["model_name"])
        family.add_metric([model_name], value)
        return family

    yield gauge("num_requests_running", "Sequences in the batch", stats.num_running)
    yield gauge("num_requests_waiting", "Sequences that wait", stats.num_waiting)
    yield gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0..1", stats.kv_cache_usage)
    yield gauge("step_seconds", "Length of the last step", stats.step_s)
    yield gauge("iteration_tokens", "Tokens in the last step", stats.num_step_tokens)
    yield gauge("adapters_resident", "Adapters on the device", len(stats.resident_adapters))
    yield counter(
        "num_preemptions", "Sequences put back for lack of KV blocks", stats.num_preemptions
    )
    yield counter("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_cache_queries)
    yield counter("prefix_cache_hits", "Prompt tokens found", stats.prefix_cache_hits)
    yield counter("adapter_loads", "Adapters put on the device", stats.num_adapter_loads)
    yield counter("adapter_evictions", "Adapters that gave way", stats.num_adapter_evictions)
    yield counter("adapter_load_time_seconds", "Time spent loading adapters", stats.adapter_load_s)
    yield counter("spec_decode_num_drafts", "Times that tokens were guessed", stats.num_drafts)
    yield counter("spec_decode_num_draft_tokens", "Tokens guessed", stats.num_draft_tokens)
    yield counter(
        "spec_decode_num_accepted_tokens",
        "Guessed tokens that became text",
        stats.num_accepted_tokens,
    )
    yield counter("worker_restarts", "Times the engine worker was started again", num_restarts)
    if info is not None:
        facts = {
            "model_name": model_name,
            "block_size": str(info.block_size),
            "num_kv_blocks": str(info.num_kv_blocks),
            "kv_cache_dtype": info.kv_cache_dtype,
            "quantization": info.quantization,
            "device": info.device,
        }
        family = GaugeMetricFamily("herd_cache_config_info", "Of the KV cache", labels=list(facts))
        family.add_metric(list(facts.values()), 1)
        yield family


def adapter_metrics(
    model_name: str, records: Iterable[AdapterRecord], stats: EngineStats
) -> Iterable[Metric]:
    """Of each adapter that is loaded now: where it is and how many requests hold it."""
    labels = ["model_name", "adapter"]
    resident = GaugeMetricFamily(
        "herd_adapter_resident", "1: in a row on the device", labels=labels
    )
    running = GaugeMetricFamily("herd_adapter_requests_running", "Requests now", labels=labels)
    for record in records:
        key = (record.ref.uid, record.ref.generation)
        resident.add_metric([model_name, record.name], key in stats.resident_adapters)
        running.add_metric([model_name, record.name], record.num_running)
    yield resident
    yield running
