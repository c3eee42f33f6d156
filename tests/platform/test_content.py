"""Words of items: which count, what they filter, and vectors that follow from them."""

import numpy as np
import pytest
from assay_platform.errors import InputError
from assay_platform.models import sentences
from assay_platform.models.content import ItemFacts, fit_content_map, sentence
from assay_platform.models.sentences import encode

ITEMS = [f"i{i}" for i in range(40)]
TABLE = {
    item: {"title": f"{'Star' if i % 2 else 'Moon'} story {i}", "kind": f"k{i % 2}|common", "brand": f"b{i // 20}"}
    for i, item in enumerate(ITEMS)
}


@pytest.fixture(scope="module")
def facts() -> ItemFacts:
    return ItemFacts.of([*ITEMS, "unknown"], TABLE, text=["title"], categorical=["kind", "brand"])


def test_words_of_texts_count_where_two_items_have_them(facts: ItemFacts) -> None:
    assert {"title:star", "title:moon", "title:story", "kind:common", "brand:b1"} <= set(facts.words)
    assert "title:17" not in facts.words
    assert facts.titles[3] == "Star story 3"
    assert facts.titles[-1] == "unknown", "an item that the table does not know is called by its id"
    lengths = np.asarray(facts.categories.multiply(facts.categories).sum(1)).ravel()
    np.testing.assert_allclose(lengths, [1.0] * 40 + [0.0], atol=1e-6)
    assert facts.categories.shape[1] == 5


def test_filters_are_of_categories_alone(facts: ItemFacts) -> None:
    assert np.flatnonzero(facts.having("brand", "b1")).tolist() == list(range(20, 40))
    assert np.flatnonzero(facts.having("kind", "k1|common")).tolist() == list(range(1, 40, 2))
    with pytest.raises(InputError, match="not a category of items; known are kind, brand"):
        facts.having("title", "star")
    with pytest.raises(InputError, match="no item has 'k9'"):
        facts.having("kind", "k9")


def test_vectors_follow_from_words(facts: ItemFacts) -> None:
    rng = np.random.default_rng(0)
    kind, brand = np.arange(41) % 2, np.arange(41) // 20
    vectors = np.column_stack([2.0 * kind - 1, 2.0 * brand - 1, np.zeros(41)]) + 0.1 * rng.normal(size=(41, 3))
    weight = np.ones(41)
    weight[[38, 39, 40]] = 0.0
    vectors[[38, 39, 40]] = 1e6  # nothing is learned from these
    found = fit_content_map(facts, vectors, weight).vectors(facts.content)
    assert np.sign(found[38:40, 0]).tolist() == [-1, 1]
    assert (found[38:40, 1] > 0).all()
    assert np.abs(found).max() < 2


def test_without_words_every_item_has_the_mean(facts: ItemFacts) -> None:
    nothing = ItemFacts.of(["a", "b", "c"], {}, text=[], categorical=[])
    vectors = np.array([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]], dtype=np.float32)
    found = fit_content_map(nothing, vectors, np.array([1.0, 1.0, 0.0])).vectors(nothing.content)
    np.testing.assert_allclose(found, [[2.0, 1.0]] * 3)
    assert fit_content_map(nothing, vectors, np.zeros(3)).vectors(nothing.content).tolist() == [[0.0, 0.0]] * 3


def test_more_items_keep_the_words_of_those_before(facts: ItemFacts) -> None:
    longer = facts.extended(["new"], [{"title": "Moon and sun", "brand": "b0"}])
    assert longer.words == facts.words
    assert longer.num_items == facts.num_items + 1
    assert {longer.words[w] for w in longer.has[-1].indices} == {"title:moon", "brand:b0"}
    assert longer.having("brand", "b0")[-1]


MOVIES = {
    f"m{i}": {"title": f"{word} {i}", "kind": kind}
    for i, (word, kind) in enumerate(
        (word, kind) for kind, words in (
            ("a", ("Rocket to Mars", "The Alien Planet", "Star Ship Captain", "Galaxy Invaders", "Robots of Space")),
            ("b", ("A Wedding in Paris", "Love Letters", "The Bride", "Romance at Midnight", "My Sweetheart")),
        ) for word in words
    )
}  # fmt: skip


def test_sentences_place_what_shares_no_word_with_anything() -> None:
    read = ItemFacts.of([*MOVIES], MOVIES, text=["title"], categorical=["kind"], sentences=True)
    assert read.sentences is not None
    np.testing.assert_allclose(np.linalg.norm(read.sentences, axis=1), 1.0, atol=1e-5)
    is_space = np.array([row["kind"] == "a" for row in MOVIES.values()])
    vectors = np.column_stack([np.where(is_space, 1.0, -1.0), np.zeros(len(is_space))])
    learned = fit_content_map(read, vectors, np.full(len(vectors), 50.0))
    assert learned.takes_sentences
    new = [{"title": "Cosmonauts"}, {"title": "Falling in love"}]
    said = encode([sentence(row, read.text, read.categorical) for row in new])
    longer = read.extended(["new", "newer"], new)
    placed = learned.vectors(longer.content[-2:], said)
    assert placed[0, 0] > 0.05 > -0.05 > placed[1, 0]
    words = fit_content_map(ItemFacts.of([*MOVIES], MOVIES, text=["title"], categorical=["kind"]), vectors, np.ones(10))
    assert not words.takes_sentences


def test_a_sentence_says_all_of_a_row() -> None:
    row = {"title": "Heat", "year": "1995", "kind": "Action|Crime", "price": "3"}
    assert sentence(row, ["title", "year"], ["kind"]) == "Heat, 1995, Action, Crime"
    assert sentence({}, ["title"], ["kind"]) == ""


def test_without_the_encoder_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "_PACKAGE", "not_installed")
    sentences._model.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'assay\[text\]'"):
        ItemFacts.of([*MOVIES], MOVIES, text=["title"], categorical=[], sentences=True)
