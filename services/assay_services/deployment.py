"""The same application on Ray Serve: replicas that each follow the registry, scaled by load."""

import os
import signal
import threading
from dataclasses import asdict
from typing import Any

from assay_platform.config import Config
from assay_platform.errors import ClusterError
from assay_platform.tasks.cluster import ray_cluster

from assay_services.scaling import ScalingRule

_MAX_ONGOING = 64
# As `assay serve` does in its one process.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def run_on_ray(config: Config, *, host: str, port: int, fraud: str | None, recommend: str | None) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ClusterError: Ray or the deployment did not start.
    """
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    with ray_cluster():
        from ray import serve

        rule = rule_of(config, len(os.sched_getaffinity(0)))

        @serve.deployment(
            name="assay",
            max_ongoing_requests=_MAX_ONGOING,
            autoscaling_config={
                "min_replicas": rule.min_replicas,
                "max_replicas": rule.max_replicas,
                "upscale_delay_s": 0.0,
                "downscale_delay_s": 0.0,
                "metrics_interval_s": 1.0,
                "look_back_period_s": 5.0,
                "policy": {
                    "policy_function": "assay_services.scaling:ServePolicy",
                    "policy_kwargs": asdict(rule),
                },
            },
            ray_actor_options={"num_cpus": 0.5, "runtime_env": {"env_vars": _ONE_THREAD}},
        )
        @serve.ingress(_builder(config, fraud, recommend))
        class Scoring:
            """One replica: one scoring application."""

        serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
        try:
            deployed: Any = Scoring
            serve.run(deployed.bind(), name="assay", route_prefix="/")
        except (RuntimeError, TimeoutError) as error:
            raise ClusterError(f"the Ray Serve deployment did not start: {error}") from error
        print(f"Assay answers on http://{host}:{port} through Ray Serve (Ctrl-C stops it)", flush=True)  # noqa: T201
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        serve.shutdown()  # type: ignore[no-untyped-call]


def rule_of(config: Config, num_cpus: int) -> ScalingRule:
    """The settings as a rule."""
    given = config.scaling
    most = given.max_replicas or max(1, num_cpus - 1)
    return ScalingRule(
        fixed_s=given.call_ms / 1e3,
        a_row_s=given.row_ms / 1e3,
        max_batch_s=config.service.max_batch_ms / 1e3,
        utilisation=given.utilisation,
        start_s=given.start_s,
        hold_s=given.hold_s,
        zero_s=given.zero_s,
        min_replicas=min(given.min_replicas, most),
        max_replicas=most,
    )


def _builder(config: Config, fraud: str | None, recommend: str | None) -> Any:
    """A function that a replica calls to build its application: models and threads cannot be sent to it."""

    def build() -> Any:
        import torch

        from assay_services.alone import create_app
        from assay_services.dependencies import make_dependencies

        torch.set_num_threads(1)
        return create_app(make_dependencies(config, fraud=fraud, recommend=recommend))

    return build
