"""The fraud pipeline from inside: no leak, attacks that see what the service would, parts that earn their place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from assay_features.schema import FraudSchema, read_schema
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.adversary import Adversary
from assay_pipelines.fraud.evaluate import auc, entity_overlap
from assay_pipelines.fraud.fit import fit_models, refit
from assay_pipelines.fraud.prepare import Prepared
from assay_pipelines.fraud.report import check_reasons, fraud_report
from assay_pipelines.fraud.train import DEFAULTS, FORM_WEIGHT, Copies, train_net
from assay_pipelines.fraud.trees import TreeRows, fit_blend, train_trees, tree_rows, with_worst_forms, worst_forms
from assay_pipelines.options import RunOptions
from assay_platform.config import Config
from assay_platform.models.encoding import EncodedRows
from assay_platform.models.fraud import FraudNet
from assay_platform.models.trees import TreeEnsemble
from assay_platform.robustness.attacks import DescentConfig, EvolutionConfig
from assay_platform.training import Checkpoint

SCHEMA = """
kind = "fraud"
[columns]
id = "transaction_id"
timestamp = "datetime"
label = "fraud"
amount = "amount"
entities = ["card_id", "store_id"]
numeric = ["amount", "lat"]
categorical = ["provider", "country"]
immutable = ["country", "card_id"]
[labels]
delay_days = 0.5
[constraints]
times = {amount = [0.8, 1.2]}
[split]
train = 0.6
validation = 0.2
"""


def prepared(config: Config, folder: Path, frame: pd.DataFrame, name: str) -> Prepared:
    table, schema_file = folder / f"{name}.csv", folder / f"{name}.toml"
    frame.to_csv(table, index=False)
    schema_file.write_text(SCHEMA)
    schema = read_schema(schema_file)
    assert isinstance(schema, FraudSchema)
    options = RunOptions(
        config=config, application="fraud", data=str(table), table=table, schema=schema, schema_folder=folder,
        model_name=name,
    )  # fmt: skip
    return Prepared(options, Reporter())


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Payments where a bad card stays bad, so that what was reported of it tells of its next ones."""
    rng = np.random.default_rng(0)
    num = 2500
    card = rng.integers(0, 60, num)
    bad = rng.random(60) < 0.2
    chance = np.where(bad[card], 0.5, 0.02)
    return pd.DataFrame({
        "transaction_id": [f"t{i}" for i in range(num)],
        "datetime": 1_700_000_000 + np.cumsum(rng.integers(60, 600, num)),
        "fraud": (rng.random(num) < chance).astype(int),
        "amount": rng.lognormal(3, 1, num).round(2),
        "card_id": [f"c{c}" for c in card],
        "store_id": [f"s{s}" for s in rng.integers(0, 20, num)],
        "provider": rng.choice(["alpha", "beta"], num),
        "country": rng.choice(["NO", "SE"], num),
        "lat": rng.normal(59, 1, num).round(3),
    })  # fmt: skip


@pytest.fixture
def data(config: Config, tmp_path: Path, frame: pd.DataFrame) -> Prepared:
    return prepared(config, tmp_path, frame, "payments")


def test_changing_the_future_changes_nothing_before_it(
    config: Config, tmp_path: Path, frame: pd.DataFrame, data: Prepared
) -> None:
    first = int(data.test[0])
    other = frame.copy()
    other.loc[first:, "fraud"] = 1 - other.loc[first:, "fraud"]
    other.loc[first:, "amount"] *= 7
    other.loc[first:, "card_id"] = "c1"
    changed = prepared(config, tmp_path, other, "changed")
    for mine, theirs in zip(data.rows.rows, changed.rows.rows, strict=True):
        assert torch.equal(torch.nan_to_num(mine[:first], nan=-1.0), torch.nan_to_num(theirs[:first], nan=-1.0))


