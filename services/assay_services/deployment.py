"""The same application on Ray Serve: replicas that each follow the registry, scaled by load.

A model that has replicas of its own is an application of Ray Serve under /models/NAME. The others share replicas: a
request that names one goes to a replica that has it in memory if it says so in the header `serve_multiplexed_model_id`,
too (the gateway does), and to any, which reads it, if it does not.
"""

import os
import signal
import threading
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from assay_platform.config import Config
from assay_platform.errors import ClusterError, ConfigError
from assay_platform.tasks.cluster import ray_cluster

from assay_services.named_models import model_of
from assay_services.problems import ProblemError
from assay_services.replies import refusal, send_reply
from assay_services.scaling import ScalingRule
from assay_services.tenants import arrived

if TYPE_CHECKING:
    from assay_services.served import Served

_MAX_ONGOING = 64
# As `assay serve` does in its one process.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def run_on_ray(config: Config, *, host: str, port: int, fraud: str | None, recommend: str | None) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ClusterError: Ray or a deployment did not start.
        ConfigError: a model that is to have replicas of its own is not registered.
    """
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    # Of a replica that goes. The thirty seconds of Ray are meant for balancers that ask it seldom.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "3")
    own = _applications_of(config)
    with ray_cluster():
        from ray import serve

        stop, is_up = threading.Event(), False

        def asked(*_: object) -> None:
            stop.set()
            if not is_up:
                raise KeyboardInterrupt

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, asked)
        # Those that share replicas write for all, so one of them stays.
        kept = replace(config, scaling=replace(config.scaling, min_replicas=max(1, config.scaling.min_replicas)))
        shared = _deployment(kept if own else config, fraud=fraud, recommend=recommend)
        targets = [serve.RunTarget(shared, "assay", "/")]
        for name, application in own.items():
            alone = _deployment(config, **{"fraud": "", "recommend": "", application: name}, writes=False)
            targets.append(serve.RunTarget(alone, f"assay {name}", f"/models/{name}"))
        try:
            serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
            serve.run_many(targets)
            is_up = True
            print(f"Assay answers on http://{host}:{port} through Ray Serve (Ctrl-C stops it)", flush=True)  # noqa: T201
            stop.wait()
        except KeyboardInterrupt:
            pass  # while it was being started
        except (RuntimeError, TimeoutError) as error:
            raise ClusterError(f"the Ray Serve deployment did not start: {error}") from error
        serve.shutdown()  # type: ignore[no-untyped-call]


def _deployment(config: Config, *, fraud: str | None, recommend: str | None, writes: bool = True) -> Any:
    """Replicas that follow these models, as many as their load needs. writes: see `Siblings`."""
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
    @serve.ingress(_builder(config, fraud, recommend, writes))
    class Scoring:
        """One replica: one scoring application."""

    deployed: Any = Scoring
    return deployed.bind()


def _applications_of(config: Config) -> dict[str, str]:
    """What the models are for that have replicas of their own."""
    if not config.scaling.own_replicas:
        return {}
    from assay_platform.tracking import AuditLog, ModelRegistry

    known = ModelRegistry(config.tracking_uri, AuditLog(config.paths.audit_log)).aliases()
    missing = [name for name in config.scaling.own_replicas if name not in known]
    if missing:
        there = ", ".join(sorted(known)) or "none"
        raise ConfigError(f"scaling.own_replicas names {', '.join(missing)}; registered are {there}")
    return {name: known[name].application for name in config.scaling.own_replicas}


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


def _builder(config: Config, fraud: str | None, recommend: str | None, writes: bool) -> Any:
    """A function that a replica calls to build its application: models and threads cannot be sent to it."""

    def build() -> Any:
        import torch

        from assay_services.alone import create_app
        from assay_services.dependencies import make_dependencies

        torch.set_num_threads(1)
        return create_app(make_dependencies(config, fraud=fraud, recommend=recommend, writes=writes), _KnownToServe)

    return build


class _Held:
    """A model in a replica's memory, which goes with this."""

    def __init__(self, served: "Served", name: str) -> None:
        self._served, self._name = served, name

    def __del__(self) -> None:
        self._served.tenants.let_go(self._name)


class _KnownToServe:
    """ASGI middleware: Ray Serve knows which models a replica has, and says which one goes for another."""

    def __init__(self, app: Any, served: "Served") -> None:
        from ray import serve

        self._app, self._served = app, served

        async def held(name: str) -> _Held:
            return _Held(served, name)

        self._held: Any = serve.multiplexed(max_num_models_per_replica=served.most)(held)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        name = model_of(scope)
        if name and self._served.among_followed(name) is None:
            try:
                # Before Ray Serve hears of it, which makes room for whatever is asked, also for what is not there.
                await arrived(self._served.get, name)
                await self._held(name)
            except ProblemError as error:
                await send_reply(send, refusal(error))
                return
        await self._app(scope, receive, send)
