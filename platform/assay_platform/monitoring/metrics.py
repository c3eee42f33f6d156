"""Prometheus metrics of one scoring process. Every instance has a registry of its own, so tests do not collide."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class ServiceMetrics:
    """What operators watch: traffic, errors, latency, which version answers, what was decided."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
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
        self.swaps = Counter(
            "assay_model_swaps_total",
            "Model loads by outcome",
            ("application", "outcome"),
            registry=self.registry,
        )
        self.decisions = Counter(
            "assay_fraud_decisions_total", "Fraud decisions", ("decision",), registry=self.registry
        )
        self.recommendations = Counter(
            "assay_recommendations_total", "Recommendation lists", ("cold_start",), registry=self.registry
        )
        self.events = Counter(
            "assay_events_total", "Events folded into features", ("application",), registry=self.registry
        )

    def render(self) -> bytes:
        """The text that a Prometheus server scrapes."""
        return generate_latest(self.registry)