def test_reported_frauds_are_learned_from_and_shuffled_labels_are_not(
    config: Config, tmp_path: Path, frame: pd.DataFrame, data: Prepared
) -> None:
    params = {**DEFAULTS, "width": 32, "num_experts": 4}

    def reached(table: Prepared) -> float:
        fitted = fit_models(params, table, Reporter(), seed=0)
        model = refit(fitted, params, table, Reporter(), seed=0)
        rows = slice(int(table.test[0]), int(table.test[-1]) + 1)
        return auc(table.labels[table.test], model.logits(table.rows.rows.rows(rows)))

    assert reached(data) > 0.75
    shuffled = frame.assign(fraud=np.random.default_rng(1).permutation(frame["fraud"]))
    assert 0.4 < reached(prepared(config, tmp_path, shuffled, "shuffled")) < 0.6


def test_a_row_in_its_own_clothes_is_encoded_as_in_the_table(data: Prepared) -> None:
    adversary = Adversary(data)
    rows = np.r_[data.train[-40:], data.test[:40]]
    again = adversary.encode(rows, adversary.transactions(rows))
    expected = data.rows.rows.rows(torch.from_numpy(rows))
    assert torch.equal(torch.nan_to_num(again.values_NF, nan=-1.0), torch.nan_to_num(expected.values_NF, nan=-1.0))
    assert torch.equal(again.codes_NC, expected.codes_NC)


def test_features_follow_the_clothes(data: Prepared) -> None:
    """A payment posed at another store has what is known of that store, from its past alone."""
    adversary = Adversary(data)
    name = "store_id__events__count__12h"
    place = data.numeric.index(name)
    row = data.test[5:6]
    written = adversary.transactions(row)
    written.keys[0, adversary.feasible.categorical.index("store_id")] = "s3"
    found = float(adversary.encode(row, written).values_NF[0, place])
    times, stores = data.events.time_us, data.events.keys["store_id"]
    age_s = (times[row[0]] - times) / 1e6
    span = ((age_s > 0) & (age_s <= 12 * 3600) & (stores == "s3")).sum()
    shortest = ((age_s > 0) & (age_s <= 11 * 3600) & (stores == "s3")).sum()
    assert shortest <= found <= span


def test_copies_are_of_the_frauds_alone_and_keep_what_cannot_change(data: Prepared) -> None:
    copies = Adversary(data).copies(data.train, np.random.default_rng(0))
    labels = data.labels[data.train]
    assert len(copies.rows.values_NF) == labels.sum()
    assert ((copies.of >= 0).numpy() == labels).all()
    country = data.categorical.index("country")
    own = data.data.train.rows.codes_NC[torch.from_numpy(labels), country]
    assert (copies.rows.codes_NC[:, :, country] == own[:, None]).all()
    amount = data.numeric.index("amount")
    ratio = (
        copies.rows.values_NF[:, :, amount] / data.data.train.rows.values_NF[torch.from_numpy(labels), amount][:, None]
    )
    assert (ratio > 0.799).all()
    assert (ratio < 1.201).all()
    assert ratio.std() > 0.01


def test_attacks_only_lower_scores_and_defence_keeps_more(data: Prepared) -> None:
    params = {**DEFAULTS, "width": 32, "num_experts": 4}
    fitted = fit_models(params, data, Reporter(), seed=0)
    assert fitted.robustness is not None
    assert fitted.robustness.robust_recall <= fitted.robustness.recall
    adversary = Adversary(data)
    config = EvolutionConfig(num_generations=3, population=4)
    found = adversary.attack(fitted.model, data.validation, np.random.default_rng(0), config, max_attacked=20)
    assert found.num_attacked == 20
    assert found.robust_recall <= found.recall
    along = adversary.attack(
        fitted.model, data.validation, np.random.default_rng(0), DescentConfig(num_starts=2, num_steps=3), 20
    )
    assert along.recall == found.recall
    assert along.robust_recall <= along.recall
    assert along.robust_auc < 1.0


