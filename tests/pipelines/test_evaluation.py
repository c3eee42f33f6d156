"""Splits and metrics against obvious calculations."""

from itertools import combinations

import numpy as np
import pytest
import scipy.sparse as sp
from assay_features.schema import Split
from assay_pipelines.fraud.evaluate import expected_calibration_error, fraud_metrics, tolerated_calibration_error
from assay_pipelines.gate import check_candidate
from assay_pipelines.recommend.baseline import ease_weights, frequencies
from assay_pipelines.recommend.evaluate import Hits, best_items, interval, of_some_users, ranking_metrics
from assay_pipelines.recommend.split import split_interactions
from assay_platform.errors import DataError
from assay_platform.models.histories import Histories
from hypothesis import given, settings
from hypothesis import strategies as st

users_lists = st.lists(st.integers(0, 5), min_size=30, max_size=120)


@settings(max_examples=60, deadline=None)
@given(users_lists, st.sampled_from(["temporal", "random", "leave-last-out"]))
def test_parts_are_disjoint_complete_and_follow_the_protocol(users: list[int], protocol: str) -> None:
    codes = np.unique(users, return_inverse=True)[1].astype(np.int64)
    split = Split(train=0.6, validation=0.2, protocol=protocol)  # type: ignore[arg-type]
    parts = split_interactions(codes, split, seed=1)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(codes)))
    if protocol == "temporal":
        assert parts.fit.max() < parts.validation.min() < parts.test.min()
    if protocol == "leave-last-out":
        for user in np.unique(codes[parts.test]):
            mine = np.flatnonzero(codes == user)
            assert set(parts.test) & set(mine) == {mine[-1]}
            assert set(parts.validation) & set(mine) == {mine[-2]}
    again = split_interactions(codes, split, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_moments_part_interactions_by_time() -> None:
    day = np.repeat(np.arange(10, dtype=np.int64), 3)
    split = Split(validation_from="1970-01-06", test_from="1970-01-08T12:00:00+12:00")
    parts = split_interactions(np.arange(30) % 4, split, seed=0, time_us=day * 86_400_000_000)
    assert day[parts.fit].tolist() == [d for d in range(5) for _ in range(3)]
    assert set(day[parts.validation]) == {5, 6}
    assert set(day[parts.test]) == {7, 8, 9}


def test_too_few_interactions_for_a_split_are_refused() -> None:
    with pytest.raises(DataError, match="validation part empty"):
        split_interactions(np.zeros(3, dtype=np.int64), Split(), seed=0)


def test_ranking_metrics_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    train = sp.random(40, 50, 0.2, "csr", random_state=1)
    train.data[:] = 1
    test = sp.random(40, 50, 0.1, "csr", random_state=2)
    test.data[:] = 1
    top = np.stack([rng.permutation(50)[:20] for _ in range(40)])
    ndcg, recall = [], []
    for user in range(40):
        wanted = set(test[user].indices)
        if not wanted:
            continue
        gain = sum(1 / np.log2(rank + 2) for rank, item in enumerate(top[user][:10]) if item in wanted)
        ndcg.append(gain / sum(1 / np.log2(rank + 2) for rank in range(min(10, len(wanted)))))
        recall.append(len(wanted & set(top[user])) / len(wanted))
    metrics = ranking_metrics(top, test, train)
    assert metrics["ndcg_at_10"] == pytest.approx(np.mean(ndcg))
    assert metrics["recall_at_20"] == pytest.approx(np.mean(recall))
    assert metrics["coverage"] == pytest.approx(len({i for row in top for i in row[:10]}) / 50, abs=0.2)
    unit = (train / np.sqrt(train.power(2).sum(0))).toarray()
    cosine = unit.T @ unit
    alike = [cosine[a, b] for u in np.flatnonzero(np.diff(test.indptr)) for a, b in combinations(top[u][:10], 2)]
    assert metrics["diversity"] == pytest.approx(1 - np.mean(alike))
    first = [next((1 / (i + 1) for i, item in enumerate(top[u][:10]) if test[u, item]), 0.0) for u in range(40)]
    wanting = np.diff(test.indptr) > 0
    assert metrics["mrr_at_10"] == pytest.approx(np.mean(np.array(first)[wanting]))
    shown = np.bincount(top[wanting, :10].ravel(), minlength=50).astype(float)
    differences = np.abs(shown[:, None] - shown[None]).mean() / (2 * shown.mean())
    assert metrics["gini"] == pytest.approx(differences)
    some = np.arange(40) < 20
    assert Hits.of(top, test).of_users(some).ndcg().tolist() == Hits.of(top[:20], test[:20]).ndcg().tolist()


def test_an_interval_holds_the_mean_and_narrows_with_more_users() -> None:
    rng = np.random.default_rng(0)
    few, many = interval(rng.random(50)), interval(rng.random(5000))
    assert few[0] < 0.5 < few[1]
    assert many[0] < 0.5 < many[1]
    assert many[1] - many[0] < 0.3 * (few[1] - few[0])


def test_own_frequency_prefers_what_was_taken_often_and_lately() -> None:
    day_us = 86_400_000_000
    histories = Histories.of(
        np.zeros(4, dtype=np.int64), np.array([0, 0, 1, 2]), np.array([0, 0, 0, 90]) * day_us,
        num_users=1, now_us=100 * day_us,
    )  # fmt: skip
    assert np.argsort(-frequencies(histories, 4, 20.0).toarray()[0]).tolist()[:3] == [2, 0, 1]
    assert np.argsort(-frequencies(histories, 4, 1e6).toarray()[0], kind="stable").tolist()[0] == 0


def test_ease_never_recommends_an_item_for_itself() -> None:
    train = sp.csr_matrix(np.eye(4, dtype=np.float32))
    np.testing.assert_allclose(np.diag(ease_weights(train, 1.0)), 0.0)


def test_fraud_metrics_at_the_operating_point() -> None:
    labels = np.r_[np.ones(100, bool), np.zeros(10_000, bool)]
    scores = np.r_[np.linspace(0.9, 1.0, 50), np.full(50, 0.1), np.linspace(0.0, 0.95, 10_000)]
    metrics = fraud_metrics(scores, labels, threshold=0.9)
    assert metrics["recall_at_fpr_0.003"] == pytest.approx(0.26, abs=0.01)  # those above 0.9472, the 0.3 % point
    assert metrics["recall_at_threshold"] == pytest.approx(0.5)
    assert metrics["fpr_at_threshold"] == pytest.approx(0.0526, abs=0.001)
    assert metrics["prevalence"] == pytest.approx(100 / 10_100)


def test_calibration_error_is_zero_for_truth_and_large_for_a_lie() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(50_000)
    labels = rng.random(50_000) < probability
    assert expected_calibration_error(probability, labels) < 0.01
    assert expected_calibration_error(np.full(50_000, 0.9), labels) == pytest.approx(0.4, abs=0.01)


def test_a_small_table_may_look_uncalibrated_by_chance() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.beta(1, 20, 300), rng.beta(1, 20, 60_000)
    assert tolerated_calibration_error(few, seed=0) > 0.02
    assert tolerated_calibration_error(many, seed=0) < 0.01
    labels = rng.random(300) < few
    assert expected_calibration_error(few, labels) < tolerated_calibration_error(few, seed=0)


def gate(**changes: object) -> object:
    given_values: dict[str, object] = {
        "metric": "average_precision", "candidate": 0.5, "champion": None, "champion_version": None,
        "baselines": {"lightgbm": {"auc": 0.9}}, "expected_baselines": ("lightgbm",), "calibration_error": 0.001,
    }  # fmt: skip
    return check_candidate(**{**given_values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "passed", "text"),
    [
        ({}, True, "first version"),
        ({"champion": 0.4, "champion_version": 1}, True, "better than champion version 1"),
        ({"champion": 0.5, "champion_version": 1}, False, "not better than"),
        ({"calibration_error": 0.05}, False, "not calibrated"),
        ({"calibration_error": 0.05, "tolerated_error": 0.06}, True, "first version"),
        ({"calibration_error": float("nan")}, False, "not calibrated"),
        ({"baselines": {}}, False, "no lightgbm baseline"),
        ({"candidate": float("nan")}, False, "nan"),
        ({"recall": 0.4, "robust_recall": 0.31}, True, "first version"),
        ({"recall": 0.4, "robust_recall": 0.2}, False, "of a recall of 0.400, feasible attacks leave 0.200"),
        ({"recall": 0.0, "robust_recall": 0.0}, True, "first version"),
    ],
)
def test_the_gate(changes: dict[str, object], passed: bool, text: str) -> None:
    report = gate(**changes)
    assert report.passed is passed  # type: ignore[attr-defined]
    assert text in report.summary  # type: ignore[attr-defined]


def test_lists_of_those_who_want_something_alone() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, 25)).astype(np.float32)
    wanted = sp.csr_matrix((rng.random((30, 25)) < 0.05).astype(np.float32))
    excluded = sp.csr_matrix((rng.random((30, 25)) < 0.3).astype(np.float32))
    asked = np.flatnonzero(np.diff(wanted.indptr))
    assert 0 < len(asked) < 30
    top = best_items(lambda users: scores[users], wanted, excluded)
    left_out = np.where(excluded.toarray() > 0, -np.inf, scores)
    np.testing.assert_array_equal(top[asked, :5], np.argsort(-left_out[asked], axis=1)[:, :5])
    assert not np.delete(top, asked, axis=0).any()
    some = of_some_users(wanted, 4, seed=1)
    kept = np.flatnonzero(np.diff(some.indptr))
    assert len(kept) == 4
    assert (some[kept] != wanted[kept]).nnz == 0
    assert of_some_users(wanted, 30, seed=1) is wanted
