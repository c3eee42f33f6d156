"""What is measured of regions."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from assay_services.gateway.choice import Region
from assay_services.gateway.outbox import Outbox

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0, 3600.0)


class RegionMetrics(Collector):
    """Read when they are asked for."""

    def __init__(self, registry: CollectorRegistry, regions: Mapping[str, Region], outbox: Outbox) -> None:
        self._regions, self._outbox = regions, outbox
        self.failovers = Counter(
            "assay_region_failovers_total", "Requests that a region did not answer", ("region",), registry=registry
        )
        self.refused = Counter(
            "assay_region_refused_writes_total", "Writes that another region took and this one never will",
            ("region",), registry=registry,
        )  # fmt: skip
        self.told = Histogram(
            "assay_region_told_seconds", "From a write that a region took until another one knows it", ("region",),
            buckets=_BUCKETS_S, registry=registry,
        )  # fmt: skip
        for name in regions:
            self.failovers.labels(name)
            self.refused.labels(name)
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Of all regions."""
        for name, text, of in (
            ("assay_region_up", "Whether a region answers probes", lambda r: float(r.is_up)),
            ("assay_region_drained", "Whether somebody keeps requests from it", lambda r: float(r.drained)),
            ("assay_region_latency_seconds", "Fastest of the newest probes", lambda r: r.latency_s),
            ("assay_region_lag_seconds", "Age of the oldest write that it does not know",
             lambda r: self._outbox.lag_s(r.name)),
            ("assay_region_waiting_writes", "Writes that it does not know",
             lambda r: float(self._outbox.waiting(r.name))),
        ):  # fmt: skip
            family = GaugeMetricFamily(name, text, labels=("region",))
            for region in self._regions.values():
                family.add_metric((region.name,), of(region))
            yield family