def test_worst_forms_are_added_as_frauds(data: Prepared) -> None:
    adversary, generator = Adversary(data), np.random.default_rng(0)
    copies = adversary.copies(data.train, generator)
    rows = tree_rows(data.data)
    frauds = torch.from_numpy(rows.labels)
    lowest: list[float] = []

    def searched(trees: TreeEnsemble) -> EncodedRows:
        found = adversary.worst_forms(trees, data.train, generator)
        before = trees.logits(data.data.train.rows.rows(frauds).numbers())
        after = trees.logits(found.numbers())
        assert (after <= before + 1e-9).all()
        lowest.append(float((before - after).mean()))
        return found

    more = with_worst_forms(rows, (lambda trees: worst_forms(copies, trees), searched), seed=0)
    num_frauds = int(rows.labels.sum())
    assert len(more.numbers) == len(rows.numbers) + 2 * num_frauds
    assert more.labels[len(rows.labels) :].all()
    assert (more.weights[len(rows.labels) :] == FORM_WEIGHT).all()
    assert lowest[0] > 0.1


def test_scouts_keep_every_fraud_and_a_part_of_many_honest_rows() -> None:
    labels = np.arange(100_000) % 50 == 0
    rows = TreeRows(np.zeros((100_000, 1), np.float32), labels, np.ones(100_000, np.float32))
    thin = rows.thinned()
    assert thin.labels.sum() == 2000
    assert 20_000 < len(thin.labels) < 30_000
    assert len(thin.weights) == len(thin.labels)
    few = TreeRows(np.zeros((1000, 1), np.float32), labels[:1000], np.ones(1000, np.float32))
    assert len(few.thinned().labels) == 1000


def test_the_worst_form_is_the_one_that_the_net_finds_harmless() -> None:
    rows = EncodedRows(torch.tensor([[[3.0], [1.0]], [[0.0], [2.0]]]), torch.zeros(2, 2, 0, dtype=torch.int64))
    copies = Copies(rows, torch.tensor([0, -1, 1]))

    def net(batch: EncodedRows) -> tuple[torch.Tensor, Any]:
        return batch.values_NF[:, 0], None

    assert copies.worst(net, torch.tensor([0, 1])).values_NF.tolist() == [[1.0], [0.0]]
    found = EncodedRows(torch.tensor([[0.5], [7.0]]), torch.zeros(2, 0, dtype=torch.int64))
    more = copies.and_also([found])
    assert more.worst(net, torch.tensor([0, 1])).values_NF.tolist() == [[0.5], [0.0]]


def test_a_part_that_does_not_help_gets_next_to_no_weight() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(5000) < 0.1
    good, noise = labels * 2.0 + rng.normal(size=5000), rng.normal(size=5000)
    assert fit_blend(noise, good, labels).net < 0.1
    assert fit_blend(good, noise, labels).trees < 0.1
    both = fit_blend(good, labels * 2.0 + rng.normal(size=5000), labels)
    assert min(both.net, both.trees) > 0.2


def test_trees_are_the_same_for_the_same_seed(data: Prepared) -> None:
    rows = tree_rows(data.data)
    one, two = (train_trees(rows, seed=3, num_trees=10).trees.logits(rows.numbers) for _ in range(2))
    assert np.array_equal(one, two)


def test_overlap_of_entities_is_the_share_of_rows_whose_entity_was_seen() -> None:
    keys = np.array(["a", "b", None, "a", "c", None, "b", "b"], dtype=object)
    assert entity_overlap(keys, np.arange(4), np.arange(4, 8)) == pytest.approx(2 / 3)
    assert np.isnan(entity_overlap(keys, np.arange(4), np.array([5])))


