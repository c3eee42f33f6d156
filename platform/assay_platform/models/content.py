"""What the item table says of items: titles, words of their columns, and vectors that follow from the words.

An item that nobody has taken yet has no place in the graph. Its vector is that which items with its words have: a ridge
regression of the graph's vectors on tf-idf of words and, where the schema wants it, on vectors of whole sentences.
"""

# I items, V words, G words of categories, D width of a vector, S width of a sentence's vector

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from assay_platform.errors import InputError
from assay_platform.models.histories import Floats
from assay_platform.models.sentences import encode

# Categories are divided where lists of them are; texts at everything that is no letter or figure.
_OF_CATEGORIES, _OF_TEXTS = re.compile(r"[|,;\s]+"), re.compile(r"[^\w]+")
_MOST_WORDS = 50_000  # of categories, and of texts
_RIDGE = 20.0
# Sentences are one vector of length 1 beside the words': twice as long, and with another penalty, new items of
# MovieLens-100K are placed best (chosen on hidden items of the training part; anything near is as good).
_SENTENCE_LENGTH, _RIDGE_WITH_SENTENCES = np.float32(2.0), 40.0
_MOST_DENSE = 5_000  # columns that a direct solution takes

Row = Mapping[str, str]


@dataclass(frozen=True)
class ItemFacts:
    """titles: for people. has (I, V): 0/1, which item has which of `words`, each a 'column:word'. text, categorical:
    columns of the item table. sentences (I, S): of all that a row says, in training where they are wanted.
    """

    titles: tuple[str, ...]
    has: sp.csr_matrix
    words: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    sentences: Floats | None = None

    @staticmethod
    def of(
        items: Sequence[str],
        table: Mapping[str, Row],
        *,
        text: Sequence[str],
        categorical: Sequence[str],
        sentences: bool = False,
    ) -> "ItemFacts":
        """Of the items' rows in a table, where they have one.

        Raises:
            InputError: sentences are wanted and their encoder is not installed.
        """
        text, categorical = tuple(text), tuple(categorical)
        rows = [table.get(item, {}) for item in items]
        found = [_words(row, text, categorical) for row in rows]
        counts: dict[str, int] = {}
        for row_words in found:
            for word in row_words:
                counts[word] = counts.get(word, 0) + 1
        order = sorted(counts, key=lambda word: (-counts[word], word))
        of_categories = [w for w in order if w.partition(":")[0] in categorical][:_MOST_WORDS]
        of_texts = [w for w in order if w.partition(":")[0] not in categorical and counts[w] > 1][:_MOST_WORDS]
        words = (*of_categories, *of_texts)
        titles = tuple(_title(row, text) or item for item, row in zip(items, rows, strict=True))
        vectors = encode([sentence(row, text, categorical) for row in rows]) if sentences else None
        return ItemFacts(titles, _incidence(found, words), words, text, categorical, vectors)

    def extended(self, items: Sequence[str], rows: Sequence[Row]) -> "ItemFacts":
        """With more items. Words that no other item has say nothing."""
        found = [_words(row, self.text, self.categorical) for row in rows]
        titles = tuple(_title(row, self.text) or item for item, row in zip(items, rows, strict=True))
        has = sp.vstack([self.has, _incidence(found, self.words)], format="csr")
        return ItemFacts((*self.titles, *titles), has, self.words, self.text, self.categorical)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.titles)

    @cached_property
    def categories(self) -> sp.csr_matrix:
        """(I, G) rows of length 1: the categories that two items or more have."""
        shared = np.asarray(self.has.sum(0)).ravel() > 1
        of_categories = np.array([word.partition(":")[0] in self.categorical for word in self.words], dtype=bool)
        return _unit_rows(self.has[:, np.flatnonzero(shared & of_categories)])

    @cached_property
    def content(self) -> sp.csr_matrix:
        """(I, V) tf-idf of all words, rows of length 1."""
        return _unit_rows(self.has.multiply(self._idf).tocsr())

    @cached_property
    def _idf(self) -> NDArray[np.float32]:
        counts = np.asarray(self.has.sum(0)).ravel()
        return np.asarray(1.0 + np.log((1.0 + self.num_items) / (1.0 + counts)), dtype=np.float32)

    def having(self, column: str, value: str) -> NDArray[np.bool_]:
        """(I,) the items with all words of a value in a categorical column.

        Raises:
            InputError: no item has such a column, or such a word in it.
        """
        if column not in self.categorical:
            known = ", ".join(self.categorical) or "no columns"
            raise InputError(f"{column!r} is not a category of items; known are {known}")
        chosen = np.ones(self.num_items, dtype=bool)
        for part in filter(None, _OF_CATEGORIES.split(value)):
            place = self._place.get(f"{column}:{part}")
            if place is None:
                raise InputError(f"no item has {part!r} in {column!r}")
            with_it = np.zeros(self.num_items, dtype=bool)
            with_it[self._by_word.indices[self._by_word.indptr[place] : self._by_word.indptr[place + 1]]] = True
            chosen &= with_it
        return chosen

    def knows(self, column: str, value: str) -> bool:
        """Whether any item has all words of a value."""
        return all(f"{column}:{part}" in self._place for part in _OF_CATEGORIES.split(value) if part)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}

    @cached_property
    def _by_word(self) -> sp.csc_matrix:
        return self.has.tocsc()


