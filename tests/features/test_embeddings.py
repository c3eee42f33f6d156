"""Learned vectors: they carry what the label says of a value, know nothing of later rows, and stand for the unseen."""

from pathlib import Path

import numpy as np
import pytest
from assay_features.definitions import Embedding, FeaturePlan
from assay_features.embedding_training import EmbeddingTraining, train_embedding
from assay_features.embeddings import EmbeddingTable, load_tables, table_path
from assay_platform.errors import ArtifactError, ConfigError, DataError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

QUICK = EmbeddingTraining(num_epochs=1, num_blocks=2, num_block_epochs=1)


def stores(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """400 stores of which every fourth is bad; small stores are rare. An event a second."""
    rng = np.random.default_rng(seed)
    code = np.minimum(rng.zipf(1.3, num_rows), 400) - 1
    store = np.array([f"s{c}" for c in code], dtype=object)
    label = rng.random(num_rows) < np.where(code % 4 == 1, 0.5, 0.05)
    return store, np.arange(num_rows) * 1_000_000, rng.normal(size=(num_rows, 2)), label


def test_vectors_separate_values_by_what_happened_there_later_too() -> None:
    store, time_us, context, label = stores(20_000, seed=0)
    table = train_embedding("store", store, time_us, context, label, EmbeddingTraining(width=4))
    later, _, _, later_label = stores(10_000, seed=1)
    fitted = LogisticRegression().fit(table.apply(store, time_us), label)
    vectors = table.apply(later, np.full(10_000, 2 * time_us[-1]))
    auc = roc_auc_score(later_label, fitted.predict_proba(vectors)[:, 1])
    codes = np.array([int(s[1:]) for s in later])
    best = roc_auc_score(later_label, codes % 4 == 1)
    assert auc > 0.95 * best
    assert auc > 0.7


def test_labels_that_say_nothing_teach_a_model_nothing() -> None:
    """300 values of 20 rows each, labels at random: vectors that knew their own rows would seem to separate them."""
    rng = np.random.default_rng(0)
    keys = rng.permutation(np.repeat([f"s{i}" for i in range(300)], 20)).astype(object)
    time_us, label = np.arange(6000), rng.random(6000) < 0.2
    table = train_embedding("store", keys, time_us, np.empty((6000, 0)), label)

    def auc(vectors: np.ndarray) -> float:
        return float(roc_auc_score(label, LogisticRegression().fit(vectors, label).decision_function(vectors)))

    assert auc(table.apply(keys, np.full(6000, 6000))) > 0.6
    assert auc(table.apply(keys, time_us)) < 0.54


def test_an_event_is_given_what_was_learned_from_strictly_earlier_ones() -> None:
    table = EmbeddingTable("store", ("a",), np.arange(6, dtype=np.float32).reshape(3, 2, 1), np.array([10, 20, 30]))
    moments = np.array([0, 10, 19, 20, 30, 99])
    np.testing.assert_array_equal(table.apply(["a"] * 6, moments)[:, 0], [0, 0, 0, 2, 4, 4])
    np.testing.assert_array_equal(table.apply(["b"] * 6, moments)[:, 0], [1, 1, 1, 3, 5, 5])
    store, time_us, context, label = stores(4000, seed=0)
    time_us = time_us // 50_000_000  # many events of one instant
    trained = train_embedding("store", store, time_us, context, label, QUICK)
    assert trained.since_us.tolist() == [0, time_us[2000], time_us[-1] + 1]
    assert trained.learned_until_us == time_us[-1]
    first = trained.apply(store, time_us)[time_us < time_us[2000]]
    assert (first == first[0]).all(), "nothing is earlier than the first block"


def test_rare_unseen_and_missing_values_share_one_vector() -> None:
    store, time_us, context, label = stores(5_000, seed=0)
    store[0] = "once"
    table = train_embedding("store", store, time_us, context, label)
    vectors = table.apply(np.array(["once", "never", None, "s1"], dtype=object), np.full(4, time_us[-1] + 1))
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert np.abs(vectors[0] - vectors[3]).max() > 0.01
    assert table.apply([], np.empty(0, dtype=np.int64)).shape == (0, 8)


def test_same_seed_same_table_and_a_file_keeps_it(tmp_path: Path) -> None:
    store, time_us, context, label = stores(3_000, seed=0)
    context[5, 0] = np.nan
    table, again = (train_embedding("store", store, time_us, context, label, QUICK) for _ in range(2))
    assert table.digest == again.digest
    path = table.save(tmp_path)
    assert path == table_path(tmp_path, table.digest)
    loaded = load_tables(tmp_path, FeaturePlan((table.definition,)))[table.digest]
    assert loaded.digest == table.digest
    assert loaded.definition == table.definition == Embedding(column="store", width=8, table=table.digest)
    np.testing.assert_array_equal(loaded.apply(store, time_us), table.apply(store, time_us))
    other = train_embedding("store", store, time_us, context, label, EmbeddingTraining(num_epochs=1, seed=1))
    assert other.digest != table.digest


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    table = EmbeddingTable("store", ("a",), np.zeros((1, 2, 3), dtype=np.float32), np.zeros(1, dtype=np.int64))
    path = table.save(tmp_path)
    renamed = path.rename(path.with_stem("0" * 12))
    with pytest.raises(ArtifactError, match="digest"):
        EmbeddingTable.load(renamed)
    renamed.write_bytes(b"not parquet")
    with pytest.raises(ArtifactError, match="not a readable"):
        EmbeddingTable.load(renamed)
    with pytest.raises(ArtifactError, match="not a readable"):
        EmbeddingTable.load(path)


def test_what_cannot_be_learned_is_refused() -> None:
    store, time_us, context, label = stores(100, seed=0)
    with pytest.raises(DataError, match="no value occurs 1000 times"):
        train_embedding("store", store, time_us, context, label, EmbeddingTraining(min_count=1000))
    with pytest.raises(DataError, match="no value occurs 10 times; the commonest does 0"):
        train_embedding("store", np.full(100, None, dtype=object), time_us, context, label)
    with pytest.raises(DataError, match="labels are the same"):
        train_embedding("store", store, time_us, context, np.zeros(100, dtype=bool))
    for wrong in ({"width": 0}, {"min_count": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is"):
            EmbeddingTraining(**wrong)
