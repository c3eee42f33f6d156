"""The items whose vectors have the largest products with a query's.

Exact on small catalogues. On large ones an inverted file (faiss, Douze et al., arXiv:2401.08281): vectors are put into
cells around centroids, and a query looks into as many cells as the recall asked for needs, which is measured when the
index is built.
"""

# N queries, D width of a vector, T vectors in the index, K results

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay_platform.models.histories import Flags, Floats, Index

EXACT = 50_000  # vectors up to which all are looked at
_RECALL, _RECALL_AT, _NUM_TRIED = 0.99, 100, 256
_POINTS_A_CENTROID = 64  # that centroids are computed from


class ItemIndex:
    """Vectors by item number; thread-safe. What is added is found by the next search."""

    def __init__(self, items: Index, vectors_TD: Floats) -> None:
        import faiss

        self._lock = threading.Lock()
        width = vectors_TD.shape[1]
        vectors_TD = np.ascontiguousarray(vectors_TD, dtype=np.float32)
        if len(items) <= EXACT:
            self._index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(width))
            self._index.add_with_ids(vectors_TD, items)
            return
        cells = 2 ** round(math.log2(math.sqrt(len(items))))
        self._index = faiss.index_factory(width, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
        self._index.cp.max_points_per_centroid = _POINTS_A_CENTROID
        self._index.train(vectors_TD)
        self._index.add_with_ids(vectors_TD, items)
        self._look_far_enough(items, vectors_TD)

    @property
    def cells_looked_into(self) -> int | None:
        """Of the inverted file; None where all vectors are looked at."""
        return getattr(self._index, "nprobe", None)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries_ND: Floats, num: int, *, allowed: Flags | None = None) -> tuple[Index, Floats]:
        """(N, K) items, best first, and their products; -1 and -inf where there are fewer.

        allowed (I,): by item number; the others are not looked at, nor are items beyond its end.
        """
        import faiss

        options: dict[str, Any] = {}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
            make: Any = faiss.SearchParameters if self.cells_looked_into is None else faiss.SearchParametersIVF
            # With few allowed, good ones are in cells further away.
            far = {} if self.cells_looked_into is None else {"nprobe": self._cells_for(allowed)}
            options["params"] = make(sel=selector, **far)
        with self._lock:
            scores, items = self._index.search(np.ascontiguousarray(queries_ND, dtype=np.float32), num, **options)
        return items.astype(np.int64), np.where(items < 0, -np.inf, scores)

    def add(self, items: Index, vectors_TD: Floats) -> None:
        """New items, or those there with other vectors."""
        with self._lock:
            self._index.remove_ids(np.asarray(items, dtype=np.int64))
            self._index.add_with_ids(np.ascontiguousarray(vectors_TD, dtype=np.float32), items)

    def _cells_for(self, allowed: NDArray[np.bool_]) -> int:
        share = max(1.0 / self._index.nlist, float(np.count_nonzero(allowed)) / max(1, len(self)))
        return int(min(self._index.nlist, math.ceil(self._index.nprobe / min(1.0, share))))

    def _look_far_enough(self, items: Index, vectors_TD: Floats) -> None:
        """Twice as many cells until the recall is reached, for queries like the vectors themselves."""
        chosen = np.random.default_rng(0).choice(len(items), _NUM_TRIED, replace=False)
        queries = vectors_TD[chosen]
        products = queries @ vectors_TD.T
        exact = items[np.argpartition(-products, _RECALL_AT, axis=1)[:, :_RECALL_AT]]
        self._index.nprobe = 4
        while self._index.nprobe < self._index.nlist:
            _, found = self._index.search(queries, _RECALL_AT)
            if np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=True)]) >= _RECALL:
                return
            self._index.nprobe = min(self._index.nlist, 2 * self._index.nprobe)