@dataclass(frozen=True)
class ContentMap:
    """Vectors of items from their words. weights (V, D), start (D,): the vector of an item without any. sentence
    (S, D): of sentences' vectors; S is 0 where they do not count.
    """

    weights_VD: Floats
    start_D: Floats
    sentence_SD: Floats

    @property
    def takes_sentences(self) -> bool:
        """Whether sentences count."""
        return len(self.sentence_SD) > 0

    def vectors(self, content: sp.csr_matrix, sentences: Floats | None = None) -> Floats:
        """(N, D) of rows of `ItemFacts.content` and, where they count, their sentences (N, S)."""
        found = content @ self.weights_VD + self.start_D
        if self.takes_sentences:
            assert sentences is not None
            found = found + sentences @ self.sentence_SD
        return np.asarray(found, dtype=np.float32)


def fit_content_map(facts: ItemFacts, vectors_ID: Floats, weight_I: Floats) -> ContentMap:
    """weight_I: how much each item counts; from those of 0 nothing is learned."""
    known = np.flatnonzero(weight_I)
    width, num_words = vectors_ID.shape[1], len(facts.words)
    sentences = np.zeros((facts.num_items, 0), dtype=np.float32) if facts.sentences is None else facts.sentences
    if not len(known) or not (facts.has[known].nnz or sentences.size):
        start = vectors_ID[known].mean(0) if len(known) else np.zeros(width)
        none = (np.zeros((num, width), dtype=np.float32) for num in (num_words, 0))
        return ContentMap(next(none), np.asarray(start, dtype=np.float32), next(none))
    from sklearn.linear_model import Ridge

    columns = sp.hstack([facts.content[known], sp.csr_matrix(sentences[known] * _SENTENCE_LENGTH)], format="csr")
    direct = columns.shape[1] <= _MOST_DENSE
    model = Ridge(
        alpha=_RIDGE_WITH_SENTENCES if sentences.size else _RIDGE, solver="cholesky" if direct else "sparse_cg"
    )
    model.fit(columns.toarray() if direct else columns, vectors_ID[known], weight_I[known])
    weights = np.ascontiguousarray(model.coef_.T, dtype=np.float32)
    return ContentMap(weights[:num_words], model.intercept_.astype(np.float32), weights[num_words:] * _SENTENCE_LENGTH)


def sentence(row: Row, text: Sequence[str], categorical: Sequence[str]) -> str:
    """All that a row says, with commas between."""
    of_categories = (word for name in categorical for word in _OF_CATEGORIES.split(row.get(name, "")))
    return ", ".join(filter(None, [*(row.get(name, "") for name in text), *of_categories]))


def _title(row: Row, text: Sequence[str]) -> str:
    return " · ".join(row.get(name, "") for name in text).strip(" ·")


def _words(row: Row, text: Sequence[str], categorical: Sequence[str]) -> set[str]:
    found = {f"{name}:{word}" for name in categorical for word in _OF_CATEGORIES.split(row.get(name, "")) if word}
    return found | {f"{name}:{w}" for name in text for w in _OF_TEXTS.split(row.get(name, "").lower()) if w}


def _incidence(found: Iterable[set[str]], words: Sequence[str]) -> sp.csr_matrix:
    place = {word: number for number, word in enumerate(words)}
    rows = [sorted(place[word] for word in of_item if word in place) for of_item in found]
    start = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    columns = np.array([column for row in rows for column in row], dtype=np.int64)
    return sp.csr_matrix((np.ones(len(columns), dtype=np.float32), columns, start), (len(rows), len(words)))


def _unit_rows(matrix: sp.csr_matrix) -> sp.csr_matrix:
    norm = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
    return sp.csr_matrix(sp.diags(1.0 / np.maximum(norm, 1e-9)) @ matrix).astype(np.float32)
