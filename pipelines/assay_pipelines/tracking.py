"""Steps around a run that both applications share: its MLflow run, the search, registration behind the gate."""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay_platform.config import Config
from assay_platform.errors import ArtifactError, InputError, RegistryError
from assay_platform.tasks.cluster import ray_cluster
from assay_platform.tracking import CHALLENGER, CHAMPION, AuditLog, GateReport, ModelRegistry, RunLog
from assay_platform.tuning.report import search_figures
from assay_platform.tuning.search import Objective, Progress, SearchBudget, SearchResult, TrialResult, search
from assay_platform.tuning.space import Space, active, read_value
from assay_platform.tuning.stopping import Curve

from assay_pipelines.console import Reporter
from assay_pipelines.options import RunOptions

if TYPE_CHECKING:
    from assay_platform.monitoring.routing import RoutingMonitor
    from mlflow.models import ModelSignature

_MOST_EARLIER, _SHOWN_TRIALS = 2, 5


def open_registry(config: Config) -> ModelRegistry:
    """The registry of this deployment."""
    return ModelRegistry(config.tracking_uri, AuditLog(config.paths.audit_log))


@contextmanager
def tracked_run(
    options: RunOptions, reporter: Reporter, *, fingerprint: str, plan_version: str, num_rows: int
) -> Iterator[RunLog]:
    """An MLflow run that says which code, data and features it is about."""
    with reporter.stage("track", "Open MLflow"):
        log = RunLog(options.config.tracking_uri, options.config.paths.home / "artifacts")
    tags = {
        "assay.application": options.application,
        "assay.data": options.data,
        "assay.data_sha256": fingerprint,
        "assay.feature_plan": plan_version,
        "mlflow.runName": options.model_name,
        "mlflow.source.git.commit": _code_version(),
    }
    with log.run(f"assay-{options.application}", tags) as run:
        run.log(
            params={
                "rows": num_rows,
                "seed": options.seed,
                "budget_s": options.budget_s,
                "code_version": _code_version(),
            }
        )
        yield run


def log_routing(run: RunLog, monitor: "RoutingMonitor") -> None:
    """What the routers of a training did, an epoch at a time, as metrics and as routing.png."""
    run.log_history(monitor.series())
    run.log_figure("routing.png", monitor.plot)


def run_search(
    options: RunOptions,
    reporter: Reporter,
    run: RunLog,
    *,
    objective: Objective,
    data: Any,
    space: Space,
    defaults: Mapping[str, Any],
    max_epochs: int,
    portfolio: Sequence[Mapping[str, Any]] = (),
    num_parallel: int = 2,
    problem: str = "",
) -> SearchResult:
    """Search on Ray within the budget; every trial becomes a child run, figures show how it went.

    It starts from the defaults, from what was best in earlier searches over tables of a like size, and from the points
    of a portfolio. problem: what trials have to share to be comparable, besides table and seed.
    """
    num_rows, identity = int(run.params["rows"]), f"{run.tags['assay.data_sha256']}:{options.seed}{problem}"
    earlier = run.earlier_searches(list(space), tag="assay.application", param="rows")
    earlier.sort(key=lambda one: abs(math.log(max(1.0, float(one["rows"])) / max(1, num_rows))))
    points = [{n: read_value(space[n], one[f"best.{n}"]) for n in space} for one in earlier[:_MOST_EARLIER]]
    if points:
        reporter.line(f"the best of {len(points)} earlier searches are tried first")
    journal = None
    if options.search_name is not None:
        journal = options.config.paths.searches / f"{options.model_name}-{options.search_name}.log"
    with reporter.stage("ray", "Start Ray"):
        cluster = ray_cluster()
        cluster.__enter__()
    try:
        with reporter.stage("tune", "Search (Bayesian, early stopping)") as stage:
            best, count = -math.inf, 0

            def on_trial(trial: TrialResult) -> None:
                nonlocal best, count
                best, count = max(best, trial.metric), count + 1
                varied = active(space, trial.params)
                measured = {"metric": trial.metric, "epochs": trial.epochs, "seconds": trial.seconds, **trial.values}
                finite = {name: value for name, value in measured.items() if math.isfinite(value)}
                run.log_trial(f"trial-{trial.number + 1}", varied, finite, ok=trial.ok)
                reached = f", best {best:.4f}" if math.isfinite(best) else ""
                stage.update(count / options.max_trials, f"{count} trials{reached}")

            budget = SearchBudget(
                num_trials=options.max_trials,
                time_s=options.budget_s,
                max_epochs=max_epochs,
                num_parallel=num_parallel,
            )
            result = search(
                objective,
                data=data,
                space=space,
                defaults=defaults,
                budget=budget,
                seed=options.seed,
                journal=journal,
                identity=identity,
                earlier=[*points, *portfolio],
                on_trial=on_trial,
                on_progress=lambda progress: stage.table(*_table(progress, space)),
            )
    finally:
        cluster.__exit__(None, None, None)
    run.log(params={f"best.{name}": result.best[name] for name in space})
    if math.isnan(result.metric):
        reporter.line(f"no trial finished an epoch within {options.budget_s:g} s; the defaults are used (see --budget)")
    else:
        run.log(metrics={"search_best": result.metric})
    for name, draw in search_figures(result.trials, space, metric="metric").items():
        run.log_figure(name, draw)
    return result


