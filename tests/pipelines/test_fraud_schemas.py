"""Any table that fits the schema file: with and without entities, amount, categories or late labels; any fraud rate."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from assay_features.schema import Account, FraudSchema, Split
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.evaluate import auc
from assay_pipelines.fraud.fit import fit_models, refit
from assay_pipelines.fraud.prepare import Prepared, as_slice
from assay_pipelines.fraud.report import fraud_report
from assay_pipelines.fraud.train import DEFAULTS
from assay_pipelines.options import RunOptions
from assay_platform.config import Config, Paths
from assay_platform.errors import DataError
from assay_platform.models.calibration import sigmoid
from assay_platform.models.decisions import Costs, DecisionSettings
from assay_platform.models.fraud import FraudModel
from assay_platform.robustness.constraints import Constraints
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SMALL = {**DEFAULTS, "width": 32, "num_experts": 4, "num_blocks": 1}


def table(num_rows: int, rate: float, seed: int) -> pd.DataFrame:
    """Fraud follows the amount, a category and a few bad cards; some of everything is missing. spent: by the card."""
    rng = np.random.default_rng(seed)
    amount, score = rng.lognormal(3, 1, num_rows), rng.normal(size=num_rows)
    card, shop = rng.integers(0, 80, num_rows), rng.choice(["grocer", "casino", "web"], num_rows)
    risk = 1.2 * np.log(amount) + score + 2.0 * (shop == "casino") + 2.0 * (card < 8) + rng.logistic(size=num_rows)
    frame = pd.DataFrame({
        "time": 1_600_000_000 + np.cumsum(rng.integers(1, 900, num_rows)),
        "bad": (risk >= np.quantile(risk, 1 - rate)).astype(int),
        "amount": amount.round(2), "score": score, "card": [f"c{c}" for c in card],
        "device": [f"d{d}" for d in rng.integers(0, 300, num_rows)], "shop": shop, "country": "NO",
    })  # fmt: skip
    frame["spent"] = frame.groupby("card")["amount"].cumsum() - frame["amount"]
    for column in ("amount", "score", "device", "shop", "spent"):
        frame.loc[rng.random(num_rows) < 0.05, column] = None
    return frame


def prepared(frame: pd.DataFrame, schema: FraudSchema, folder: Path) -> Prepared:
    frame.to_parquet(folder / "table.parquet", index=False)
    options = RunOptions(
        config=Config(paths=Paths(home=folder / "home", cache=folder / "cache")), application="fraud", data="table",
        table=folder / "table.parquet", schema=schema, schema_folder=folder, model_name="own",
    )  # fmt: skip
    return Prepared(options, Reporter(), publish=False)


def check(data: Prepared, folder: Path, *, min_auc: float) -> FraudModel:
    """Fit, refit, save, read and explain."""
    fitted = fit_models(SMALL, data, Reporter(), seed=0)
    model = refit(fitted, SMALL, data, Reporter(), seed=0)
    rows = data.rows.rows.rows(as_slice(data.test))
    probability = model.score(rows).probability
    assert ((probability >= 0) & (probability <= 1)).all()
    assert auc(data.labels[data.test], probability) > min_auc
    some = rows.rows(slice(0, 40))
    _, explanation = model.explain(some)
    total = sigmoid(explanation.base + explanation.contribution_NG.sum(axis=1))
    np.testing.assert_allclose(total, probability[:40], atol=1e-5)
    model.save(folder / "model", {})
    np.testing.assert_array_equal(
        FraudModel.load(folder / "model").score(some).probability, model.score(some).probability
    )
    assert fraud_report(model, data, seed=0).to_markdown()
    return model


SCHEMAS = st.builds(
    lambda entities, amount, account, numeric, categorical, delay, constrained, decisions: FraudSchema(
        timestamp="time", label="bad", amount="amount" if amount else None, entities=tuple(entities),
        numeric=tuple(dict.fromkeys((*(["amount"] if amount else []), *(["spent"] if account else []), *numeric))),
        account=Account(total="spent", within=tuple(entities)) if amount and account else None,
        categorical=tuple(c for c in dict.fromkeys((*categorical, *entities))), label_delay_days=delay,
        constraints=Constraints(times={"amount": (0.5, 2.0)}) if constrained and amount else Constraints(),
        decisions=decisions, split=Split(train=0.6, validation=0.2),
    ),
    st.lists(st.sampled_from(["card", "device"]), unique=True),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from(["score", "amount"]), unique=True, min_size=1),
    st.lists(st.sampled_from(["shop", "country"]), unique=True),
    st.sampled_from([None, 0.0, 0.5, 3.0]),
    st.booleans(),
    st.sampled_from([
        DecisionSettings(), DecisionSettings(target_fpr=0.05, review_fpr=0.2),
        DecisionSettings(costs=Costs(declined_good=5.0, review=1.0, review_finds=0.9)),
    ]),
)  # fmt: skip


@settings(
    max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.generate],  # a smaller table that fails takes minutes to find
)  # fmt: skip
@given(SCHEMAS, st.integers(1000, 1600), st.sampled_from([0.05, 0.4]), st.integers(0, 5))
def test_any_schema_trains_scores_and_explains(schema: FraudSchema, num_rows: int, rate: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        check(prepared(table(num_rows, rate, seed), schema, folder), folder, min_auc=0.45)


def test_a_credit_application_has_no_card_and_no_second_event(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    num = 1000
    income, debt, age = rng.lognormal(10, 0.5, num), rng.lognormal(8, 1, num), rng.integers(18, 80, num)
    job = rng.choice(["clerk", "nurse", "none"], num, p=[0.5, 0.4, 0.1])
    risk = 1.5 * np.log(debt / income) + 1.5 * (job == "none") - 0.02 * age + rng.logistic(size=num)
    frame = pd.DataFrame({
        "applied": 1_600_000_000 + np.cumsum(rng.integers(1, 90_000, num)), "income": income, "debt": debt, "age": age,
        "job": job, "defaulted": (risk >= np.quantile(risk, 0.7)).astype(int),
    })  # fmt: skip
    schema = FraudSchema(
        timestamp="applied", label="defaulted", numeric=("income", "debt", "age"), categorical=("job",),
        immutable=("age",), constraints=Constraints(times={"income": (0.8, 1.2), "debt": (0.8, 1.2)}),
        decisions=DecisionSettings(target_fpr=0.1), split=Split(train=0.6, validation=0.2),
    )  # fmt: skip
    data = prepared(frame, schema, tmp_path)
    check(data, tmp_path, min_auc=0.7)


def test_one_fraud_in_a_thousand(tmp_path: Path) -> None:
    schema = FraudSchema(
        timestamp="time", label="bad", amount="amount", entities=("card",), numeric=("amount", "score"),
        categorical=("shop",), split=Split(train=0.6, validation=0.2),
    )  # fmt: skip
    data = prepared(table(40_000, 0.001, 0), schema, tmp_path)
    model = check(data, tmp_path, min_auc=0.75)
    probability = model.score(data.rows.rows.rows(as_slice(data.test))).probability
    assert 0.2 < probability.mean() / data.labels[data.test].mean() < 5


@pytest.mark.parametrize("label", [0, 1])
def test_a_part_of_one_kind_is_said(tmp_path: Path, label: int) -> None:
    frame = table(1000, 0.4, 0)
    frame.loc[len(frame) * 7 // 10 :, "bad"] = label
    schema = FraudSchema(timestamp="time", label="bad", numeric=("score",), split=Split(train=0.6, validation=0.2))
    with pytest.raises(DataError, match=r"the test part has \d+ rows of which"):
        prepared(frame, schema, tmp_path)
