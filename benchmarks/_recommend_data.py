"""What the recommendation benchmarks share: the data set, everything fitted to one part of it, and a model of that."""

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_features.schema import Protocol, RecommendSchema
from assay_pipelines.console import Reporter
from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS, get_dataset
from assay_pipelines.options import RunOptions
from assay_pipelines.recommend.pipeline import Prepared, Rows
from assay_pipelines.recommend.train import Holdout, Lists, Recipe, fit_earliest, fit_holdouts, fit_sources, make_lists
from assay_platform.config import load_config
from assay_platform.models.histories import Floats, Histories
from assay_platform.models.recommender import PairRanker, RankerConfig, Recommender
from assay_platform.models.sources import Sources
from numpy.typing import NDArray


def prepare(
    name: str, new: bool = False, whole: bool = False, protocol: Protocol | None = None, sentences: bool = False
) -> Prepared:
    """The data set as `assay run recommend` sees it. new: nothing counts that a user took before. whole: whatever the
    schema says of a limit on items. protocol: instead of the schema's. sentences: an encoder reads what is said of
    items.
    """
    config = load_config()
    folder = get_dataset(name, config.paths.data)
    schema = CATALOGUE[name].schema(folder)
    assert isinstance(schema, RecommendSchema)
    if sentences:
        assert schema.items is not None
        schema = replace(schema, items=replace(schema.items, sentences=True))
    split = schema.split
    split = split if protocol is None else replace(split, protocol=protocol)
    split = replace(split, max_items=None) if whole else split
    split = replace(split, repeats=False) if new else split
    options = RunOptions(
        config=config, application="recommend", data=name, table=folder / EVENTS, schema=replace(schema, split=split),
        schema_folder=folder, model_name="recommend-bench",
    )  # fmt: skip
    return Prepared(options, Reporter())


class Fitted(NamedTuple):
    """Sources of some rows, and of each of their holdouts."""

    histories: Histories
    sources: Sources
    store_IF: Floats
    holdouts: list[Holdout]
    of_holdouts: list[Sources]

    @staticmethod
    def of(prepared: Prepared, rows: Rows, histories: Histories, recipe: Recipe, *, seed: int) -> "Fitted":
        """histories: of these rows."""
        holdouts = prepared.holdouts(rows)
        earliest = fit_earliest(holdouts, recipe, seed=seed)
        sources = fit_sources(histories, recipe, seed=seed, shared=earliest.encoders)
        of_holdouts = fit_holdouts(holdouts, recipe, earliest, seed=seed)
        return Fitted(histories, sources, prepared.item_features(rows, histories), holdouts, of_holdouts)

    def without_sequence(self) -> "Fitted":
        """The same, had there been no sequence encoder."""
        without = [replace(sources, sequence=None) for sources in self.of_holdouts]
        return self._replace(sources=replace(self.sources, sequence=None), of_holdouts=without)

    def lists(self, recipe: Recipe, config: RankerConfig, *, seed: int) -> list[Lists]:
        """What a ranker learns from."""
        return make_lists(self.holdouts, self.of_holdouts, recipe, config, seed=seed)

    def model(
        self,
        prepared: Prepared,
        recipe: Recipe,
        config: RankerConfig,
        ranker: PairRanker | None,
        diversity: float = 0.0,
    ) -> Recommender:
        """ranker: None leaves the sources' own order."""
        return Recommender(
            ranker=PairRanker(config) if ranker is None else ranker, config=config, users=prepared.users,
            items=prepared.items, histories=self.histories, sources=replace(self.sources, weights=recipe.weights),
            store_features_IF=self.store_IF, again=recipe.again, use_ranker=ranker is not None,
            diversity=diversity,
        )  # fmt: skip


@contextmanager
def recbole(prepared: Prepared, python: str) -> Iterator[Callable[..., dict[str, NDArray[Any]]]]:
    """Trains a model of RecBole: call it with the model's name, parameters, a seed and more options of `_recbole_peer`.

    python: an interpreter that has recbole.
    """
    with tempfile.TemporaryDirectory() as scratch:
        split = {
            "user": prepared.user, "item": prepared.item, "time_us": prepared.events.time_us,
            "fit": prepared.parts.fit, "validation": prepared.parts.validation, "num_users": len(prepared.users),
            "num_items": len(prepared.items), "wv_indptr": prepared.validation.indptr,
            "wv_indices": prepared.validation.indices,
        }  # fmt: skip
        np.savez(Path(scratch) / "split.npz", **split)

        def run(model: str, params: dict[str, Any], seed: int, *more: str) -> dict[str, NDArray[Any]]:
            script = Path(__file__).parent / "_recbole_peer.py"
            command = [python, "-W", "ignore", str(script), "split.npz", "out.npz", "--model", model,
                       "--params", json.dumps(params), "--seed", str(seed), "--threads",
                       str(torch.get_num_threads()), *more]  # fmt: skip
            subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
            return dict(np.load(Path(scratch) / "out.npz"))

        yield run
