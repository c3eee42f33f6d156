"""Samples of a graph, against the whole graph."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from assay_platform.models.graph import GraphEncoder, ItemGraph, Subgraph
from assay_platform.models.graph_sampling import GraphSampler, Sample
from assay_platform.models.histories import Histories
from hypothesis import given, settings
from hypothesis import strategies as st

NUM_USERS, NUM_ITEMS = 12, 30


def graph(seed: int) -> ItemGraph:
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, NUM_USERS, 120), rng.zipf(1.5, 120) % NUM_ITEMS
    times = rng.integers(0, 50, 120) * 1_000_000
    facts = sp.csr_matrix((rng.random((NUM_ITEMS, 4)) < 0.2).astype(np.float32))
    taken = Histories.of(user, item, times, num_users=NUM_USERS, now_us=10**9)
    return ItemGraph.of(taken, facts, closeness_s=3.0)


def encoder_of(joined: ItemGraph, num_layers: int) -> GraphEncoder:
    torch.manual_seed(0)
    encoder = GraphEncoder(joined, width=4, num_layers=num_layers, dropout=0.0)
    torch.nn.init.normal_(encoder.base_ID)
    return encoder.eval()


def kept_edges(joined: ItemGraph, users: np.ndarray, sample: Sample) -> np.ndarray:
    """(E,) all but those that the sample says were taken out."""
    gone = set(zip(users[sample.wanted[0]].tolist(), sample.items[sample.wanted[1]].tolist(), strict=True))
    return np.array([pair not in gone for pair in zip(joined.user.tolist(), joined.item.tolist(), strict=True)])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_with_room_for_all_neighbours_a_sample_says_what_the_whole_graph_says(seed: int, num_layers: int) -> None:
    joined, rng = graph(seed), np.random.default_rng(seed)
    encoder = encoder_of(joined, num_layers)
    users = np.sort(rng.choice(NUM_USERS, 4, replace=False))
    sampler = GraphSampler(joined, num_layers=num_layers, fanout=10**6)
    for _ in range(2):  # the second time as if the first had not been
        sample = sampler.draw(users, 0.4, 5, rng)
        kept = kept_edges(joined, users, sample)
        with torch.no_grad():
            whole_UD, whole_ID = encoder(Subgraph.whole(joined.adjacencies(kept), num_layers))
            user_BD, item_SD = encoder(sample.graph)
        np.testing.assert_allclose(item_SD, whole_ID[sample.items], atol=1e-5)
        np.testing.assert_allclose(user_BD, whole_UD[users], atol=1e-5)
        told = sample.items[: sample.told_apart]
        assert set(joined.item[~kept]) <= set(told.tolist())
        hidden = {(users[u], sample.items[i]) for u, i in zip(*sample.hidden, strict=True)}
        known = zip(joined.user[kept].tolist(), joined.item[kept].tolist(), strict=True)
        assert hidden == {(u, i) for u, i in known if u in users and i in told}


def test_a_part_of_the_neighbours_is_right_on_average() -> None:
    joined = graph(0)
    encoder, users = encoder_of(joined, 2), np.arange(NUM_USERS)
    with torch.no_grad():
        _, whole_ID = encoder(Subgraph.whole(joined.adjacencies(), 2))
    sampler, rng = GraphSampler(joined, num_layers=2, fanout=3), np.random.default_rng(0)
    total, widest = np.zeros(whole_ID.shape), 0
    for _ in range(1500):
        sample = sampler.draw(users, 0.0, 0, rng)
        with torch.no_grad():
            _, item_SD = encoder(sample.graph)
        total[sample.items] += item_SD.numpy()
        there = sample.graph.rounds[0][0].there.others_by_items
        widest = max(widest, int(torch.diff(there.crow_indices()).max()))
    taken = np.unique(joined.item)
    assert widest == 3, "no row has more neighbours"
    np.testing.assert_allclose(total[taken] / 1500, whole_ID.numpy()[taken], atol=0.03)


def test_the_same_seed_draws_the_same_sample() -> None:
    joined = graph(1)
    first, again = (
        GraphSampler(joined, num_layers=3, fanout=2).draw(np.arange(5), 0.5, 7, np.random.default_rng(3))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.items, again.items)
    assert isinstance(first.graph.items, torch.Tensor)
    assert isinstance(again.graph.items, torch.Tensor)
    assert torch.equal(first.graph.items, again.graph.items)


def test_items_without_events_and_users_without_edges_left() -> None:
    joined = graph(2)
    sampler = GraphSampler(joined, num_layers=2, fanout=4)
    sample = sampler.draw(np.array([0]), 1.0, 5, np.random.default_rng(0))
    user_BD, item_SD = encoder_of(joined, 2)(sample.graph)
    assert torch.isfinite(item_SD).all()
    assert float(user_BD.detach().abs().max()) == pytest.approx(0.0)
