"""What events looked like when a model was made, which a service holds those that come against."""

from collections.abc import Mapping
from typing import Any

from assay_platform.monitoring.drift_reference import Reference, ReferenceConfig

# Rows of a window at most and at least, windows that are wanted (`g_test` knows how rows hang together from 20 halves
# on) and needed, rows at most.
_WINDOW_ROWS, _FEWEST_WINDOW_ROWS, _WINDOWS, _FEWEST_WINDOWS = 2000, 100, 10, 4
MOST_REFERENCE_ROWS = 200_000


def drift_reference(columns: Mapping[str, Any], *, entity: str | None = None) -> dict[str, Any]:
    """Of the newest rows, (N,) a column, in time order; empty where they are too few for windows. entity: see
    `Reference.of`.
    """
    num_rows = len(next(iter(columns.values())))
    window_rows = min(_WINDOW_ROWS, max(_FEWEST_WINDOW_ROWS, num_rows // _WINDOWS))
    if num_rows < _FEWEST_WINDOWS * window_rows:
        return {}
    return Reference.of(columns, ReferenceConfig(window_rows=window_rows), entity=entity).to_dict()
