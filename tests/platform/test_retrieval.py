"""The index of items against products of everything with everything."""

import numpy as np
import pytest
from assay_platform.models import retrieval
from assay_platform.models.retrieval import ItemIndex


def vectors(num: int, width: int = 16, seed: int = 0) -> np.ndarray:
    """Around a hundred centres, as vectors of items are."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(100, width))[rng.integers(0, 100, num)] + 0.6 * rng.normal(size=(num, width))).astype("f4")


def exact(queries: np.ndarray, stored: np.ndarray, num: int, allowed: np.ndarray | None = None) -> np.ndarray:
    products = queries @ stored.T
    if allowed is not None:
        products[:, ~allowed] = -np.inf
    return np.argsort(-products, axis=1)[:, :num]


@pytest.fixture(params=[10**6, 1_000], ids=["exact", "inverted file"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(retrieval, "EXACT", request.param)
    return int(request.param)


def recall(found: np.ndarray, best: np.ndarray) -> float:
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)]))


def test_the_best_are_found_whatever_their_numbers(limit: int) -> None:
    stored, queries = vectors(6_000), vectors(50, seed=1)
    numbers = np.arange(6_000) * 3 + 7
    index = ItemIndex(numbers, stored)
    assert (index.cells_looked_into is None) == (limit > 6_000)
    found, score = index.search(queries, 50)
    assert recall(found, numbers[exact(queries, stored, 50)]) >= (1.0 if limit > 6_000 else 0.95)
    np.testing.assert_allclose(score[0], (stored[(found[0] - 7) // 3] @ queries[0]), rtol=1e-3, atol=1e-3)


def test_what_is_not_allowed_is_not_looked_at(limit: int) -> None:
    stored, queries = vectors(6_000), vectors(50, seed=1)
    index = ItemIndex(np.arange(6_000), stored)
    for share in (0.5, 0.02):
        allowed = np.random.default_rng(2).random(6_000) < share
        found, _ = index.search(queries, 50, allowed=allowed)
        assert allowed[found].all()
        assert recall(found, exact(queries, stored, 50, allowed)) >= 0.95
    few = np.zeros(6_000, dtype=bool)
    few[[3, 4_000]] = True
    found, score = index.search(queries[:1], 5, allowed=few)
    assert sorted(found[0]) == [-1, -1, -1, 3, 4_000]
    assert np.isneginf(score[0, 2:]).all()


def test_items_come_and_change_in_place(limit: int) -> None:
    stored = vectors(3_000)
    index = ItemIndex(np.arange(3_000), stored)
    query = 5 * stored[:1]
    index.add(np.array([9_000]), 10 * stored[:1])
    assert index.search(query, 1)[0][0, 0] == 9_000
    assert len(index) == 3_001
    index.add(np.array([9_000]), -10 * stored[:1])
    assert index.search(query, 1)[0][0, 0] != 9_000
    assert len(index) == 3_001
    assert index.search(query, 10, allowed=np.ones(100, dtype=bool))[0].max() < 100, "none beyond the end of allowed"
