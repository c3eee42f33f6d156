"""Where a search looks next, from all that it knows so far.

    GaussianProcess   points spread evenly, then the best by a model; dimensions that are not there have their defaults
    Parzen            trees of Parzen estimators, which model what hangs on a choice for that choice alone
    AtRandom          the baseline of all others
    Grid              four steps of each number, all of each choice, in random order

The two models are Optuna's: its Gaussian process has a Matern kernel with a length scale for each dimension and
proposes by logarithmic expected improvement; where it proposes a point once more, as it does on plateaus, a step away
from the best point is taken instead. They are given what they model best: metrics below the median are
squeezed, so that a training that diverged does not flatten the differences among good ones; a trial that still runs
counts as an ordinary one, so that the next is another.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from assay_platform.tuning.space import Dimension, OneOf, Real, Space, active, from_unit, is_there, to_unit

if TYPE_CHECKING:
    import optuna

_NUM_SPREAD = 5  # points before there is a model, the default among them
_GRID_STEPS = 4
# Of a dimension: how close points are that tell the same, and a step away from such; how many are made, each longer.
_ALIKE, _STEP, _ATTEMPTS = 0.01, 0.15, 10

Point = Mapping[str, Any]
# A point and what it came to: the metric, which should be high, then what should be low.
Known = tuple[Point, Sequence[float]]


class Proposals(Protocol):
    """The same point for the same seed, calls and knowledge."""

    def next(self, known: Sequence[Known], running: Sequence[Point], number: int) -> dict[str, Any] | None:
        """The dimensions that are there of a point to try. number: how many points were tried before, however they
        ended. None: nothing is left.
        """


class GaussianProcess:
    """See above."""

    def __init__(self, space: Space, defaults: Point, seed: int) -> None:
        from optuna.samplers import GPSampler
        from scipy.stats import qmc

        self._space, self._defaults, self._seed = space, {name: defaults[name] for name in space}, seed
        self._sampler = GPSampler(seed=seed, n_startup_trials=0)
        self._spread = qmc.Sobol(len(space), rng=np.random.default_rng(seed)).random(8)

    def next(self, known: Sequence[Known], running: Sequence[Point], number: int) -> dict[str, Any] | None:
        """See `Proposals`."""
        if not known or len(known) + len(running) < _NUM_SPREAD:
            shares = self._spread[number % len(self._spread)].tolist()
            point = {name: from_unit(d, share) for (name, d), share in zip(self._space.items(), shares, strict=True)}
            return active(self._space, point)
        study = _study(self._sampler, self._space, known, running, lambda point: {**self._defaults, **point})
        found = study.ask({name: distribution(dimension) for name, dimension in self._space.items()}).params
        point = active(self._space, {name: _decoded(d, found[name]) for name, d in self._space.items()})
        best, generator = max(known, key=lambda one: one[1][0])[0], np.random.default_rng([self._seed, number])
        tried = [*(other for other, _ in known), *running]
        for attempt in range(_ATTEMPTS):
            if not any(self._alike(point, other) for other in tried):
                break
            point = self._near(best, _STEP * (1 + attempt), generator)
        return point

    def _alike(self, point: Point, other: Point) -> bool:
        """Whether another trial would tell nothing new."""
        return point.keys() == other.keys() and all(
            abs(to_unit(self._space[name], value) - to_unit(self._space[name], other[name])) < _ALIKE
            for name, value in point.items()
        )

    def _near(self, point: Point, step: float, generator: np.random.Generator) -> dict[str, Any]:
        """A step away from a point in about half of its dimensions, one at least."""
        moved = generator.random(len(self._space)) < 0.5
        moved[generator.integers(len(self._space))] = True
        found = {**self._defaults, **point}
        for (name, dimension), moves in zip(self._space.items(), moved.tolist(), strict=True):
            if moves and isinstance(dimension, OneOf):
                found[name] = from_unit(dimension, float(generator.random()))
            elif moves:
                share = to_unit(dimension, found[name]) + step * float(generator.standard_normal())
                found[name] = from_unit(dimension, min(max(share, 0.0), 1.0 - 1e-9))
        return active(self._space, found)


class Parzen:
    """See above."""

    def __init__(self, space: Space, seed: int) -> None:
        from optuna.samplers import TPESampler

        self._space = space
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `group` may change between versions of Optuna, which are pinned
            self._sampler = TPESampler(seed=seed, multivariate=True, group=True)

    def next(self, known: Sequence[Known], running: Sequence[Point], number: int) -> dict[str, Any] | None:
        """See `Proposals`."""
        trial = _study(self._sampler, self._space, known, running, dict).ask()
        found: dict[str, Any] = {}
        for name, dimension in self._space.items():
            if is_there(dimension, found):
                found[name] = _suggested(trial, name, dimension)
        return found


class AtRandom:
    """See above."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def next(self, known: Sequence[Known], running: Sequence[Point], number: int) -> dict[str, Any] | None:
        """See `Proposals`."""
        shares = np.random.default_rng([self._seed, number]).random(len(self._space)).tolist()
        point = {name: from_unit(d, share) for (name, d), share in zip(self._space.items(), shares, strict=True)}
        return active(self._space, point)


