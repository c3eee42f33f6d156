"""Prometheus metrics of one scoring process. Every instance has a registry of its own, so tests do not collide."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from assay_platform.models.decisions import DECISIONS, Decision
from assay_platform.monitoring.alarms import Finding
from assay_platform.storage.tiered import TieredStore
from assay_platform.tasks.beat import read_beats

if TYPE_CHECKING:
    from assay_platform.moe.fences import Fences

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# An hour to a quarter of a year: chargebacks take weeks.
_DELAY_BUCKETS_S = (3600.0, 86400.0, 3 * 86400.0, 7 * 86400.0, 14 * 86400.0, 30 * 86400.0, 60 * 86400.0, 90 * 86400.0)
_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class ServiceMetrics:
    """What operators watch: traffic, errors, latency, which version answers, what was decided."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time and open files of the process
        self.requests = CounterMetric(
            "assay_requests_total", "HTTP requests", ("route", "method", "status"), registry=self.registry
        )
        self.latency = Histogram(
            "assay_request_seconds",
            "Time to answer",
            ("route",),
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.model_version = Gauge(
            "assay_model_version", "Version that answers", ("application", "model"), registry=self.registry
        )
        self.swaps = CounterMetric(
            "assay_model_swaps_total",
            "Model loads by outcome",
            ("application", "outcome"),
            registry=self.registry,
        )
        self.shadowed = CounterMetric(
            "assay_shadow_requests_total", "Requests that a challenger answered aside", ("application",),
            registry=self.registry,
        )  # fmt: skip
        self.shadow_refused = CounterMetric(
            "assay_shadow_refused_total", "Requests that a challenger does not take", ("application",),
            registry=self.registry,
        )  # fmt: skip
        self.shadow_changed = Gauge(
            "assay_shadow_changed", "Share of choices that a challenger makes otherwise, the newest requests",
            ("application",), registry=self.registry,
        )  # fmt: skip
        self.labels = CounterMetric("assay_fraud_labels_total", "Reported labels taken in", registry=self.registry)
        self._judged = CounterMetric(
            "assay_fraud_judged_total", "Decisions of which it was reported what came true", ("decision", "fraud"),
            registry=self.registry,
        )  # fmt: skip
        self._expected = CounterMetric(
            "assay_fraud_expected_total", "Frauds among them by their scores", registry=self.registry
        )
        self._label_delay = Histogram(
            "assay_fraud_label_delay_seconds", "From a decision to its label", buckets=_DELAY_BUCKETS_S,
            registry=self.registry,
        )  # fmt: skip
        self._shown_items = Gauge(
            "assay_recommend_coverage", "Share of the catalogue in the newest lists", registry=self.registry
        )
        self.conversions = CounterMetric(
            "assay_recommend_conversions_total", "Items of a list that its user took afterwards", registry=self.registry
        )
        decisions = CounterMetric(
            "assay_fraud_decisions_total", "Fraud decisions", ("decision",), registry=self.registry
        )
        # Looking a label up takes longer than counting.
        self._answered: dict[tuple[str, str, int], tuple[CounterMetric, Histogram]] = {}
        self._decisions = {name: decisions.labels(name) for name in DECISIONS}
        self.recommendations = CounterMetric(
            "assay_recommendations_total", "Recommendation lists", ("cold_start",), registry=self.registry
        )
        self._drift_windows = CounterMetric(
            "assay_drift_windows_total",
            "Windows of events and of labels that were looked at",
            ("model",),
            registry=self.registry,
        )
        self._drift_findings, self._drift_alarms = (
            Gauge(f"assay_drift_{name}", text, ("model", "column", "kind"), registry=self.registry)
            for name, text in (
                ("found", "Share of the newest window that is not as in training"),
                ("alarm", "Share of it, where the window before had it too"),
            )
        )
        self._batch_requests = Histogram(
            "assay_batch_requests", "Requests answered by one call of a model", ("application",),
            buckets=_BATCH_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._batch_rows = Histogram(
            "assay_batch_rows", "Rows scored by one call of a model", ("application",),
            buckets=_BATCH_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "assay_batch_seconds", "Time of one call of a model", ("application",),
            buckets=_LATENCY_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        self.events = CounterMetric(
            "assay_events_total", "Events folded into features", ("application",), registry=self.registry
        )

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """One more request, and how long it took."""
        key = (route, method, status)
        counters = self._answered.get(key)
        if counters is None:
            # Callers make up methods, and each would be a time series.
            named = method if method in _METHODS else "OTHER"
            counters = self.requests.labels(route, named, str(status)), self.latency.labels(route)
            if named != method:
                key = (route, named, status)
            self._answered[key] = counters
        counters[0].inc()
        counters[1].observe(seconds)

    def decided(self, decision: Decision) -> None:
        """One more decision."""
        self._decisions[decision].inc()

    def judged(self, decision: Decision, score: float, delay_s: float, *, fraud: bool) -> None:
        """It was reported what one decision came true as."""
        self._judged.labels(decision, str(fraud).lower()).inc()
        self._expected.inc(score)
        self._label_delay.observe(max(0.0, delay_s))

    def listed(self, *, cold_start: bool, coverage: float) -> None:
        """One more list. coverage: share of the catalogue in the newest lists."""
        self.recommendations.labels(str(cold_start).lower()).inc()
        self._shown_items.set(coverage)

    def drifted(self, model: str, findings: Sequence[Finding], alarms: Sequence[Finding]) -> None:
        """One more window of a model's events or labels was looked at."""
        self._drift_windows.labels(model).inc()
        self._show_drift(model, findings, alarms)

    def forget_drift(self, model: str) -> None:
        """Of a model that is not in memory any more."""
        self._show_drift(model, (), ())

    def _show_drift(self, model: str, findings: Sequence[Finding], alarms: Sequence[Finding]) -> None:
        for gauge, found in ((self._drift_findings, findings), (self._drift_alarms, alarms)):
            gauge.remove_by_labels({"model": model})
            for one in found:
                gauge.labels(model, one.column, one.kind).set(one.moved)

    def on_batch(self, application: str) -> Callable[[int, int, float], None]:
        """What counts calls of a model: how many requests and rows each answered, and how long it took."""
        requests, rows = (of.labels(application) for of in (self._batch_requests, self._batch_rows))
        seconds = self._batch_seconds.labels(application)

        def count(num_requests: int, num_rows: int, spent_s: float) -> None:
            requests.observe(num_requests)
            rows.observe(num_rows)
            seconds.observe(spent_s)

        return count

    def watch_queues(self, waiting: Callable[[], Mapping[str, int]]) -> None:
        """Show how many requests wait. waiting: application → requests, asked at every scrape."""
        self.registry.register(_QueueCollector(waiting))

    def watch_tiers(self, stores: Callable[[], Mapping[str, TieredStore]]) -> None:
        """Show the tiers of feature stores: hits, moves and bytes. stores: name → store, asked at every scrape."""
        self.registry.register(_TierCollector(stores))

    def watch_experts(self, models: Callable[[], Mapping[str, Sequence["Fences"]]]) -> None:
        """Show experts that failed. models: application → the fences of its model's layers, asked at every scrape."""
        self.registry.register(_ExpertCollector(models))

    def watch_tasks(self, folder: Path) -> None:
        """Show what the dispatchers of this machine do. folder: where they say it."""
        self.registry.register(_TaskCollector(folder))

    def render(self) -> bytes:
        """The text that a Prometheus server scrapes."""
        return generate_latest(self.registry)


def render(families: Iterable[Metric]) -> bytes:
    """The text that a Prometheus server scrapes, of families from wherever."""
    registry = CollectorRegistry()
    registry.register(_Held(list(families)))
    return generate_latest(registry)


class _Held(Collector):
    """Families as they are."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


class _QueueCollector(Collector):
    """Asks who waits when Prometheus asks."""

    def __init__(self, waiting: Callable[[], Mapping[str, int]]) -> None:
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("assay_requests_waiting", "Requests that wait for a model", labels=["application"])
        for application, count in self._waiting().items():
            family.add_metric([application], count)
        yield family


class _TaskCollector(Collector):
    """Reads what dispatchers last said when Prometheus asks. process: several run at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        room = GaugeMetricFamily("assay_task_room", "Cores and GPUs", labels=["process", "device", "what"])
        running = GaugeMetricFamily("assay_tasks_running", "Tasks that run", labels=["process", "name", "device"])
        waiting = GaugeMetricFamily("assay_tasks_waiting", "Tasks that wait", labels=["process", "kind"])
        ended = CounterMetricFamily(
            "assay_tasks", "What became of tasks", labels=["process", "name", "device", "outcome"]
        )
        seconds = CounterMetricFamily("assay_task_seconds", "Time of tasks", labels=["process", "name", "device"])
        for process, beat in read_beats(self._folder):
            for device in beat.total:
                room.add_metric([process, device, "total"], beat.total[device])
                room.add_metric([process, device, "used"], beat.used[device])
            for (name, device), count in Counter((one.name, one.device) for one in beat.running).items():
                running.add_metric([process, name, device], count)
            for kind, count in beat.waiting.items():
                waiting.add_metric([process, kind], count)
            for done, count in beat.done.items():
                ended.add_metric([process, done.name, done.device, done.outcome], count)
            for (name, device), spent in beat.seconds.items():
                seconds.add_metric([process, name, device], spent)
        yield from (room, running, waiting, ended, seconds)


class _ExpertCollector(Collector):
    """Reads what fences count when Prometheus asks."""

    def __init__(self, models: Callable[[], Mapping[str, Sequence["Fences"]]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        fenced = GaugeMetricFamily("assay_experts_fenced", "Experts that are left out", labels=["application", "layer"])
        failures = CounterMetricFamily("assay_expert_failures", "Failures of experts", labels=["application", "layer"])
        for application, layers in self._models().items():
            for number, fences in enumerate(layers):
                fenced.add_metric([application, str(number)], len(fences.fenced()))
                failures.add_metric([application, str(number)], fences.num_failures)
        yield fenced
        yield failures


class _TierCollector(Collector):
    """Reads the statistics of stores when Prometheus asks, so that reading features costs nothing more."""

    def __init__(self, stores: Callable[[], Mapping[str, TieredStore]]) -> None:
        self._stores = stores

    def collect(self) -> Iterator[Metric]:
        sizes = GaugeMetricFamily("assay_feature_tier_bytes", "Bytes held by a tier", labels=["store", "tier"])
        counts = CounterMetricFamily(
            "assay_feature_tier_events", "Hits, misses and moves between tiers", labels=["store", "event"]
        )
        for name, store in self._stores().items():
            for tier, size in store.sizes_bytes.items():
                sizes.add_metric([name, tier], size)
            for event, count in asdict(store.statistics).items():
                counts.add_metric([name, event], count)
        yield sizes
        yield counts
