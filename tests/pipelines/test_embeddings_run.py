"""`assay features embed`, and a model that is trained, compared and served with what it made."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from assay_features.batch import features_at
from assay_features.definitions import Ratio, Window
from assay_features.embeddings import EmbeddingTable, load_tables, table_path
from assay_features.feast.repository import FeatureRepository
from assay_features.row_features import model_columns
from assay_features.schema import read_schema
from assay_pipelines.cli import main
from assay_pipelines.console import Reporter
from assay_pipelines.datasets.table import load_table
from assay_pipelines.features import read_plan
from assay_pipelines.options import RunOptions
from assay_pipelines.tracking import open_registry
from assay_pipelines.wiring import run_application
from assay_platform.config import Config, load_config
from assay_platform.models.fraud import FraudModel
from assay_services.fraud import FraudScorer


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    return load_config()


def embed(
    capsys: pytest.CaptureFixture[str], files: tuple[Path, Path], *more: str, column: str = "store_id"
) -> tuple[int, str, str]:
    given = ("--data", str(files[0]), "--schema", str(files[1]), "--column", column)
    return run(capsys, "features", "embed", "fraud", *given, *more)


def test_embed_trains_on_the_training_period_and_writes_a_plan(
    home: Config, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    code, said, err = embed(capsys, fraud_files, "--width", "3", "--out", str(out))
    assert code == 0, err
    assert "30 of 30 values have a vector of their own, learned from 2,100 rows" in said
    (first,) = read_plan(out).embeddings
    assert f"Embedding(column='store_id', width=3, table='{first.table}')" in said
    table = EmbeddingTable.load(table_path(home.paths.feature_repositories / "fraud-payments", first.table))
    times = load_table(fraud_files[0], read_schema(fraud_files[1])).events.time_us
    assert table.learned_until_us == times[2099]

    more = ("--plan", str(out), "--out", str(out))
    assert embed(capsys, fraud_files, *more, "--min-count", "12", column="card_id")[0] == 0
    assert embed(capsys, fraud_files, *more, "--width", "3", "--seed", "1")[0] == 0
    card, again = read_plan(out).embeddings
    assert card.column == "card_id"
    assert again.column == "store_id"
    assert again.table != first.table, "another seed gives other vectors, which take the place of the first"


def test_embed_says_what_is_wrong(
    home: Config, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for column, more, message in (
        ("colour", (), "'colour' is no entity or categorical column of the schema; allowed are card_id, store_id"),
        ("amount", (), "'amount' is no entity or categorical column"),
        ("store_id", ("--width", "0"), "width is 0; it must be at least 1"),
        ("store_id", ("--min-count", "900"), "no value occurs 900 times"),
    ):
        code, _, err = embed(capsys, fraud_files, *more, column=column)
        assert code == 2
        assert message in err.splitlines()[-1]
    code, _, err = run(capsys, "features", "embed", "recommend", "--data", "movielens-100k", "--column", "user_id")
    assert code == 2
    assert "'recommend': vectors are learned from labels, which only fraud has" in err


def test_a_plan_that_cannot_be_run_is_refused_before_any_work(
    home: Config, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table, schema = map(str, fraud_files)
    plan = tmp_path / "plan.json"
    assert embed(capsys, fraud_files, "--out", str(plan))[0] == 0
    (trained,) = (d for d in json.loads(plan.read_text())["definitions"] if d["kind"] == "Embedding")
    for definition, message in (
        ({**trained, "table": "0" * 12}, "fraud-payments has no such table"),
        ({**trained, "width": 5}, "its table is Embedding(column='store_id', width=8"),
        (
            {**trained, "column": "colour"},
            "no entity, categorical or numeric column 'colour'; it has card_id, store_id",
        ),
        ({"kind": "Decay", "entity": "device", "half_life_s": 60}, "no entity, categorical or numeric column 'device'"),
        ({"kind": "Latest", "entity": "card_id", "column": "weight"}, "no numeric column 'weight'; it has amount, lat"),
        ({"kind": "Ratio", "numerator": "amount", "denominator": "colour"}, "'colour' is neither a column"),
    ):
        plan.write_text(json.dumps({"definitions": [definition]}))
        for command in ("run", "tune"):
            code, _, err = run(capsys, command, "fraud", "--data", table, "--schema", schema, "--plan", str(plan))
            assert code == 2
            assert message in err.splitlines()[-1]
            assert "Read and check" not in err
    code, _, err = run(capsys, "run", "recommend", "--data", "movielens-100k", "--plan", str(plan))
    assert code == 2
    assert "--plan is for fraud" in err

    # The same table with a shorter training period: the vectors know labels of what would be its validation.
    plan.write_text(json.dumps({"definitions": [trained]}))
    fraud_files[1].write_text(fraud_files[1].read_text().replace("train = 0.7", "train = 0.6"))
    code, _, err = run(capsys, "run", "fraud", "--data", table, "--schema", schema, "--plan", str(plan))
    assert code == 2
    assert "was learned from events up to" in err


@pytest.mark.ray
def test_a_model_with_embeddings_scores_online_as_in_batch_and_is_compared_when_retrained(
    home: Config, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], ray_session: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    assert embed(capsys, fraud_files, "--out", str(file))[0] == 0
    table, schema_file = fraud_files
    schema, plan = read_schema(schema_file), read_plan(file)
    plan = replace(plan, definitions=(
        *plan.definitions,
        Window(entity=("card_id", "store_id"), aggregate="distinct", column="provider", length_s=86_400),
        Ratio(numerator="amount", denominator="card_id__amount__mean__30d"),
    ))  # fmt: skip
    options = RunOptions(
        config=home, application="fraud", data=str(table), table=table, schema=schema, schema_folder=tmp_path,
        model_name="fraud-payments", budget_s=15, max_trials=1, plan=plan,
    )  # fmt: skip
    report = run_application(options, Reporter())
    assert report.alias == "champion", report.gate

    registry = open_registry(home)
    folder = registry.download("fraud-payments", report.version)
    repository = FeatureRepository(options.feature_repository)
    scorer, model = FraudScorer.load(folder, repository), FraudModel.load(folder)
    assert {"store_id__embedding__0", "amount__over__card_id__amount__mean__30d"} <= set(model.feature_names)
    newest = pd.read_csv(table).iloc[-1]
    later: list[dict[str, Any]] = [
        {**newest, "transaction_id": f"new{i}", "datetime": int(newest["datetime"]) + 60 + i, "store_id": store}
        for i, store in enumerate(("s1", "s2", "s29", "never seen", None))
    ]
    later = [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in later]
    online = scorer.score(later, explain=True)
    for score in online:
        log_odds = (score.base or 0.0) + sum(reason.contribution for reason in score.reasons)
        assert 1 / (1 + np.exp(-log_odds)) == pytest.approx(score.score, abs=1e-6)
        assert not [reason for reason in score.reasons if "embedding__" in reason.feature]
    repository.close()

    both = tmp_path / "both.csv"
    pd.concat([pd.read_csv(table), pd.DataFrame(later)]).to_csv(both, index=False)
    events = load_table(both, schema).events
    newest_rows = events.take(slice(len(events) - 5, None))
    past = events.take(slice(0, len(events) - 5))
    tables = load_tables(options.feature_repository, plan)
    columns = model_columns(plan, newest_rows, features_at(plan, past, newest_rows), tables)
    batch = model.score(model.encode(columns)).probability
    np.testing.assert_allclose([score.score for score in online], batch, atol=1e-6)
    vectors = np.column_stack([columns[f"store_id__embedding__{i}"] for i in range(8)])
    np.testing.assert_array_equal(vectors[3], vectors[4])
    assert np.abs(vectors[0] - vectors[3]).max() > 1e-4

    # Other rows, so the champion is measured anew, with its own plan and tables.
    anew = replace(options, plan=None, max_rows=2500, seed=7)
    assert f"champion version {report.version}" in run_application(anew, Reporter()).gate
