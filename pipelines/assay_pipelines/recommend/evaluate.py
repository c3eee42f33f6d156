"""How good ranked lists are: full ranking, never sampled."""

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

DEPTH = 20


def ranking_metrics(top_ND: NDArray[np.int64], test: sp.csr_matrix, train: sp.csr_matrix) -> dict[str, float]:
    """Metrics of the contract.

    top_ND: at least 20 item indices a user, best first; the row of a user. test: (U, I) 0/1, what was taken in
    the test part. train: (U, I) 0/1. Users without a test item do not count.

    coverage: fraction of items in anybody's first 10. novelty: mean -log2 of the fraction of users who had an
    item. diversity: 1 - mean cosine, between the items of a list, of who took them in training.
    """
    relevant = np.asarray(test.sum(1)).ravel()
    rows = np.flatnonzero(relevant > 0)
    top = top_ND[rows, :DEPTH]
    test_rows = test[rows]
    hit = np.stack([np.asarray(test_rows[np.arange(len(rows)), top[:, d]]).ravel() > 0 for d in range(top.shape[1])], 1)
    discount = 1.0 / np.log2(np.arange(2, 12))
    depth = min(10, top.shape[1])
    ideal = np.cumsum(discount)[np.minimum(relevant[rows], 10).astype(int) - 1]
    popularity = np.maximum(np.asarray(train.sum(0)).ravel(), 1.0) / train.shape[0]
    top10 = top[:, :depth]
    return {
        "ndcg_at_10": float(((hit[:, :depth] * discount[:depth]).sum(1) / ideal).mean()),
        "recall_at_10": float((hit[:, :10].sum(1) / relevant[rows]).mean()),
        "recall_at_20": float((hit.sum(1) / relevant[rows]).mean()),
        "coverage": float(len(np.unique(top10)) / train.shape[1]),
        "novelty": float(-np.log2(popularity[top10]).mean()),
        "diversity": _diversity(top10, train),
    }


def _diversity(top10: NDArray[np.int64], train: sp.csr_matrix) -> float:
    scale = np.maximum(np.asarray(train.sum(0)).ravel(), 1.0) ** -0.5
    unit = sp.csr_matrix(train @ sp.diags(scale)).T.tocsr()
    similarities = []
    depth = top10.shape[1]
    if depth < 2:
        return 0.0
    for items in top10:
        block = unit[items]
        cosine = (block @ block.T).toarray()
        similarities.append((cosine.sum() - np.trace(cosine)) / (depth * (depth - 1)))
    return float(1.0 - np.mean(similarities))
