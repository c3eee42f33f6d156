"""Training of the encoders: what a step learns from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assay_pipelines.recommend import train_graph
from assay_pipelines.recommend.train import Lists, RankerTraining, train_ranker
from assay_pipelines.recommend.train_graph import DEFAULTS, train_encoder
from assay_pipelines.recommend.train_sequence import SequenceTraining, train_sequence
from assay_platform.models.graph import GraphEncoder, ItemGraph
from assay_platform.models.histories import DAY_US, Histories
from assay_platform.models.recommender import RankerConfig
from assay_platform.models.sequence import SequenceConfig
from assay_platform.training import Checkpoint
from scipy.sparse import csr_matrix

NUM_USERS, NUM_ITEMS = 60, 300


def histories() -> Histories:
    """Users of three tastes."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(NUM_USERS), 20)
    item = 100 * (user % 3) + rng.integers(0, 100, len(user))
    return Histories.of(user, item, rng.integers(0, DAY_US, len(user)), num_users=NUM_USERS, now_us=DAY_US)


def graph() -> ItemGraph:
    return ItemGraph.of(histories(), csr_matrix((NUM_ITEMS, 0), dtype=np.float32), closeness_s=0.0)


def test_drawn_items_stand_for_all_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, joined = np.random.default_rng(0), graph()
    torch.manual_seed(0)
    encoder = GraphEncoder(joined, width=8, num_layers=2, dropout=0.0).eval()
    masked = train_graph._WholeGraph(joined, encoder, generator, torch.device("cpu")).mask(0.1)
    with torch.no_grad():
        user_UD, item_ID = encoder(masked.graph)
        item_ID = 20 * item_ID

        def loss() -> float:
            softmax = masked.softmax(user_UD, item_ID)
            assert len(softmax.item_ID) == len(np.arange(NUM_ITEMS)[softmax.items])
            return float(softmax.loss(torch.tensor(1.0), torch.zeros(NUM_ITEMS)))

        full = loss()
        monkeypatch.setattr(train_graph, "_LOSS_CELLS", NUM_USERS * 60)
        drawn = [loss() for _ in range(40)]
    assert max(drawn) > min(drawn), "others were drawn"
    assert np.mean(drawn) == pytest.approx(full, rel=0.02)


def test_a_step_may_look_at_some_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_graph, "_MOST_USERS", 20)
    generator, joined = np.random.default_rng(0), graph()
    encoder = GraphEncoder(joined, width=8, num_layers=2, dropout=0.0)
    masked = train_graph._WholeGraph(joined, encoder, generator, torch.device("cpu")).mask(0.3)
    softmax = masked.softmax(*encoder(masked.graph))
    assert (len(softmax.user_UD), len(softmax.item_ID)) == (20, NUM_ITEMS)
    assert int(softmax.wanted[0].max()) < 20
    kept = set(zip(*(side.tolist() for side in softmax.hidden), strict=True))
    dropped = set(zip(*(side.tolist() for side in softmax.wanted), strict=True))
    assert dropped
    assert not kept & dropped


@pytest.mark.parametrize("most_at_once", [10**6, 0], ids=["as a whole", "in samples"])
def test_the_graph_encoder_learns_tastes(most_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_graph, "MOST_AT_ONCE", most_at_once)
    monkeypatch.setattr(train_graph, "_FANOUT", 5)
    monkeypatch.setattr(train_graph, "_SAMPLED_USERS", 20)
    monkeypatch.setattr(train_graph, "_TOLD_APART", 100)
    joined = graph()
    encoder = train_encoder(joined, {**DEFAULTS, "num_epochs": 3, "width": 8}, seed=0)
    assert encoder.base_ID.device.type == "cpu"
    vectors = train_graph.item_vectors(encoder, joined).item_ID
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-6)
    taste = np.arange(NUM_ITEMS) // 100
    cosine = unit @ unit.T
    same = taste[:, None] == taste
    assert cosine[same].mean() > cosine[~same].mean() + 0.3


def test_the_sequence_encoder_learns_what_comes_later() -> None:
    rng = np.random.default_rng(0)
    given = histories()
    vectors = rng.normal(size=(NUM_ITEMS, 8)).astype(np.float32)  # say nothing of tastes
    training = SequenceTraining(num_epochs=120, learning_rate=1e-2, asked=1.0)
    encoder = train_sequence(given, vectors, SequenceConfig(length=8, dropout=0.0), training, seed=0)
    scores = encoder.users(given) @ encoder.stacked().T
    own = scores.reshape(NUM_USERS, 3, 100).mean(2)
    assert (own.argmax(1) == np.arange(NUM_USERS) % 3).mean() > 0.9
    again = train_sequence(given, vectors, SequenceConfig(length=8, dropout=0.0), training, seed=0)
    np.testing.assert_allclose(again.users(given), encoder.users(given), atol=1e-4)


def _sequence(**options: Any) -> torch.nn.Module:
    vectors = np.random.default_rng(1).normal(size=(NUM_ITEMS, 8)).astype(np.float32)
    training = SequenceTraining(num_epochs=3)
    return train_sequence(histories(), vectors, SequenceConfig(length=8), training, seed=0, **options)


def _ranker(**options: Any) -> torch.nn.Module:
    drawn, config = torch.Generator().manual_seed(0), RankerConfig()
    features = torch.randn(90, 8, len(config.features), generator=drawn)
    wanted = torch.rand(90, 8, 1, generator=drawn) < 0.3
    lists = [Lists(features, wanted, torch.ones(90, 8, dtype=torch.bool))]
    return train_ranker(lists, config, seed=0, training=RankerTraining(num_epochs=3), **options)[0]


@pytest.mark.parametrize("train", [_sequence, _ranker])
def test_a_training_that_was_killed_goes_on(train: Callable[..., torch.nn.Module], tmp_path: Path) -> None:
    def killed(epoch: int, _: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    epochs, kept = [], Checkpoint(tmp_path / "training.pt", "this")
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=kept, on_epoch=killed)
    resumed, whole = train(checkpoint=kept, on_epoch=lambda epoch, _: epochs.append(epoch)), train()
    assert epochs == [3]
    for one, other in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
