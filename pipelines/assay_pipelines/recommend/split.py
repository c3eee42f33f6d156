"""Which interactions are for fitting, choosing and testing.

temporal: by time over all users, at fractions of the rows or at moments. random: each user's interactions shuffled by
the seed (the common MovieLens protocol; it leaks the future by design). leave-last-out: each user's last is the test,
the one before it validation.
"""

from typing import NamedTuple

import numpy as np
from assay_features.schema import Split
from assay_platform.errors import DataError
from numpy.typing import NDArray

Rows = NDArray[np.intp]


class Parts(NamedTuple):
    """Row numbers of the three parts, each ascending."""

    fit: Rows
    validation: Rows
    test: Rows


def split_interactions(
    users: NDArray[np.int64], split: Split, *, seed: int, time_us: NDArray[np.int64] | None = None
) -> Parts:
    """users: code of each interaction, rows in order of time. time_us: needed where the split names moments.

    Raises:
        DataError: a part would be empty.
    """
    num_rows = len(users)
    if split.protocol == "temporal":
        cut = np.r_[int(num_rows * split.train), int(num_rows * (split.train + split.validation))]
        if split.moments_us is not None and time_us is not None:
            cut = np.searchsorted(time_us, split.moments_us)
        part = np.searchsorted(cut, np.arange(num_rows), side="right")
    else:
        position, count = _positions(users, seed=seed if split.protocol == "random" else None)
        if split.protocol == "random":
            last_fit = np.floor(count * (split.train + split.validation) + 1e-9)
            first = np.floor(last_fit * split.train / (split.train + split.validation) + 1e-9)
            part = (position >= first).astype(int) + (position >= last_fit)
        else:
            part = np.clip(position - count + 3, 0, 2)
            part[count < 3] = 0  # too short to give anything away
    parts = Parts(*(np.flatnonzero(part == i) for i in range(3)))
    for name, rows in parts._asdict().items():
        if not len(rows):
            raise DataError(f"{num_rows} interactions with protocol {split.protocol!r} leave the {name} part empty")
    return parts


def _positions(users: NDArray[np.int64], *, seed: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Place of each row among its user's rows, in time order or shuffled; and how many its user has."""
    order = np.argsort(users, kind="stable")
    counts = np.bincount(users)
    starts = np.r_[0, np.cumsum(counts)[:-1]]
    position = np.empty(len(users), dtype=np.int64)
    generator = None if seed is None else np.random.default_rng(seed)
    for user in range(len(counts)):
        rows = order[starts[user] : starts[user] + counts[user]]
        position[rows if generator is None else generator.permutation(rows)] = np.arange(len(rows))
    return position, counts[users]