class Grid:
    """See above."""

    def __init__(self, space: Space, seed: int) -> None:
        points: list[dict[str, Any]] = [{}]
        for name, dimension in space.items():
            points = [
                {**point, **({name: value} if is_there(dimension, point) else {})}
                for point in points
                for value in (_steps(dimension) if is_there(dimension, point) else [None])
            ]
        self._points = [points[at] for at in np.random.default_rng(seed).permutation(len(points))]

    def next(self, known: Sequence[Known], running: Sequence[Point], number: int) -> dict[str, Any] | None:
        """See `Proposals`."""
        tried = [dict(point) for point in (*(point for point, _ in known), *running)]
        return next((point for point in self._points if point not in tried), None)


def _steps(dimension: Dimension) -> list[Any]:
    if isinstance(dimension, OneOf):
        return list(dimension.values)
    spaced = np.geomspace if dimension.log else np.linspace
    found: list[float] = spaced(dimension.low, dimension.high, _GRID_STEPS).clip(dimension.low, dimension.high).tolist()
    return found if isinstance(dimension, Real) else sorted({round(value) for value in found})


def _study(
    sampler: "optuna.samplers.BaseSampler",
    space: Space,
    known: Sequence[Known],
    running: Sequence[Point],
    completed: Callable[[Point], dict[str, Any]],
) -> "optuna.Study":
    """What Optuna is told. completed: a point with all dimensions that its sampler is to see."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    num_aims = len(known[0][1]) if known else 1
    study = optuna.create_study(directions=["maximize"] * num_aims, sampler=sampler)
    if not known:
        return study
    high = np.array([(values[0], *(-value for value in values[1:])) for _, values in known], dtype=np.float64)
    squeezed = np.stack([_squeezed(column) for column in high.T], axis=1)
    told = [*squeezed, *[np.median(squeezed, axis=0)] * len(running)]
    for point, values in zip((*(point for point, _ in known), *running), told, strict=True):
        params = completed(point)
        study.add_trial(
            optuna.trial.create_trial(
                params={name: _coded(space[name], value) for name, value in params.items()},
                distributions={name: distribution(space[name]) for name in params},
                values=values.tolist(),
            )
        )
    return study


def _squeezed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Best 1, median 0, and logarithmic below that."""
    middle = np.median(values)
    z = (values - middle) / max(1e-12, float(values.max() - middle))
    return np.where(z < 0, -np.log1p(np.maximum(-z, 0.0)), z)


def _suggested(trial: "optuna.Trial", name: str, dimension: Dimension) -> Any:
    if isinstance(dimension, OneOf):
        return _decoded(dimension, trial.suggest_categorical(name, _codes(dimension)))
    if isinstance(dimension, Real):
        return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
    return trial.suggest_int(name, dimension.low, dimension.high, log=dimension.log)


def distribution(dimension: Dimension) -> Any:
    """A dimension as Optuna has it; a choice by its places."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, OneOf):
        return CategoricalDistribution(_codes(dimension))
    if isinstance(dimension, Real):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(dimension.low, dimension.high, log=dimension.log)


def _codes(dimension: OneOf) -> list[Any]:
    """What Optuna can hold of a choice: places, as values may be anything."""
    return list(range(len(dimension.values)))


def _coded(dimension: Dimension, value: Any) -> Any:
    return dimension.values.index(value) if isinstance(dimension, OneOf) else value


def _decoded(dimension: Dimension, code: Any) -> Any:
    return dimension.values[code] if isinstance(dimension, OneOf) else code