@pytest.mark.parametrize("missing", ["entities", "amount", "categorical", "numeric"])
def test_tables_without_some_role_have_a_model_too(
    config: Config, tmp_path: Path, frame: pd.DataFrame, missing: str
) -> None:
    table = tmp_path / "payments.csv"
    frame.to_csv(table, index=False)
    schema = FraudSchema(
        timestamp="datetime", label="fraud", entities=() if missing == "entities" else ("card_id",),
        numeric=() if missing == "numeric" else ("amount", "lat"),
        categorical=() if missing == "categorical" else ("provider",),
        amount=None if missing in ("amount", "numeric") else "amount", label_delay_days=0.5,
    )  # fmt: skip
    options = RunOptions(
        config=config, application="fraud", data=str(table), table=table, schema=schema, schema_folder=tmp_path,
        model_name=f"without-{missing}",
    )  # fmt: skip
    data = Prepared(options, Reporter())
    fitted = fit_models({**DEFAULTS, "width": 16, "num_experts": 4}, data, Reporter(), seed=0)
    scores, explanation = fitted.model.explain(data.rows.rows.rows(slice(0, 50)))
    assert np.isfinite(scores.probability).all()
    total = explanation.base + explanation.contribution_NG.sum(axis=1)
    np.testing.assert_allclose(1 / (1 + np.exp(-total)), scores.probability, atol=1e-9)


def test_the_report_names_what_matters_and_finds_reasons_true(data: Prepared) -> None:
    fitted = fit_models({**DEFAULTS, "width": 32}, data, Reporter(), seed=0)
    report = fraud_report(fitted.model, data, seed=0)
    assert report.features[0][1] >= report.features[-1][1] > 0
    # Reported frauds of the card decide this table.
    assert any("card_id" in name and "__over__" in name for name, *_ in report.features[:5])
    rows_of = {(s.column, s.value): s.rows for s in report.segments}
    assert rows_of["country", "NO"] + rows_of["country", "SE"] == len(data.test)
    assert rows_of["card_id", "seen before the test period"] + rows_of.get(("card_id", "new or missing"), 0) == len(
        data.test
    )
    assert sum(s.rows for s in report.weeks) == len(data.test)
    assert report.reasons.fall > report.reasons.fall_of_others
    assert report.reasons.deletion > 0.9
    assert 0.5 < report.reasons.stability <= 1.0
    text = report.to_markdown()
    assert "| country NO |" in text
    assert "| share of reported frauds of this card_id, " in text
    assert "nan" not in text
    assert json.loads(json.dumps(report.to_dict()))["segments"]


def test_reasons_that_are_made_up_fail_the_deletion_test(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fit_models({**DEFAULTS, "width": 32}, data, Reporter(), seed=0)
    model, generator = fitted.model, np.random.default_rng(0)
    rows = data.rows.rows.rows(slice(-200, None))
    explain = model.explain

    def shuffled(asked: EncodedRows) -> Any:
        scores, explanation = explain(asked)
        return scores, explanation._replace(contribution_NG=generator.permuted(explanation.contribution_NG, axis=1))

    monkeypatch.setattr(model, "explain", shuffled)
    assert check_reasons(model, rows, generator).deletion < 0.8


def test_where_weights_are_updated_changes_nothing(data: Prepared) -> None:
    params = {**DEFAULTS, "width": 16, "num_experts": 4}
    ours, theirs = (
        train_net({**params, "update_on": place}, data.data, num_epochs=1, seed=0).net for place in ("cpu", "device")
    )
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_net_whose_training_was_killed_is_the_same_net(data: Prepared, tmp_path: Path) -> None:
    params = {**DEFAULTS, "width": 16, "num_experts": 4}

    def train(checkpoint: Checkpoint | None, killed_at: int = 0) -> FraudNet:
        def on_epoch(epoch: int, _: float) -> None:
            if epoch == killed_at:
                raise KeyboardInterrupt

        return train_net(params, data.data, num_epochs=3, seed=0, on_epoch=on_epoch, checkpoint=checkpoint).net

    kept = Checkpoint(tmp_path / "net.pt", "this")
    with pytest.raises(KeyboardInterrupt):
        train(kept, killed_at=2)
    for one, other in zip(train(kept).state_dict().values(), train(None).state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
