"""The graph of items: what is joined by what, and vectors of items that nobody took."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from assay_platform.models import graph as graph_module
from assay_platform.models.graph import GraphEncoder, ItemGraph, Subgraph
from assay_platform.models.histories import Histories

FACTS = sp.csr_matrix(np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0.7, 0.7]], dtype=np.float32))  # of 5 items, unit rows


def histories() -> Histories:
    rows = [(0, 0, 0), (0, 1, 5), (0, 2, 100), (1, 1, 3), (1, 2, 4), (0, 0, 101)]  # the last: item 0 again
    user, item, second = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return Histories.of(user, item, second * 1_000_000, num_users=2, now_us=10**9)


def graph(closeness_s: float) -> ItemGraph:
    return ItemGraph.of(histories(), FACTS, closeness_s=closeness_s)


@pytest.mark.parametrize(
    ("closeness_s", "baskets"),
    [(0.0, [{0}, {1}, {2}, {1}, {2}]), (10.0, [{0, 1}, {2}, {1, 2}]), (1e6, [{0, 1, 2}, {1, 2}])],
)
def test_a_basket_is_what_one_user_took_close_in_time(closeness_s: float, baskets: list[set[int]]) -> None:
    joined = graph(closeness_s)
    assert len(joined.item) == 5, "each item of a user once, at its first time"
    found = [set(joined.item[joined.basket == b].tolist()) for b in range(joined.basket.max() + 1)]
    assert found == baskets


def test_relations_are_normalised_and_lose_masked_edges() -> None:
    joined = graph(10.0)
    users, baskets, facts = (relation.matrix() for relation in joined.relations)
    degree_user, degree_item = np.array([3, 2]), np.array([1, 2, 2])
    assert users[0, 1] == pytest.approx((degree_user[0] * degree_item[1]) ** -0.5)
    assert baskets.shape == (3, 5)
    assert facts.shape == (2, 5)
    for relation, matrix in zip(joined.relations, (users, baskets, facts), strict=True):
        both = relation.adjacency()
        np.testing.assert_allclose(both.others_by_items.to_dense(), matrix.toarray())
        np.testing.assert_allclose(both.items_by_others.to_dense(), matrix.T.toarray())
        np.testing.assert_allclose(relation.matrix(1, 2).toarray(), matrix[1:2].toarray())
    kept = np.array([True, False, True, True, True])
    fewer = joined.adjacencies(kept)
    dropped = ItemGraph(
        user=joined.user[kept], item=joined.item[kept], basket=joined.basket[kept], num_users=2, facts=joined.facts
    )
    for mine, theirs in zip(fewer, dropped.relations, strict=True):
        np.testing.assert_allclose(mine.others_by_items.to_dense(), theirs.matrix().toarray())
        np.testing.assert_allclose(mine.items_by_others.to_dense(), theirs.matrix().T.toarray())
    assert len(ItemGraph.of(histories(), FACTS[:, :0], closeness_s=10.0).relations) == 2


def test_a_part_of_the_users() -> None:
    joined = graph(10.0)
    generator = np.random.default_rng(0)
    assert joined.of_some(5, generator) is joined
    part = joined.of_some(3, generator)
    assert part.num_users == 1
    assert len(part.user) in (2, 3)
    assert part.num_items == 5
    assert sorted(set(part.basket)) == list(range(int(part.basket.max()) + 1))


def test_an_item_that_nobody_took_is_near_those_that_are_alike() -> None:
    joined = graph(10.0)
    torch.manual_seed(0)
    encoder = GraphEncoder(joined, width=4, num_layers=2, dropout=0.0).eval()
    with torch.no_grad():
        user_UD, item_ID = encoder(Subgraph.whole(joined.adjacencies(), 2))
    assert user_UD.shape == (2, 4)
    cosine = torch.nn.functional.cosine_similarity(item_ID[3:4], item_ID, dim=1)
    assert item_ID[3].norm() > 0
    assert cosine[2] > cosine[0]


def test_gradients_reach_every_relation() -> None:
    joined = graph(10.0)
    encoder = GraphEncoder(joined, width=4, num_layers=3, dropout=0.0)
    user_UD, item_ID = encoder(Subgraph.whole(joined.adjacencies(), 3))
    (encoder.score(user_UD, item_ID) ** 2).sum().backward()
    assert encoder.relation_R.grad is not None
    assert (encoder.relation_R.grad.abs() > 0).all()
    assert encoder.base_ID.grad is not None
    assert torch.isfinite(encoder.base_ID.grad).all()


def test_vectors_of_all_items_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = graph(10.0)
    torch.manual_seed(0)
    encoder = GraphEncoder(joined, width=4, num_layers=3, dropout=0.0).eval()
    with torch.no_grad():
        _, item_ID = encoder(Subgraph.whole(joined.adjacencies(), 3))
    np.testing.assert_allclose(encoder.all_items(joined), item_ID.numpy(), atol=1e-6)
    monkeypatch.setattr(graph_module, "_OTHERS_A_CHUNK", 1)
    np.testing.assert_allclose(encoder.all_items(joined), item_ID.numpy(), atol=1e-6)
