"""The recommender's promises about lists, and what its sources count, against obvious calculations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from assay_platform.errors import ArtifactError
from assay_platform.models.content import ItemFacts, fit_content_map
from assay_platform.models.histories import DAY_US, HALF_LIVES_D, OWN_FEATURES, Again, Histories, OwnPast
from assay_platform.models.item_regression import RegressionConfig, fit_item_regression, together
from assay_platform.models.list_rules import ListRules
from assay_platform.models.lists import varied
from assay_platform.models.recommender import PairRanker, RankerConfig, Recommender
from assay_platform.models.sequence import SequenceConfig, SequenceEncoder
from assay_platform.models.sources import PAIR_FEATURES, ItemPast, ItemVectors, Sources, Wanted, Weights
from hypothesis import given, settings
from hypothesis import strategies as st

NUM_USERS, NUM_ITEMS, WIDTH = 30, 50, 8
END_US = 100 * DAY_US
PLAIN = RankerConfig()


def made_up(num_events: int, *, seed: int = 0, num_users: int = NUM_USERS, num_items: int = NUM_ITEMS) -> Histories:
    rng = np.random.default_rng(seed)
    return Histories.of(
        rng.integers(0, num_users, num_events), rng.integers(0, num_items, num_events),
        rng.integers(0, END_US, num_events), num_users=num_users, now_us=END_US,
        strength=(rng.random(num_events) < 0.6).astype(np.float32),
    )  # fmt: skip


def nothing_stored(items: np.ndarray) -> np.ndarray:
    return np.zeros((len(items), 0), dtype=np.float32)


def facts_of(num: int = NUM_ITEMS) -> ItemFacts:
    """Items of five kinds, with titles of two words."""
    items = [f"i{i}" for i in range(num)]
    table = {item: {"title": f"Item no {i % 7}", "kind": f"k{i % 5}"} for i, item in enumerate(items)}
    return ItemFacts.of(items, table, text=["title"], categorical=["kind"])


def model_of(
    histories: Histories,
    *,
    again: Again,
    config: RankerConfig = PLAIN,
    num_head: int = NUM_ITEMS,
    ordered: bool = False,
) -> Recommender:
    rng = np.random.default_rng(0)
    vectors = ItemVectors(
        rng.normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32), np.zeros(NUM_ITEMS, dtype=np.float32), 1.0
    )
    facts, past = facts_of(), ItemPast.of(histories, NUM_ITEMS)
    head, penalised = past.head(num_head), RegressionConfig(penalty=5.0)
    regression = fit_item_regression(histories, NUM_ITEMS, penalised, head)
    liked = fit_item_regression(histories.where(histories.liked), NUM_ITEMS, penalised, head)
    content = fit_content_map(facts, vectors.stacked(), past.takers)
    torch.manual_seed(0)
    sequence = None
    if ordered:
        sequence = SequenceEncoder(vectors.item_ID, SequenceConfig(length=6)).eval().requires_grad_(False)
        torch.nn.init.normal_(sequence.bias_I)
    ranker = PairRanker(config)
    torch.nn.init.normal_(ranker.head.weight, std=5.0)  # an order of its own
    return Recommender(
        ranker=ranker,
        config=config,
        users=[f"u{u}" for u in range(NUM_USERS)],
        items=[f"i{i}" for i in range(NUM_ITEMS)],
        histories=histories,
        sources=Sources(
            regression, liked, vectors, past, facts, content, head, sequence, Weights(graph=0.5, sequence=0.25)
        ),
        store_features_IF=np.zeros((NUM_ITEMS, 0), dtype=np.float32),
        again=again,
    )


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return model_of(made_up(300), again=Again.NOTHING)


@pytest.mark.parametrize("k", [5, 50])
def test_an_excluded_item_is_never_recommended_even_from_a_small_catalogue(recommender: Recommender, k: int) -> None:
    for user in range(NUM_USERS):
        history = recommender.history(f"u{user}")
        seen = np.unique(history.item)
        ranked = recommender.recommend(history, k=k, exclude=seen)
        assert not set(ranked.items) & set(seen.tolist())
        assert len(ranked.items) == min(k, NUM_ITEMS - len(seen))
        assert len(set(ranked.items)) == len(ranked.items)
        assert np.isfinite(ranked.scores).all()
        assert ranked.scores == sorted(ranked.scores, reverse=True)


def test_full_ranking_puts_excluded_items_last(recommender: Recommender) -> None:
    seen = sp.csr_matrix((np.ones(3), ([0, 0, 1], [4, 7, 9])), (2, NUM_ITEMS), dtype=np.float32)
    histories = Histories.of(np.array([0, 0, 1]), np.array([4, 7, 9]), np.array([1, 2, 3]), num_users=2, now_us=END_US)
    top, score = recommender.rank(histories, num=NUM_ITEMS, wanted=Wanted(seen))
    assert set(top[0, -2:].tolist()) == {4, 7}
    assert top[1, -1] == 9
    assert np.isneginf(score[0, -2:]).all()


def test_one_user_gets_what_a_batch_gets(recommender: Recommender) -> None:
    histories = made_up(300)
    top, score = recommender.rank(histories, num=10)
    for user in range(NUM_USERS):
        alone, alone_score = recommender.rank(recommender.history(f"u{user}"), num=10)
        np.testing.assert_array_equal(alone[0], top[user])
        np.testing.assert_allclose(alone_score[0], score[user], atol=1e-3)


def test_where_items_are_taken_again_a_users_own_are_among_the_candidates() -> None:
    histories = made_up(200)
    model = model_of(histories, again=Again.ALL, config=RankerConfig(num_candidates=20))
    found = model.sources.candidates(histories, 20, nothing_stored, own_past=True)
    for user in range(NUM_USERS):
        own = set(histories.part(user, user + 1).item.tolist())
        assert own <= set(found.item[user].tolist())
        assert set(found.item[user, : len(own)].tolist()) == own


@pytest.mark.parametrize("again", Again)
@pytest.mark.parametrize("num_head", [2, 20, NUM_ITEMS])
def test_beyond_the_head_nothing_is_lost(num_head: int, again: Again) -> None:
    """The best of all items by the definition of their scores, whichever of them are looked up in the index."""
    histories = made_up(200)
    model = model_of(histories, again=again, num_head=num_head, ordered=True)
    sources = model.sources
    assert sources.sequence is not None
    seen, rng = histories.matrix(NUM_ITEMS), np.random.default_rng(1)
    allowed = rng.random(NUM_ITEMS) < 0.8
    wanted = Wanted(again.excluded(histories, NUM_ITEMS), allowed)
    found = sources.candidates(histories, 15, nothing_stored, own_past=again.own_past, wanted=wanted)
    regression = np.zeros((NUM_USERS, NUM_ITEMS), dtype=np.float32)
    regression[:, sources.head] = sources.regression.scores(seen)
    graph = np.column_stack([sources.user_vectors(seen), np.ones(NUM_USERS)]) @ sources.vectors.stacked().T

    def z(scores: np.ndarray) -> np.ndarray:
        head = scores[:, sources.head]
        return (scores - head.mean(1, keepdims=True)) / (head.std(1, keepdims=True) + 1e-9)

    sequence = sources.sequence.users(histories) @ sources.sequence.stacked().T
    score = z(regression) + 0.5 * z(graph) + 0.25 * z(sequence)
    if again.own_past:
        own = OwnPast(histories, NUM_ITEMS)
        for user in range(NUM_USERS):
            mine = np.flatnonzero(own.user == user)
            if wanted.excluded is not None:
                mine = mine[~np.isin(own.item[mine], wanted.excluded[user].indices)]
            mine = mine[np.argsort(-own.decayed(-1)[mine], kind="stable")][:11]
            score[user, own.item[mine]] += 100 + own.decayed(-1)[mine]
    if wanted.excluded is not None:
        score[wanted.excluded.nonzero()] = -np.inf
    score[:, ~allowed] = -np.inf
    for user in range(NUM_USERS):
        best = np.sort(score[user])[::-1][:15]
        np.testing.assert_allclose(found.score[user], best, rtol=1e-3, atol=2e-2)
        there = np.isfinite(best)
        np.testing.assert_allclose(score[user, found.item[user, there]], best[there], rtol=1e-3, atol=2e-2)
        assert len(set(found.item[user, there])) == there.sum()


def test_a_new_item_is_found_at_once(recommender: Recommender) -> None:
    rows = [{"title": "Item no 3", "kind": "k2"}, {"title": "never heard"}]
    longer = recommender.extended(
        ["new", "odd"], rows, now_us=END_US, store_features_NF=np.zeros((2, 0), dtype=np.float32)
    )
    assert len(recommender.items) == NUM_ITEMS, "the one that is serving stays as it is"
    assert longer.title(NUM_ITEMS) == "Item no 3"
    assert longer.having("kind", "k2")[NUM_ITEMS]
    content = longer.sources.content.vectors(longer.sources.facts.content[NUM_ITEMS:])
    np.testing.assert_allclose(longer.sources.vectors.stacked()[NUM_ITEMS:], content, rtol=1e-5)
    only = np.zeros(NUM_ITEMS + 2, dtype=bool)
    only[NUM_ITEMS:] = True
    history = longer.history("u0")
    ranked = longer.recommend(history, k=5, exclude=np.zeros(0, dtype=np.int64), allowed=only)
    assert sorted(ranked.items) == [NUM_ITEMS, NUM_ITEMS + 1]
    again = longer.extended(["newer"], [{}], now_us=END_US, store_features_NF=np.zeros((1, 0), dtype=np.float32))
    assert len(again.rank(history, num=NUM_ITEMS + 3)[0][0]) == NUM_ITEMS + 3
    assert len(longer.rank(history, num=NUM_ITEMS + 2)[0][0]) == NUM_ITEMS + 2, "and finds nothing beyond its end"


def test_new_events_count_and_what_is_known_counts_once(recommender: Recommender) -> None:
    known = recommender.history("u0")
    events = zip(known.time_us.tolist(), known.item, known.strength.tolist(), strict=True)
    again = [(time_us, f"i{i}", strength) for time_us, i, strength in events]
    same = recommender.history("u0", again)
    np.testing.assert_array_equal(same.item, known.item)
    newer = recommender.history("u0", [*again, (END_US + 5, "i3", 0.0), (END_US + 6, "never heard of", 1.0)])
    assert newer.item[-1] == 3
    assert not newer.liked[-1]
    assert newer.now_us[0] == END_US + 6
    earlier = recommender.history("u0", [*again, (END_US + 5, "i3", 1.0)], now_us=50 * DAY_US)
    assert (earlier.time_us < 50 * DAY_US).all()
    assert len(earlier.item) < len(known.item)


def test_saved_and_loaded_it_answers_alike_and_refuses_unknown_features(
    recommender: Recommender, tmp_path: Path
) -> None:
    recommender.save(tmp_path / "model", {})
    loaded = Recommender.load(tmp_path / "model")
    for user in ("u0", "u7", "unknown"):
        assert loaded.recommend_known(user, k=7) == recommender.recommend_known(user, k=7)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"log_popularity"', '"something"'))
    with pytest.raises(ArtifactError, match="something"):
        Recommender.load(tmp_path / "model")


def test_a_ranker_of_few_features_ignores_the_others() -> None:
    histories = made_up(300)
    model = model_of(histories, again=Again.NOTHING, config=RankerConfig(features=("log_popularity",)))
    top, score = model.rank(histories, num=10)
    takers = ItemPast.of(histories, NUM_ITEMS).takers
    for user in range(NUM_USERS):
        by_takers = {takers[item]: value for item, value in zip(top[user], score[user], strict=True)}
        np.testing.assert_allclose([by_takers[takers[item]] for item in top[user]], score[user], atol=1e-6)


# ---------------------------------------------------------------------- what is counted

events = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 40)), max_size=60)


@settings(max_examples=100, deadline=None)
@given(events)
def test_a_users_own_past_equals_a_loop(rows: list[tuple[int, int, int]]) -> None:
    user, item, half_day = (
        (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
        if rows
        else [np.zeros(0, dtype=np.int64)] * 3
    )
    now_us = 30 * DAY_US
    strength = (half_day % 3 / 2).astype(np.float32)
    histories = Histories.of(user, item, half_day * DAY_US // 2, num_users=4, now_us=now_us, strength=strength)
    candidates = np.tile(np.arange(5), (4, 1))
    features = OwnPast(histories, 5).features(candidates)
    column = {name: features[..., i] for i, name in enumerate(OWN_FEATURES)}
    for u in range(4):
        for i in range(5):
            times = sorted(t / 2 for v, j, t in rows if (v, j) == (u, i))
            first_of_day = {int(t): t for t in reversed(times)}
            strengths = [t % 3 / 2 for t in sorted(t for v, j, t in rows if (v, j) == (u, i))]
            assert column["own_strongest"][u, i] == max(strengths, default=0.0)
            assert column["own_last_strength"][u, i] == (strengths[-1] if strengths else 0.0)
            assert column["own_days"][u, i] == pytest.approx(np.log1p(len(first_of_day)), abs=1e-5)
            for half_life in HALF_LIVES_D:
                decayed = sum(0.5 ** ((30 - t) / half_life) for t in first_of_day.values())
                assert column[f"own_decayed_{half_life:g}d"][u, i] == pytest.approx(np.log1p(decayed), abs=1e-5)
            last = 30 - times[-1] if times else 1000.0
            assert column["own_days_since_last"][u, i] == pytest.approx(np.log1p(last), abs=1e-5)
            first = 30 - times[0] if times else 1000.0
            assert column["own_days_since_first"][u, i] == pytest.approx(np.log1p(first), abs=1e-5)


def test_items_close_in_time_are_counted_as_a_loop_does() -> None:
    histories = made_up(120, num_users=5, num_items=12).once()
    closeness_s = 2 * 86_400.0
    expected = np.zeros((12, 12))
    for user in range(5):
        part = histories.part(user, user + 1)
        for a in range(len(part.item)):
            for b in range(a + 1, len(part.item)):
                gap = (part.time_us[b] - part.time_us[a]) / 1e6
                if gap < 5 * closeness_s:
                    expected[part.item[a], part.item[b]] += np.exp(-gap / closeness_s)
    np.testing.assert_allclose(together(histories, 12, closeness_s).toarray(), expected + expected.T, atol=1e-6)


def test_the_regression_without_time_is_ease_with_users_weighed() -> None:
    histories = made_up(400)
    taken = histories.matrix(NUM_ITEMS).toarray().astype(np.float64)
    length = taken.sum(1)
    gram = taken.T @ (taken * np.sqrt(length[length > 0].mean() / np.maximum(length, 1))[:, None]) + 20.0 * np.eye(
        NUM_ITEMS
    )
    inverse = np.linalg.inv(gram)
    expected = inverse / -np.diag(inverse)
    np.fill_diagonal(expected, 0.0)
    found = fit_item_regression(histories, NUM_ITEMS, RegressionConfig(penalty=20.0, closeness_s=0.0))
    np.testing.assert_allclose(found.weights.toarray(), expected, atol=1e-5)
    assert found.weights.diagonal().max() == 0


def test_closeness_that_outweighs_everything_still_has_a_solution() -> None:
    rng = np.random.default_rng(0)
    histories = Histories.of(
        np.repeat(np.arange(100), 10), rng.integers(0, 6, 1000), rng.integers(0, 1000, 1000), num_users=100, now_us=1000
    )
    found = fit_item_regression(histories, 6, RegressionConfig(penalty=0.1, closeness_s=1e6)).weights
    assert np.isfinite(found.data).all()
    assert found.diagonal().max() == 0
    assert np.abs(found.data).max() < 10


def test_scores_are_sums_of_what_each_item_adds(recommender: Recommender) -> None:
    histories = made_up(300)
    regression = recommender.sources.regression
    taken = histories.matrix(NUM_ITEMS)
    scores = regression.scores(taken)
    np.testing.assert_allclose(scores, (taken @ regression.weights).toarray(), atol=1e-5)
    sources = recommender.sources
    graph = sources.user_vectors(taken) @ sources.vectors.item_ID.T
    for user in range(NUM_USERS):
        own = np.unique(histories.part(user, user + 1).item)
        for item in (0, 7, 49):
            added = regression.added(own, item)
            assert added.sum() == pytest.approx(scores[user, item], abs=1e-5)
            because = recommender.because(item, own)
            if len(own) and added.max() > 0:
                assert because == own[int(np.argmax(added))]
    assert recommender.because(3, np.zeros(0, dtype=np.int64)) is None
    alone = sources.user_vectors(taken[3]) @ sources.vectors.item_ID.T
    np.testing.assert_allclose(alone[0], graph[3], atol=1e-5)


def test_histories_keep_the_first_time_of_each_item() -> None:
    histories = Histories.of(
        np.array([1, 0, 1, 1]), np.array([2, 2, 2, 0]), np.array([30, 20, 10, 40]), num_users=2, now_us=50
    )
    once = histories.once()
    assert once.start.tolist() == [0, 1, 3]
    assert once.item.tolist() == [2, 2, 0]
    assert once.time_us.tolist() == [20, 10, 40]
    assert len(PAIR_FEATURES) == len(set(PAIR_FEATURES))


def cosines(unit: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda place: np.einsum("ncd,nd->nc", unit, unit[np.arange(len(unit)), place])


def test_varied_lists_are_greedy_and_shown_in_order_of_score() -> None:
    rng = np.random.default_rng(0)
    score = rng.normal(size=(3, 30)).astype(np.float32)
    vectors = rng.normal(size=(3, 30, 4)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    found = varied(score, cosines(unit), weight=0.7, num=14)
    for n in range(3):
        chosen: list[int] = []
        for _ in range(14):
            left = [i for i in range(30) if i not in chosen]
            worth = [score[n, i] - 0.7 * float((unit[n, chosen] @ unit[n, i]).sum()) for i in left]
            chosen.append(left[int(np.argmax(worth))])
        shown = [sorted(part, key=lambda i: -score[n, i]) for part in (chosen[:10], chosen[10:])]
        assert found[n].tolist() == [*shown[0], *shown[1]]


def test_variety_leaves_scores_in_order_without_weight_and_excluded_items_last() -> None:
    rng = np.random.default_rng(0)
    score = rng.normal(size=(4, 9)).astype(np.float32)
    score[:, [2, 5]] = -np.inf
    alike = cosines(np.tile(np.eye(1, 3, dtype=np.float32), (4, 9, 1)))  # all alike
    for weight in (0.0, 3.0):
        found = varied(score, alike, weight=weight, num=9)
        assert [sorted(row) for row in found.tolist()] == [list(range(9))] * 4
        assert (np.sort(found[:, -2:], axis=1) == [2, 5]).all()
    np.testing.assert_array_equal(varied(score, alike, weight=0.0, num=7), np.argsort(-score, axis=1)[:, :7])


def test_likeness_is_the_cosine_of_categories_or_else_of_the_graph() -> None:
    sources = model_of(made_up(300), again=Again.NOTHING).sources
    items = np.array([[3, 8, 1], [2, 0, 9]])
    names = [str(i) for i in range(NUM_ITEMS)]
    unknown = ItemFacts.of(names, {}, text=(), categorical=())
    plain = replace(sources, facts=unknown).likeness(items)(np.array([1, 2]))
    vectors = sources.vectors.item_ID / np.linalg.norm(sources.vectors.item_ID, axis=1, keepdims=True)
    np.testing.assert_allclose(
        plain, np.stack([vectors[items[0]] @ vectors[8], vectors[items[1]] @ vectors[9]]), atol=1e-5
    )
    table = {name: {"kind": "a|b" if int(name) % 2 else "b"} for name in names}
    facts = ItemFacts.of(names, table, text=(), categorical=("kind",))
    by_kind = replace(sources, facts=facts).likeness(items)(np.array([1, 2]))
    np.testing.assert_allclose(by_kind, [[0.5**0.5, 1.0, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1.0]], atol=1e-5)


def test_a_diverse_model_saves_its_weight_and_lists_differ_more(tmp_path: Path) -> None:
    plain, diverse = model_of(made_up(300), again=Again.NOTHING), model_of(made_up(300), again=Again.NOTHING)
    diverse.diversity = 200.0
    diverse.save(tmp_path / "model", {})
    assert Recommender.load(tmp_path / "model").diversity == 200.0

    def num_kinds(model: Recommender) -> list[int]:
        top, _ = model.rank(made_up(300), num=5)
        return [len(set(row)) for row in top % 5]  # the kind of an item

    assert np.mean(num_kinds(plain)) < 4.5
    assert num_kinds(diverse) == [5] * NUM_USERS


NO_ITEMS = np.zeros(0, dtype=np.int64)


def kinds(model: Recommender, items: list[int]) -> list[str]:
    facts = model.sources.facts
    return [word for item in items for word in np.array(facts.words)[facts.has[item].indices] if word[:4] == "kind"]


def test_rules_hold_in_every_list(recommender: Recommender) -> None:
    rules = ListRules(at_most={"kind": 2}, never={"kind": ("k3", "never heard of")})
    for user in range(NUM_USERS):
        history = recommender.history(f"u{user}")
        plain = recommender.recommend(history, k=50, exclude=NO_ITEMS)
        ruled = recommender.recommend(history, k=7, exclude=NO_ITEMS, rules=rules)
        counts = {kind: kinds(recommender, ruled.items).count(kind) for kind in ("kind:k0", "kind:k1", "kind:k3")}
        assert len(ruled.items) == 7
        assert max(counts.values()) <= 2
        assert counts["kind:k3"] == 0
        place = [plain.items.index(item) for item in ruled.items]
        assert place == sorted(place), "in the order of the scores"
    assert len(recommender.recommend(history, k=20, exclude=NO_ITEMS, rules=rules).items) == 8, "four kinds, two each"


def test_new_items_have_their_share_of_every_list() -> None:
    model = model_of(made_up(300), again=Again.NOTHING)
    model.use_ranker = False  # an untrained one may like what the graph does not
    rows = [{"title": f"Item no {i}", "kind": f"k{i}"} for i in range(4)]
    none = np.zeros((4, 0), dtype=np.float32)
    longer = model.extended([f"new{i}" for i in range(4)], rows, now_us=END_US, store_features_NF=none)
    longer.sources.vectors.bias_I[NUM_ITEMS:] = -100.0  # nobody would see them
    for user in range(NUM_USERS):
        history = longer.history(f"u{user}")
        plain = longer.recommend(history, k=10, exclude=NO_ITEMS)
        assert max(plain.items) < NUM_ITEMS
        for share, most, least in ((0.2, {}, 2), (0.35, {"kind": 3}, 3), (0.05, {}, 0)):
            rules = ListRules(new_share=share, new_days=0.001, at_most=most)
            found = longer.recommend(history, k=10, exclude=NO_ITEMS, rules=rules).items
            assert len(found) == 10
            assert sum(item >= NUM_ITEMS for item in found) == least
            if not most:
                assert found[: 10 - least] == plain.items[: 10 - least]


def test_chance_has_the_last_place_as_often_as_it_says(recommender: Recommender) -> None:
    history, rules = recommender.history("u0"), ListRules(explore=0.3)
    chance = np.random.default_rng(0)
    plain = recommender.recommend(history, k=5, exclude=NO_ITEMS)
    lists = [
        recommender.recommend(history, k=5, exclude=NO_ITEMS, rules=rules, chance=chance.random) for _ in range(1500)
    ]
    assert all(shown.items[:4] == plain.items[:4] and shown.propensity[:4] == [1.0] * 4 for shown in lists)
    last = np.array([shown.items[4] for shown in lists])
    propensity = {shown.items[4]: shown.propensity[4] for shown in lists}
    assert sum(propensity.values()) == pytest.approx(1.0, abs=0.1), "all that can be shown were"
    assert (last == plain.items[4]).mean() == pytest.approx(propensity[plain.items[4]], abs=0.04)
    assert propensity[plain.items[4]] > 0.7
    assert np.unique(last).size > 30


def test_as_if_new_nothing_is_known_of_an_item_but_its_words() -> None:
    histories = made_up(300)
    model = model_of(histories, again=Again.ALL, ordered=True)
    hidden = np.arange(NUM_ITEMS) % 4 == 1
    sources = model.sources.as_if_new(hidden)
    seen = histories.where(~hidden[histories.item])
    found = sources.candidates(seen, 12, nothing_stored, own_past=True, wanted=Wanted(allowed=hidden))
    assert hidden[found.item].all()
    by_name = dict(zip(PAIR_FEATURES, np.moveaxis(found.features, -1, 0), strict=True))
    for name in ("regression", "log_popularity", "share_who_repeat", "days_a_taker", "own_days"):
        assert (by_name[name] == 0).all(), name
    assert np.ptp(by_name["sequence_z"], axis=1).max() < 1e-4, "it says the same of all of them"
    assert by_name["graph_z"].std() > 0
    others = sources.vectors.item_ID[~hidden]
    np.testing.assert_array_equal(others, model.sources.vectors.item_ID[~hidden])
    kind = np.arange(NUM_ITEMS) % 5
    of_words = sources.vectors.item_ID[hidden]
    same = of_words[kind[hidden] == 1]
    assert (
        np.linalg.norm(same - same.mean(0), axis=1).mean()
        < 0.7 * np.linalg.norm(others - others.mean(0), axis=1).mean()
    )


def test_many_users_are_ranked_as_few_are_and_nobody_as_well() -> None:
    model = model_of(made_up(4000, num_users=700), again=Again.NOTHING)
    everyone = made_up(4000, num_users=700)
    wanted = Wanted(Again.NOTHING.excluded(everyone, NUM_ITEMS))
    items, scores = model.rank(everyone, num=5, wanted=wanted)
    for first in range(0, 700, 100):
        some, some_scores = model.rank(everyone.part(first, first + 100), num=5, wanted=wanted.part(first, first + 100))
        np.testing.assert_array_equal(items[first : first + 100], some)
        np.testing.assert_allclose(scores[first : first + 100], some_scores, atol=1e-5)
    nobody, _ = model.rank(everyone.part(0, 0), num=5)
    assert nobody.shape == (0, 5)
