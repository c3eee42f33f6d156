"""A search as a run does it: in MLflow, under a name, from what was best before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from assay_features.schema import RecommendSchema
from assay_pipelines.console import Reporter
from assay_pipelines.options import RunOptions
from assay_pipelines.tracking import run_search, tracked_run
from assay_platform.config import Config
from assay_platform.tracking.client import open_client
from assay_platform.tuning.search import Report, SearchResult
from assay_platform.tuning.space import OneOf, Real, Space

pytestmark = pytest.mark.ray
SPACE: Space = {"x": Real(low=0.0, high=1.0), "c": OneOf(("a", "b"))}
DEFAULTS = {"x": 0.9, "c": "a"}


def bowl(params: dict[str, Any], data: None, report: Report) -> None:
    report(1, 1.0 - (params["x"] - 0.3) ** 2)


@pytest.fixture
def options(config: Config, tmp_path: Path) -> RunOptions:
    return RunOptions(
        config=config, application="recommend",
        data="own", table=tmp_path / "events.csv", schema=RecommendSchema(user="user", item="item", timestamp="time"),
        schema_folder=tmp_path, model_name="recommend-own", budget_s=120.0, max_trials=5,
    )  # fmt: skip


def searched(options: RunOptions, *, num_rows: int = 1000) -> tuple[SearchResult, str]:
    with tracked_run(options, Reporter(), fingerprint="f", plan_version="p", num_rows=num_rows) as run:
        found = run_search(
            options, Reporter(), run, objective=bowl, data=None, space=SPACE, defaults=DEFAULTS, max_epochs=1
        )
    return found, run.run_id


def test_a_search_is_in_mlflow_with_its_trials_and_figures(
    options: RunOptions, ray_session: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, run_id = searched(options)
    assert "new study" not in capsys.readouterr().err
    client = open_client(options.config.tracking_uri)
    run = client.get_run(run_id)
    assert float(run.data.params["best.x"]) == found.best["x"]
    assert run.data.metrics["search_best"] == found.metric
    names = {file.path for file in client.list_artifacts(run_id)}
    assert names >= {"search-history.png", "search-parallel.png", "search-importance.png"}
    children = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    assert sorted(child.data.metrics["metric"] for child in children) == sorted(t.metric for t in found.trials)


def test_the_next_search_tries_what_was_best_before(
    options: RunOptions, ray_session: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = searched(options)
    capsys.readouterr()
    second, _ = searched(options, num_rows=1500)
    assert "the best of 1 earlier searches are tried first" in capsys.readouterr().err
    tried = [(trial.params["x"], trial.params["c"]) for trial in sorted(second.trials)[:2]]
    assert tried == [(0.9, "a"), (first.best["x"], first.best["c"])]
    assert second.metric >= first.metric
    other = replace(options, application="fraud")
    searched(other)
    assert "earlier" not in capsys.readouterr().err


def test_a_named_search_goes_on_where_it_stopped(options: RunOptions, ray_session: str) -> None:
    named = replace(options, search_name="night", max_trials=3)
    first, _ = searched(named)
    assert (options.config.paths.searches / "recommend-own-night.log").is_file()
    more, _ = searched(replace(named, max_trials=5))
    assert [trial.params for trial in more.trials[:3]] == [trial.params for trial in first.trials]
    assert len(more.trials) == 5


def test_a_run_of_a_name_searches_once_until_it_is_done(options: RunOptions) -> None:
    searches: list[int] = []

    def search() -> dict[str, Any]:
        searches.append(1)
        return {"width": 64 + len(searches)}

    assert [options.searched("this", search)["width"] for _ in range(2)] == [65, 66]  # it has no name
    named = replace(options, search_name="night")
    assert [named.searched("this", search)["width"] for _ in range(2)] == [67, 67]
    assert named.searched("other data", search)["width"] == 68
    named.forget_checkpoints()
    assert named.searched("other data", search)["width"] == 69
