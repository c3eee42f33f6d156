"""Figures of a search: how it went, which parameters mattered, which went together, and the front of several aims."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from assay_platform.tuning.proposals import distribution
from assay_platform.tuning.search import TrialResult
from assay_platform.tuning.space import Dimension, OneOf, Space, active

# What a figure needs to say something.
_FEWEST_TRIALS = 4


def search_figures(
    trials: Sequence[TrialResult], space: Space, *, metric: str, minimised: Sequence[str] = ()
) -> Mapping[str, Callable[[Path], None]]:
    """File name → what draws it; none of a search too short to say anything. Drawn by Optuna and Matplotlib."""
    useful = [trial for trial in trials if trial.ok and math.isfinite(trial.metric)]
    if len(useful) < _FEWEST_TRIALS:
        return {}
    import optuna
    from optuna.visualization import matplotlib as plots

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def study() -> optuna.Study:
        made = optuna.create_study(direction="maximize")
        for trial in useful:
            params = active(space, trial.params)
            text = {name: str(v) if isinstance(space[name], OneOf) else v for name, v in params.items()}
            distributions = {name: _named(space[name]) for name in params}
            made.add_trial(optuna.trial.create_trial(params=text, distributions=distributions, value=trial.metric))
        return made

    def saved(draw: Callable[[optuna.Study], Any]) -> Callable[[Path], None]:
        def save(path: Path) -> None:
            # Not the figure that is current, nor a window: plots of a server.
            import matplotlib.pyplot as plt

            with warnings.catch_warnings(), plt.style.context("default"):
                warnings.simplefilter("ignore")
                previous = plt.get_backend()
                plt.switch_backend("agg")
                try:
                    axes = draw(study())
                    figure = (axes if hasattr(axes, "figure") else axes.ravel()[0]).figure
                    figure.set_size_inches(10, 5)
                    figure.savefig(path, dpi=110, bbox_inches="tight")
                finally:
                    plt.close("all")
                    plt.switch_backend(previous)

        return save

    figures = {
        "search-history.png": saved(lambda s: plots.plot_optimization_history(s, target_name=metric)),
        "search-parallel.png": saved(lambda s: plots.plot_parallel_coordinate(s, target_name=metric)),
    }
    if max(trial.metric for trial in useful) > min(trial.metric for trial in useful):
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        figures["search-importance.png"] = saved(
            lambda s: plots.plot_param_importances(s, evaluator=evaluator, target_name=metric)
        )
    for name in minimised:
        figures[f"search-front-{name}.png"] = _front(useful, metric, name)
    return figures


def _front(trials: Sequence[TrialResult], metric: str, name: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        points = sorted((trial.values[name], trial.metric) for trial in trials if name in trial.values)
        best, front = -math.inf, []
        for value, reached in points:
            if reached > best:
                best = reached
                front.append((value, reached))
        figure = Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.scatter(*zip(*points, strict=True), color="#9aa5b1", label="trials")
        axes.step(
            *zip(*front, strict=True), where="post", color="#1f6feb", marker="o", label="no trial is better in both"
        )
        axes.set_xlabel(name)
        axes.set_ylabel(metric)
        axes.legend()
        figure.savefig(path, dpi=110)

    return save


def _named(dimension: Dimension) -> Any:
    """As Optuna has it, a choice by the words that its values are shown as."""
    if isinstance(dimension, OneOf):
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([str(value) for value in dimension.values])
    return distribution(dimension)
