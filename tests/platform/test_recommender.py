"""The recommender's promises about lists."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from assay_platform.models.recommender import (
    GraphScorer,
    ItemFacts,
    ItemVectors,
    PairRanker,
    RankerConfig,
    Recommender,
)

NUM_USERS, NUM_ITEMS, WIDTH = 30, 50, 8


@pytest.fixture
def recommender() -> Recommender:
    rng = np.random.default_rng(0)
    graph = sp.csr_matrix((rng.random((NUM_USERS, NUM_ITEMS)) < 0.2).astype(np.float32))
    vectors = ItemVectors(
        rng.normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32), np.zeros(NUM_ITEMS, dtype=np.float32), 1.0
    )
    facts = ItemFacts(tuple(f"item {i}" for i in range(NUM_ITEMS)), np.zeros((NUM_ITEMS, 1), dtype=np.float32))
    torch.manual_seed(0)
    config = RankerConfig(vector_width=WIDTH)
    ranker = PairRanker(config)
    torch.nn.init.normal_(ranker.head.weight, std=5.0)  # an order of its own
    return Recommender(
        ranker=ranker,
        config=config,
        users=[f"u{u}" for u in range(NUM_USERS)],
        items=[f"i{i}" for i in range(NUM_ITEMS)],
        scorer=GraphScorer(graph, vectors, facts),
        facts=facts,
        store_features_IF=np.zeros((NUM_ITEMS, 0), dtype=np.float32),
        repeats=False,
    )


@pytest.mark.parametrize("k", [5, 50])
def test_an_excluded_item_is_never_recommended_even_from_a_small_catalogue(recommender: Recommender, k: int) -> None:
    for user in range(NUM_USERS):
        history = recommender.history(f"u{user}")
        ranked = recommender.recommend(history, k=k, exclude=history)
        assert not set(ranked.items) & set(history.tolist())
        assert len(ranked.items) == min(k, NUM_ITEMS - len(history))
        assert len(set(ranked.items)) == len(ranked.items)
        assert np.isfinite(ranked.scores).all()
        assert ranked.scores == sorted(ranked.scores, reverse=True)


def test_full_ranking_puts_excluded_items_last(recommender: Recommender) -> None:
    seen = sp.csr_matrix((np.ones(3), ([0, 0, 1], [4, 7, 9])), (2, NUM_ITEMS), dtype=np.float32)
    top, score = recommender.rank(seen, num=NUM_ITEMS, excluded=seen)
    assert set(top[0, -2:].tolist()) == {4, 7}
    assert top[1, -1] == 9
    assert np.isneginf(score[0, -2:]).all()
