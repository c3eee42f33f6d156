"""AutoML: what a column is, where a table is cut, what is learned from whom, one fast model at the end."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from assay_features.schema import FraudSchema, Split, TableSchema, read_labelled_schema, read_schema
from assay_pipelines.automl import run_automl
from assay_pipelines.automl.ensemble import select
from assay_pipelines.automl.families import DEFAULT, FAMILIES, PORTFOLIO, Known, available, fit, flags, space_of
from assay_pipelines.automl.student import graduate, lightest_trees, plan, study, targets_of
from assay_pipelines.automl.table import CleanTable, cuts, kind_of, order_of, read_table
from assay_pipelines.automl.trials import Candidate, Fold, TrialData, candidates, folds_of, objective
from assay_pipelines.cli import main
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.evaluate import auc
from assay_pipelines.fraud.train import LabelledRows
from assay_pipelines.options import RunOptions
from assay_platform.config import Config
from assay_platform.errors import DataError, SchemaError
from assay_platform.models.encoding import fit_encoder
from assay_platform.models.fraud import FraudModel
from assay_platform.tuning.search import TrialResult
from assay_platform.tuning.space import check_space, contains
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer


def tumours() -> pd.DataFrame:
    """569 real tumours (Wisconsin, 1995), with a hospital that none of the numbers knows."""
    found = load_breast_cancer(as_frame=True)
    frame = found.frame.rename(columns={"target": "benign"})
    size = np.where(frame["mean radius"] > 15, "large", "small")
    return frame.assign(hospital=[f"h{n % 40}" for n in range(len(frame))], size=size, ward=np.arange(len(frame)) % 7)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "tumours.csv"
    tumours().to_csv(path, index=False)
    return path


# ---------------------------------------------------------------------- what a column is


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1.5", "2", None, "-3e2"], "numeric"),
        (["007", "012", "123"], "categorical"),
        (["red", "blue", "red"], "categorical"),
        ([True, False, True], "categorical"),
        ([1, 2, 2, 5], "numeric"),
        (["12", "unknown", "7"], "categorical"),
        ([*(str(n / 7) for n in range(300)), "broken"], "numeric"),
        ([*(n / 7 for n in range(300)), np.inf], "numeric"),
        ([date(2024, 1, day) for day in (1, 2, 3)], None),
        ([[1], [2]], None),
        ([b"a", b"b"], None),
        (["x" * 300, "y"], None),
        (["same", "same"], None),
        ([None, None], None),
        (["2024-01-01T10:00:00", "2024-01-02T11:30:00"], None),
        ([f"name {n}" for n in range(200)], None),
        (list(range(200)), None),
        (list(np.random.default_rng(0).permutation(200)), "numeric"),
    ],
)
def test_what_a_column_seems_to_be(values: list[Any], kind: str | None) -> None:
    found, reason = kind_of(pd.Series(values, name="x"))
    assert found == kind
    assert bool(reason) == (kind is None)


def read(path: Path, frame: pd.DataFrame, **columns: Any) -> CleanTable:
    frame.to_csv(path, index=False)
    return read_table(path, TableSchema(**{"label": "y", **columns}), seed=0)


def messy(num_rows: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    size = rng.lognormal(0, 1, num_rows)
    return pd.DataFrame(
        {
            "y": np.where(size + rng.normal(0, 0.5, num_rows) > 1.2, "yes", "no"),
            "size": size.round(3).astype(str),
            "copy": size.round(3).astype(str),
            "shop": rng.choice([" north", "south ", "?"], num_rows),
            "row": np.arange(num_rows),
            "nothing": "x",
            "known_later": size,
        }
    )


def test_a_messy_table_is_cleaned_and_told_about(tmp_path: Path) -> None:
    frame = messy()
    frame["known_later"] = (frame["y"] == "yes") * 3.0
    frame.loc[3, "size"] = frame.loc[3, "copy"] = "NA"
    frame.loc[5, "y"] = None
    table = read(tmp_path / "m.csv", frame, positive="yes")
    assert (table.numeric, table.categorical) == (("size", "known_later"), ("shop",))
    assert len(table.labels) == 399
    assert np.isnan(table.columns["size"]).sum() == 1
    assert set(table.columns["shop"]) == {"north", "south", None}
    told = "\n".join(table.notes)
    for words in ("copy: left out", "row: left out, it numbers", "nothing: left out, it has one value"):
        assert words in told
    for words in ("known_later: orders the labels by itself", "1 rows without a label", "taken as missing"):
        assert words in told


def test_a_column_that_is_not_what_the_schema_says_is_named_with_its_row(tmp_path: Path) -> None:
    frame = messy()
    frame.loc[7, "size"] = "large"
    with pytest.raises(DataError, match=r"column 'size', row 8: 'large'"):
        read(tmp_path / "m.csv", frame, positive="yes", numeric=("size",))


@pytest.mark.parametrize(
    ("change", "columns", "message"),
    [
        ({}, {"numeric": ("absent",)}, "no column 'absent'"),
        ({"y": ["a", "b", "c", "d"] * 100}, {"positive": "a"}, r"4 labels \(a, b, c, d\); two are allowed"),
        ({"y": ["maybe"] * 400}, {}, "'maybe' is not a label"),
        ({"y": ["+", "-"] * 200}, {"positive": "yes"}, r"is never 'yes'; it has \+, -"),
        ({"y": ["no"] * 400}, {"positive": "no"}, "only the label 1"),
        ({"y": ["yes"] + ["no"] * 399}, {"positive": "yes"}, "part has"),
    ],
)
def test_a_table_that_cannot_be_learned_from_is_refused(
    tmp_path: Path, change: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "m.csv", messy().assign(**change), **columns)


@pytest.mark.parametrize(("values", "positive"), [(["+", "-"], "-"), ([1.0, 2.0], "2"), ([True, False], "true")])
def test_a_label_is_taken_as_it_is_written(tmp_path: Path, values: list[Any], positive: str) -> None:
    frame = messy().assign(y=values * 200)
    table = read(tmp_path / "m.csv", frame, positive=positive)
    assert table.labels.mean() == 0.5


def test_columns_that_nobody_named_do_no_harm(tmp_path: Path) -> None:
    frame = messy(300).assign(
        y=[True, False] * 150, list=[[n] for n in range(300)], day=[date(2024, 1, 1 + n % 28) for n in range(300)],
        late=[np.nan] * 250 + list(range(50)), huge=[np.inf, 1.0, 2.5] * 100,
    )  # fmt: skip
    path = tmp_path / "m.parquet"
    frame.to_parquet(path)
    table = read_table(path, TableSchema(label="y", ignore=("known_later",)), seed=0)
    assert table.numeric == ("size", "late", "huge")
    told = "\n".join(table.notes)
    for words in ("list: left out", "day: left out, it holds moments", "huge: 100 values that are no finite numbers"):
        assert words in told


def test_few_different_rows_are_no_copies(tmp_path: Path) -> None:
    frame = pd.DataFrame({"kind": ["a", "b", "c"] * 200, "y": np.random.default_rng(0).integers(0, 2, 600)})
    table = read(tmp_path / "m.csv", frame)
    assert len(set(table.columns["kind"][: table.num_train]) & set(table.columns["kind"][-50:])) == 3
    assert "may be in several parts" in table.notes[-1]


def test_groups_in_time_tell_how_much_they_overlap(tmp_path: Path) -> None:
    frame = messy().assign(when=np.arange(400), who=np.arange(400) // 10)
    table = read(tmp_path / "m.csv", frame, positive="yes", timestamp="when", group="who")
    assert "0 rows learned from are later than a test row" in "\n".join(table.notes)
    late = read(
        tmp_path / "m.csv", frame.assign(who=np.arange(400) % 40), positive="yes", timestamp="when", group="who"
    )
    assert " 0 rows learned" not in "\n".join(late.notes)


def test_a_fold_without_one_class_is_left_out() -> None:
    labels = np.zeros(100, dtype=bool)
    labels[[3, 50, 90]] = True
    folds = folds_of(80, 20, in_time=False, labels=labels)
    assert [fold.held[0] for fold in folds] == [0, 40, 80]
    labels[:] = False
    labels[[3, 90]] = True
    assert [fold.held[0] for fold in folds_of(80, 20, in_time=True, labels=labels)] == [80]


def test_rows_that_say_the_same_stay_together(tmp_path: Path) -> None:
    frame = messy().drop(columns=["row", "known_later"])
    table = read(tmp_path / "m.csv", pd.concat([frame, frame, frame]), positive="yes")
    parts = np.searchsorted([table.num_train, table.num_train + table.num_validation], np.arange(1200), side="right")
    part_of = pd.Series(parts).groupby([*(pd.Series(c) for c in table.columns.values()), pd.Series(table.labels)],
                                       dropna=False)  # fmt: skip
    assert (part_of.nunique() == 1).all()


def test_the_schema_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('kind = "table"\n[columns]\nlabel = "y"\ngroup = "g"\n[split]\ntrain = 0.5\n')
    assert read_labelled_schema(path) == TableSchema(label="y", group="g", split=Split(train=0.5))
    with pytest.raises(SchemaError, match="'table' is for `assay automl`"):
        read_schema(path)
    path.write_text('kind = "table"\n[columns]\nlabel = "y"\n[constraints]\n')
    with pytest.raises(SchemaError, match=r"\[constraints\] does not belong"):
        read_labelled_schema(path)
    path.write_text('kind = "recommend"\n[columns]\nuser = "u"\nitem = "i"\ntimestamp = "t"\n')
    with pytest.raises(SchemaError, match="has no label"):
        read_labelled_schema(path)


# ---------------------------------------------------------------------- where a table is cut

groups = st.lists(st.integers(0, 12), min_size=20, max_size=120)


@given(group=groups, seed=st.integers(0, 5), timed=st.booleans())
def test_no_split_cuts_a_group(group: list[int], seed: int, timed: bool) -> None:
    rng = np.random.default_rng(seed)
    time_us = rng.integers(0, 1000, len(group)) if timed else None
    order, starts = order_of(len(group), time_us, np.array(group), seed=seed)
    assert sorted(order) == list(range(len(group)))
    split = Split(train=0.6, validation=0.2)
    train, validation = cuts(starts, split)
    ordered = np.array(group)[order]
    parts = [ordered[:train], ordered[train : train + validation], ordered[train + validation :]]
    for a in range(3):
        for b in range(a):
            assert not set(parts[a]) & set(parts[b])
    for fold in folds_of(train, validation, in_time=timed, starts=starts):
        assert not set(ordered[fold.fit]) & set(ordered[fold.held])
    if time_us is not None:
        first = pd.Series(time_us).groupby(np.array(group)).min()
        assert (np.diff(first[ordered].to_numpy()) >= 0).all()


@given(num_train=st.integers(50, 70_000), share=st.floats(0.02, 0.4))
def test_in_time_only_earlier_rows_are_learned_from(num_train: int, share: float) -> None:
    num_validation = max(1, int(share * num_train))
    folds = folds_of(num_train, num_validation, in_time=True)
    assert all(fold.fit.max() < fold.held.min() for fold in folds)
    assert folds[-1].held[-1] == num_train + num_validation - 1
    assert len(folds[-1].held) == num_validation


def test_without_time_every_row_of_a_small_table_is_held_once() -> None:
    folds = folds_of(80, 20, in_time=False)
    assert len(folds) == 5
    assert sorted(np.concatenate([fold.held for fold in folds])) == list(range(100))
    assert len(folds_of(100_000, 10_000, in_time=False)) == 1


# ---------------------------------------------------------------------- families, trials, ensemble, student


def encoded(frame: pd.DataFrame, label: str) -> tuple[Known, LabelledRows]:
    numeric = [n for n in frame.columns if frame[n].dtype != object and n != label]
    words = [n for n in frame.columns if frame[n].dtype == object]
    columns = {n: frame[n].to_numpy() for n in (*numeric, *words)}
    encoder, edges = fit_encoder(columns, numeric=numeric, categorical=words, num_bins=8, max_categories=100)
    labels = torch.from_numpy(frame[label].to_numpy(dtype=np.float32))
    return Known(encoder=encoder, edges=edges), LabelledRows(encoder.apply(columns), labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family: str) -> None:
    if family not in available():
        pytest.skip("CatBoost is not installed")
    frame = tumours().sample(frac=1.0, random_state=0)
    frame.loc[::9, "mean area"] = np.nan
    known, rows = encoded(frame, "benign")
    held = rows.take(slice(400, None))
    params = {**DEFAULT, **next((p for p in PORTFOLIO if p["family"] == family), {}), "width": 64, "cat_depth": 4}
    found = fit(params, known, rows.take(slice(0, 400)), held, seed=0, until=np.inf)
    assert auc(flags(held), found.logits) > 0.97
    assert found.size >= 1


def test_the_space_holds_its_defaults_and_its_portfolio() -> None:
    for families in (FAMILIES, tuple(f for f in FAMILIES if f != "catboost")):
        space = space_of(families)
        check_space(space, DEFAULT)
        assert all(contains(space, {**DEFAULT, **p}) == (p["family"] in families) for p in PORTFOLIO)


def test_a_trial_keeps_what_it_says_of_rows_that_it_has_not_seen(tmp_path: Path) -> None:
    known, rows = encoded(tumours().sample(frac=1.0, random_state=0), "benign")
    folds = folds_of(400, 169, in_time=False)
    data = TrialData(known=known, rows=rows, folds=folds, folder=tmp_path / "answers", fit_s=60, seed=0)
    params = {**DEFAULT, "family": "linear"}
    told: list[float] = []
    objective(params, data, lambda epoch, metric: told.append(metric))
    trials = [TrialResult(0, params, told[0], [(1, told[0])], {}, "done", 1.0),
              TrialResult(1, DEFAULT, 0.9, [(1, 0.9)], {}, "cut", 1.0)]  # fmt: skip
    found = candidates(trials, space_of(FAMILIES), data.folder, len(rows))
    assert not candidates(trials, space_of(FAMILIES), data.folder, len(rows) + 1)
    assert [one.params["family"] for one in found] == ["linear"]
    assert not np.isnan(found[0].logits).any()
    assert told[0] == pytest.approx(
        np.mean([auc(flags(rows)[f.held], found[0].logits[f.held]) for f in folds]), abs=1e-4
    )


def test_an_ensemble_takes_what_complements_and_leaves_noise() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(3000) < 0.3
    truth = 2.0 * labels
    fold = Fold(np.arange(0), np.arange(3000))
    logits = {f"f{n}": truth + rng.normal(0, 2, 3000) for n in range(3)} | {"noise": rng.normal(0, 1, 3000)}
    singles = {name: auc(labels, values) for name, values in logits.items()}
    asked = [Candidate({"family": name}, values, (1,), singles[name], 1.0) for name, values in logits.items()]
    found = select(sorted(asked, key=lambda one: -one.score), labels, [fold])
    assert found.score > max(singles.values()) + 0.02
    assert {one.params["family"] for one in found.members} == {"f0", "f1", "f2"}
    assert sum(found.weights) == pytest.approx(1.0)
    assert found.score == pytest.approx(auc(labels, found.logits))


def test_targets_mix_what_happened_with_what_was_thought() -> None:
    labels = np.array([True, False, True])
    targets = targets_of(labels, np.array([0.0, 4.0, np.nan]), share=0.5)
    assert targets == pytest.approx([0.75, 0.5 / (1 + np.exp(-4.0)), 1.0])


def test_of_equally_good_trees_the_lightest_are_grown() -> None:
    def trial(family: str, leaves: int, sizes: tuple[int, ...], score: float) -> Candidate:
        return Candidate({**DEFAULT, "family": family, "leaves": leaves}, np.zeros(1), sizes, score, 1.0)

    found = [
        trial("catboost", 7, (10,), 0.9320),
        trial("lightgbm", 63, (300, 340), 0.9310),
        trial("lightgbm", 15, (600, 640), 0.9308),
        trial("lightgbm", 12, (600, 640), 0.9306),
    ]
    assert lightest_trees(found)["leaves"] == 15
    assert lightest_trees(found[:1]) == DEFAULT


def test_a_student_with_little_time_grows_fewer_trees() -> None:
    _, rows = encoded(tumours().sample(frac=1.0, random_state=0), "benign")
    numbers, labels = rows.rows.numbers(), flags(rows)
    folds = folds_of(400, 100, in_time=False)
    studied = study(DEFAULT, numbers, labels, folds, seed=0, threads=1, seconds=60)._replace(tree_row_s=1e-6)
    targets = labels.astype(np.float64)
    whole = plan(DEFAULT, studied, targets, seconds=1e9)
    hurried = plan(DEFAULT, studied, targets, seconds=1e-6 * 1.3 * len(labels) * 10.5)
    assert (whole.is_cut, hurried.is_cut, hurried.num_trees) == (False, True, 10)
    assert hurried.rate > whole.rate
    trees = graduate(DEFAULT, numbers, targets, hurried, seed=0, threads=1, seconds=60)
    assert len(trees) == 10
    assert auc(labels, trees.logits(numbers)) > 0.97
    stopped = graduate(DEFAULT, numbers, targets, whole, seed=0, threads=1, seconds=0.0)
    assert len(stopped) < 10
    # What it gives is measured with as many trees and the same steps.
    seen = study(DEFAULT, numbers, labels, folds, seed=0, threads=1, seconds=60, planned=hurried)
    assert seen.num_trees == 10
    assert 0.9 < seen.score <= studied.score + 0.01


# ---------------------------------------------------------------------- the whole way


@pytest.mark.ray
def test_a_table_becomes_a_registered_model_with_a_card(
    table: Path, tmp_path: Path, ray_session: str, config: Config, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import mlflow

    monkeypatch.setenv("ASSAY_HOME", str(config.paths.home))
    schema, card = tmp_path / "t.toml", tmp_path / "card.md"
    schema.write_text('kind = "table"\n[columns]\nlabel = "benign"\ngroup = "hospital"\n')
    call = ["automl", str(table), "--schema", str(schema), "--budget", "90", "--trials", "3", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*call, "--card", str(card), "--search", "night"])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["model"] == {"name": "table-tumours", "version": 1, "alias": "champion"}
    assert report["metrics"]["auc"] > 0.97
    assert report["timings_s"]["total"] < 90
    told = card.read_text()
    for words in ("one `hospital` together", "| lightgbm |", "Where not to trust it", "95 % of resamples"):
        assert words in told
    mlflow.set_tracking_uri(config.tracking_uri)
    model = mlflow.pyfunc.load_model("models:/table-tumours@champion")
    frame = pd.read_csv(table)
    scores = model.predict(frame.drop(columns=["benign", "hospital"]))
    assert auc(frame["benign"].to_numpy() == 1, scores) > 0.97
    # Types are the table's, not those that MLflow would have guessed.
    written = frame.astype({"mean area": int}).assign(size=frame["size"].map(" {} ".format))
    assert np.abs(model.predict(written) - scores).max() < 0.2
    # The same command goes on with what it has: no trial is left to run.
    with pytest.raises(SystemExit) as ended:
        main([*call, "--search", "night"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"]["version"] == 2


@pytest.mark.ray
def test_events_become_a_model_that_the_service_takes(
    config: Config, tmp_path: Path, ray_session: str, fraud_files: tuple[Path, Path]
) -> None:
    from assay_features.feast.repository import FeatureRepository
    from assay_pipelines.tracking import open_registry
    from assay_services.fraud import FraudScorer

    path, schema_file = fraud_files
    schema = read_labelled_schema(schema_file)
    assert isinstance(schema, FraudSchema)
    options = RunOptions(
        config=config, application="fraud", data=str(path), table=path, schema=schema, schema_folder=tmp_path,
        model_name="fraud-own", budget_s=90.0, max_trials=1,
    )  # fmt: skip
    report, card = run_automl(options, Reporter())
    assert report.metrics["auc"] > 0.7
    assert "Split by time" in card
    folder = open_registry(config).download("fraud-own", report.version)
    model = FraudModel.load(folder)
    assert model.parts.net is None
    repository = FeatureRepository(options.feature_repository)
    scorer = FraudScorer.load(folder, repository)
    event = {"transaction_id": "new", "datetime": 1_710_000_000, "amount": 500.0, "card_id": "c1", "store_id": "s1",
             "provider": "gamma", "country": "NO", "lat": 59.0}  # fmt: skip
    (score,) = scorer.score([event], explain=True)
    assert 0 < score.score < 1
    assert score.reasons
    repository.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv", "--schema", "s.toml"], "neither a file nor a data set"),
        (["t.csv"], "--schema FILE.toml is needed"),
        (["t.csv", "--schema", "s.toml", "--trials", "0"], "--trials is 0"),
        (["t.csv", "--schema", "s.toml", "--plan", "p.json"], "has none"),
        (["t.csv", "--schema", "s.toml", "--search", "a/b"], "use letters"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    Path("t.csv").write_text("y,x\n1,2\n")
    Path("s.toml").write_text('kind = "table"\n[columns]\nlabel = "y"\n')
    with pytest.raises(SystemExit) as ended:
        main(["automl", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