def _table(progress: Progress, space: Space) -> tuple[list[str], list[list[str]]]:
    """What runs, then the best that ended: number, state, epochs, metric, parameters."""
    rows = [
        [str(number + 1), "running", *_last(curve), *_shown(active(space, params))]
        for number, (params, curve) in progress.running.items()
    ]
    best = sorted(progress.ended, key=lambda trial: -trial.metric)[:_SHOWN_TRIALS]
    rows += [[str(one.number + 1), one.state, *_last(one.curve), *_shown(active(space, one.params))] for one in best]
    return ["trial", "", "epochs", "metric", "parameters"], rows


def _last(curve: Curve) -> list[str]:
    return [str(curve[-1][0]), f"{max(value for _, value in curve):.4f}"] if curve else ["", ""]


def _shown(params: Mapping[str, Any]) -> list[str]:
    return [", ".join(f"{name} {v:.3g}" if isinstance(v, float) else f"{name} {v}" for name, v in params.items())]


def champion_metric(
    options: RunOptions,
    registry: ModelRegistry,
    *,
    fingerprint: str,
    measure: Callable[[Path], float],
    reporter: Reporter,
) -> tuple[float | None, int | None]:
    """The champion's validation metric on the current validation rows, and its version.

    A champion that was trained on the same data with the same split is compared by its recorded metric: its
    final fit may have seen the validation rows. Any other is measured anew. One whose features the table no longer has,
    or whose trained tables are gone, cannot be.
    """
    version_number = registry.version_of(options.model_name, CHAMPION)
    if version_number is None:
        return None, None
    try:
        recorded = registry.recorded_validation(options.model_name, version_number, fingerprint)
        if recorded is not None:
            return recorded, version_number
        return measure(registry.download(options.model_name, version_number)), version_number
    except (ArtifactError, RegistryError, InputError) as error:
        reporter.line(f"champion version {version_number} cannot be compared: {error}")
        return None, version_number


def register_version(
    options: RunOptions,
    reporter: Reporter,
    run: RunLog,
    registry: ModelRegistry,
    *,
    save: Callable[[Path], None],
    signature: "ModelSignature",
    gate: GateReport,
    metrics: Mapping[str, float],
    baselines: Mapping[str, Mapping[str, float]],
) -> tuple[int, str]:
    """Register a version; it becomes champion if the gate passed, else challenger. Returns (version, alias)."""
    with reporter.stage("register", "Register in MLflow") as stage:
        run.log(metrics={f"test.{name}": value for name, value in metrics.items()})
        for baseline, values in baselines.items():
            run.log(metrics={f"{baseline}.{name}": value for name, value in values.items()})
        with tempfile.TemporaryDirectory(prefix="assay-artifact-") as scratch:
            folder = Path(scratch) / "assay-model"
            folder.mkdir()
            save(folder)
            number = registry.register(
                options.model_name,
                application=options.application,
                run_id=run.run_id,
                folder=folder,
                signature=signature,
                gate=gate,
                metrics=metrics,
                requirements=_requirements(),
            )
        if gate.passed:
            registry.promote(options.model_name, number, reason="gate passed")
            alias = CHAMPION
        else:
            registry.challenge(options.model_name, number)
            alias = CHALLENGER
        stage.update(1.0, f"{options.model_name} version {number}, {alias}")
    return number, alias


def _requirements() -> Sequence[str]:
    return [f"{name}=={version(name)}" for name in ("assay", "torch", "safetensors", "numpy", "scipy")]


def _code_version() -> str:
    """The commit of the checkout that runs, or the installed version."""
    import subprocess

    here = Path(__file__).resolve().parent
    with suppress(OSError):  # a machine without git
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return done.stdout.strip()
    return f"assay {version('assay')}"
