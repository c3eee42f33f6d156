"""Serving against batch cell by cell, and partitions that hold far more than their share.

Both are facts, not estimates of what training was like, so they need no reference.
"""

# N rows, K partitions

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import beta, binom

from assay_platform.errors import ConfigError, DataError
from assay_platform.monitoring.alarms import Finding
from assay_platform.monitoring.drift_cells import Column, is_numeric, read_columns
from assay_platform.monitoring.g_test import Ints

# Where the findings of a comparison are left, beside the features of a model.
SKEW_FILE = "skew.json"
_NAMED_KEYS = 5
_LOG_CHANCE = -14.0  # about 1e-6; keeps small windows quiet


def cell_skew(
    served: Mapping[str, Column], recomputed: Mapping[str, Column], ids: Sequence[str], *, tolerance: float = 0.0
) -> list[Finding]:
    """Features as they were served against the same ones computed in batch, (N,) a column; the worst column first.

    One engine computes both, so without tolerance any difference is a fault. The interval (Clopper & Pearson, 99 %)
    says how much of the traffic it touches. N sampled rows find a fault of a share s with probability 1 - (1 - s)^N:
    690 rows for 1 % at 99.9 %. ids: of the N events. tolerance: relative, of numbers.

    Raises:
        ConfigError: `tolerance` is negative.
        DataError: a served column was not recomputed, or is of other length or type; see `read_columns`.
    """
    if not tolerance >= 0:
        raise ConfigError(f"tolerance is {tolerance}: need 0 or more")
    lacking = next((name for name in served if name not in recomputed), None)
    if lacking is not None:
        raise DataError(f"column {lacking!r} was served and not recomputed")
    served, recomputed = read_columns(served), read_columns({name: recomputed[name] for name in served})
    out = []
    for name, ours in served.items():
        theirs = recomputed[name]
        if len(ours) != len(theirs) or len(ours) != len(ids) or is_numeric(ours) != is_numeric(theirs):
            raise DataError(
                f"column {name!r}: served {len(ours)} of {ours.dtype}, recomputed {len(theirs)} of {theirs.dtype}, "
                f"{len(ids)} ids: need the same"
            )
        if is_numeric(ours):
            near_N = np.isclose(ours, theirs, rtol=tolerance, atol=0.0, equal_nan=True)
        else:
            near_N = np.array([v == w for v, w in zip(ours.tolist(), theirs.tolist(), strict=True)], dtype=bool)
        k, n = int((~near_N).sum()), len(near_N)
        if not k:
            continue
        low, high = float(beta.ppf(0.005, k, n - k + 1)), 1.0 if k == n else float(beta.ppf(0.995, k + 1, n - k))
        i = int(np.argmin(near_N))
        text = (
            f"{name}: served differs from batch in {k} of {n} cells ({low:.1%} to {high:.1%} of all), as in event "
            f"{ids[i]}: served {ours[i]}, batch {theirs[i]}"
        )
        finding = Finding(
            column=name, kind="cells", statistic=float(k), log_p=-math.inf, moved=k / n, text=text, value=ids[i]
        )
        out.append(finding)
    return sorted(out, key=lambda one: -one.moved)


def heavy_keys(
    name: str, keys: Sequence[str], partition_N: Ints, num_partitions: int, *, max_load: float = 2.0
) -> list[Finding]:
    """Partitions that hold at least `max_load` times the mean, the fullest first, and the keys that make them so.

    name: the column of the keys, (N,). partition_N: the partition of each row, from 0.

    Raises:
        ConfigError: `num_partitions` is below 1, or `max_load` not above 1.
        DataError: a partition is not one of them, or the lengths differ.
    """
    if num_partitions < 1 or not max_load > 1:
        raise ConfigError(f"num_partitions is {num_partitions}, max_load {max_load}: need at least 1, and more than 1")
    if len(keys) != len(partition_N):
        raise DataError(f"{len(keys)} keys and {len(partition_N)} partitions: need as many")
    if len(keys) and (int(partition_N.min()) < 0 or int(partition_N.max()) >= num_partitions):
        raise DataError(f"partitions {partition_N.min()} to {partition_N.max()}: need 0 to {num_partitions - 1}")
    load_K = np.bincount(partition_N, minlength=num_partitions)
    total, mean = len(keys), len(keys) / num_partitions
    out = []
    for k in np.flatnonzero((load_K >= max_load * mean) & (load_K > 0)).tolist():
        load = int(load_K[k])
        # As many rows in one of K partitions, where each row fell into any of them alike.
        chance = min(float(binom.logsf(load - 1, total, 1 / num_partitions)) + math.log(num_partitions), 0.0)
        if chance >= _LOG_CHANCE:
            continue
        inside = Counter(keys[i] for i in np.flatnonzero(partition_N == k).tolist()).most_common(_NAMED_KEYS)
        # Keys to blame are those without which the load would be bearable.
        left, blamed = load, []
        for key, count in inside:
            if left < max_load * mean:
                break
            blamed.append(f"{key} {count / total:.1%}")
            left -= count
        said = ", ".join(blamed) if left < max_load * mean else "many keys alike"
        text = f"{name}: partition {k} holds {load / total:.1%} of the rows, {load / mean:.1f} times the mean: {said}"
        finding = Finding(
            column=name, kind="partition", statistic=load / mean, log_p=chance, moved=(load - mean) / total,
            text=text, value=inside[0][0] if left < max_load * mean else None,
        )  # fmt: skip
        out.append(finding)
    return sorted(out, key=lambda one: -one.statistic)
