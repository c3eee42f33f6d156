"""What every benchmark prints: a line a case, and with --json one object at the end."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def row(
    case: str,
    ours: float,
    unit: str,
    *,
    peer: float | None = None,
    peer_name: str = "",
    limit: float | None = None,
    limit_name: str = "",
    higher_is_better: bool = False,
    spread: float = 0.0,
    runs: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """One case. spread: (largest - smallest) / median of ours."""
    return {
        "case": case, "ours": _short(ours), "peer": _short(peer), "peer_name": peer_name, "limit": _short(limit),
        "limit_name": limit_name, "unit": unit, "higher_is_better": higher_is_better, "spread": round(spread, 3),
        "runs": runs, **more,
    }  # fmt: skip


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def in_turn(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of every call, `runs` times each, one after the other so that noise meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """(largest - smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def finish(name: str, rows: list[dict[str, Any]], device: str = "CPU") -> None:
    """Print everything."""
    width = max(len(r["case"]) for r in rows)
    for r in rows:
        peer = "" if r["peer"] is None else f"   {r['peer_name']} {r['peer']:g}"
        limit = "" if r["limit"] is None else f"   {r['limit_name']} {r['limit']:g}"
        print(
            f"{r['case']:<{width}}  ours {r['ours']:g} {r['unit']} (±{r['spread']:.0%}, {r['runs']} runs){peer}{limit}"
        )
    if "--json" in sys.argv:
        print(json.dumps({"name": name, "device": device, "rows": rows}))
