"""Lists whose items differ from one another.

Greedy maximum a posteriori of a determinantal point process (Chen, Zhang and Zhou, 'Fast Greedy MAP Inference for
Determinantal Point Process', arXiv:1709.05135): each place goes to the item with the largest score + weight · ln(how
much of its vector the items before it leave unexplained).
"""

# N lists, C candidates, D width of a vector, K places

import numpy as np

from assay_platform.models.histories import Floats, Index

_LEAST = 1e-4  # of a vector that those before explain wholly


def diversified(score_NC: Floats, unit_NCD: Floats, *, weight: float, num: int) -> Index:
    """(N, num) places of candidates. unit_NCD: vectors of length 1. Candidates with a score of -inf come last.

    weight 0 is the order of the scores; ties go to whoever comes first.
    """
    num = min(num, score_NC.shape[1])
    rows = np.arange(len(score_NC))
    left = np.ones_like(score_NC)  # the squared part of each vector that no chosen one explains
    # A score of -inf is still better than having been taken.
    score = np.maximum(score_NC.astype(np.float64), -1e18)
    directions: list[Floats] = []
    chosen = np.empty((len(score), num), dtype=np.int64)
    for place in range(num):
        best = (score + weight * np.log(left)).argmax(axis=1)
        chosen[:, place] = best
        alike = np.einsum("ncd,nd->nc", unit_NCD, unit_NCD[rows, best], optimize=True)
        for direction in directions:
            alike -= direction * direction[rows, best][:, None]
        direction = alike / np.sqrt(left[rows, best])[:, None]
        directions.append(direction)
        left = np.maximum(left - direction**2, _LEAST)
        score[rows, best] = -np.inf
    return chosen
