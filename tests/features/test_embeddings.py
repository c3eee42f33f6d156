"""Learned vectors: they carry what the label says of a value, and stand for the unseen."""

from pathlib import Path

import numpy as np
import pytest
from assay_features.embeddings import EmbeddingTable, EmbeddingTraining, train_embedding
from assay_platform.errors import ArtifactError, DataError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score


def stores(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """400 stores of which every fourth is bad; small stores are rare."""
    rng = np.random.default_rng(seed)
    code = np.minimum(rng.zipf(1.3, num_rows), 400) - 1
    store = np.array([f"s{c}" for c in code], dtype=object)
    label = rng.random(num_rows) < np.where(code % 4 == 1, 0.5, 0.05)
    return store, rng.normal(size=(num_rows, 2)), label


def test_vectors_separate_values_by_what_happened_there_later_too() -> None:
    store, context, label = stores(20_000, seed=0)
    table = train_embedding("store", store, context, label, EmbeddingTraining(width=4))
    later, _, later_label = stores(10_000, seed=1)
    fitted = LogisticRegression().fit(table.apply(store), label)
    auc = roc_auc_score(later_label, fitted.predict_proba(table.apply(later))[:, 1])
    codes = np.array([int(s[1:]) for s in later])
    best = roc_auc_score(later_label, codes % 4 == 1)
    assert auc > 0.95 * best
    assert auc > 0.7


def test_rare_unseen_and_missing_values_share_one_vector() -> None:
    store, context, label = stores(5_000, seed=0)
    store[0] = "once"
    table = train_embedding("store", store, context, label)
    vectors = table.apply(np.array(["once", "never", None, "s0"], dtype=object))
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert np.abs(vectors[0] - vectors[3]).max() > 0.01


def test_same_seed_same_table_and_a_file_keeps_it(tmp_path: Path) -> None:
    store, context, label = stores(3_000, seed=0)
    context[5, 0] = np.nan
    table, again = (train_embedding("store", store, context, label, EmbeddingTraining(num_epochs=1)) for _ in range(2))
    assert table.digest == again.digest
    loaded = EmbeddingTable.load(table.save(tmp_path))
    assert loaded.digest == table.digest
    assert loaded.definition == table.definition
    np.testing.assert_array_equal(loaded.apply(store), table.apply(store))
    other = train_embedding("store", store, context, label, EmbeddingTraining(num_epochs=1, seed=1))
    assert other.digest != table.digest


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    table = EmbeddingTable("store", ("a",), np.zeros((2, 3), dtype=np.float32))
    path = table.save(tmp_path)
    renamed = path.rename(path.with_stem("0" * 12))
    with pytest.raises(ArtifactError, match="digest"):
        EmbeddingTable.load(renamed)
    renamed.write_bytes(b"not parquet")
    with pytest.raises(ArtifactError, match="not a readable"):
        EmbeddingTable.load(renamed)


def test_what_cannot_be_learned_is_refused() -> None:
    store, context, label = stores(100, seed=0)
    with pytest.raises(DataError, match="no value occurs 1000 times"):
        train_embedding("store", store, context, label, EmbeddingTraining(min_count=1000))
    with pytest.raises(DataError, match="labels are the same"):
        train_embedding("store", store, context, np.zeros(100, dtype=bool))
