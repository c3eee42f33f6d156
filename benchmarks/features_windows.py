"""Windows and decays of a whole table: ours, polars and duckdb on the same events; equal results first.

Ten windows at every event, each over [t - length, t) of its own card: count, sum, mean and max over an hour, a day and
a week, less one. polars and duckdb run them as range windows, which is what ours computes in exact mode; tiles, the
default, are timed beside. Neither peer has a decayed sum; both compute it as polars' and SQL's users do, from running
sums of value · 2^(t / half-life), which is only safe over a short span, so the span here is 90 days with a half-life of
30 days.

    assay bench features_windows [--json]
"""

import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
from assay_features.batch import features_at
from assay_features.definitions import DAY_S, HOUR_S, Decay, FeaturePlan, Window
from assay_features.events import Events

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, in_turn, median, row, spread

NUM_ROWS, NUM_CARDS, RUNS = 1_000_000, 50_000, 3
LENGTHS_S = (HOUR_S, DAY_S, 7 * DAY_S)
HALF_LIFE_S = 30 * DAY_S
WANTED = [(a, s) for s in LENGTHS_S for a in ("count", "sum", "mean", "max")][:10]


def table() -> pd.DataFrame:
    """Payments of 90 days; of one card no two at one instant, since peers order ties as they like."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "card": [f"c{k}" for k in rng.integers(0, NUM_CARDS, NUM_ROWS)],
            "time": np.sort(rng.integers(0, 90 * DAY_S * 1_000_000, NUM_ROWS)),
            "amount": rng.lognormal(3.0, 1.0, NUM_ROWS).round(2),
        }
    )
    return frame.drop_duplicates(["card", "time"]).reset_index(drop=True)


def plan(max_events: int) -> FeaturePlan:
    """The ten windows, exact or in tiles, and the decay."""
    windows = [
        Window(entity="card", aggregate=a, column=None if a == "count" else "amount", length_s=s, max_events=max_events)
        for a, s in WANTED
    ]
    return FeaturePlan((*windows, Decay(entity="card", column="amount", half_life_s=HALF_LIFE_S)))


def ours(events: Events, max_events: int) -> dict[str, np.ndarray]:
    """By name."""
    return features_at(plan(max_events), events, events)


def with_polars(frame: pl.DataFrame) -> pl.DataFrame:
    """Rolling aggregates of the group, window by window; rows in the order of the table."""
    out = frame.with_row_index("row")
    by = {"count": pl.len, "sum": lambda: pl.col("amount").sum(), "mean": lambda: pl.col("amount").mean(),
          "max": lambda: pl.col("amount").max()}  # fmt: skip
    for length_s in LENGTHS_S:
        wanted = [a for a, s in WANTED if s == length_s]
        rolled = frame.with_row_index("row").rolling(
            index_column="time", period=f"{length_s}s", closed="left", group_by="card"
        )
        found = rolled.agg(*(by[a]().alias(f"{a}_{length_s}") for a in wanted))
        # rolling keeps the order within a group; the row number of each result comes from the same grouping.
        order = frame.with_row_index("row").sort(["card", "time"]).select("card", "time", "row")
        out = out.join(found.join(order, on=["card", "time"]).drop("card", "time"), on="row")
    rate = np.log(2) / (HALF_LIFE_S * 1e6)
    start = frame["time"].cast(pl.Int64).min()
    moment = pl.col("time").cast(pl.Int64) - start
    grown = (pl.col("amount") * (moment * rate).exp()).cum_sum().over("card")
    return out.with_columns(decay=(grown - pl.col("amount") * (moment * rate).exp()) * (-moment * rate).exp())


def with_duckdb(connection: duckdb.DuckDBPyConnection) -> pd.DataFrame:
    """Range windows; duckdb shares frames of one length."""
    sql = {"count": "count(*)", "sum": "sum(amount)", "mean": "avg(amount)", "max": "max(amount)"}
    columns = [f"{sql[a]} OVER w{s} AS {a}_{s}" for a, s in WANTED]
    frames = [
        f"w{s} AS (PARTITION BY card ORDER BY time RANGE BETWEEN {s * 1_000_000} PRECEDING AND 1 PRECEDING)"
        for s in LENGTHS_S
    ]
    rate = np.log(2) / (HALF_LIFE_S * 1e6)
    columns.append(
        f"coalesce(sum(amount * exp(time * {rate})) OVER (PARTITION BY card ORDER BY time RANGE BETWEEN UNBOUNDED "
        f"PRECEDING AND 1 PRECEDING), 0) * exp(-time * {rate}) AS decay"
    )
    return connection.execute(
        f"SELECT row, {', '.join(columns)} FROM events WINDOW {', '.join(frames)} ORDER BY row"  # noqa: S608 - constants
    ).df()


def main() -> None:
    """Compare, then time in turn."""
    frame = table()
    events = Events(
        time_us=frame["time"].to_numpy(),
        keys={"card": frame["card"].to_numpy(dtype=object)},
        numbers={"amount": frame["amount"].to_numpy()},
    )
    polars_frame = pl.from_pandas(frame).with_columns(pl.col("time").cast(pl.Datetime("us")))
    connection = duckdb.connect()
    connection.execute("SET threads = 2")
    connection.register("given", frame.assign(row=np.arange(len(frame))))
    connection.execute("CREATE TABLE events AS SELECT * FROM given")
    exact = ours(events, 512)
    from_polars, from_duckdb = with_polars(polars_frame).sort("row"), with_duckdb(connection)
    for a, s in WANTED:
        name = next(n for n in exact if f"__{a}__" in n and n.endswith(f"{_duration(s)}__exact"))
        for peer in (from_polars[f"{a}_{s}"].to_numpy(), from_duckdb[f"{a}_{s}"].to_numpy()):
            filled = np.nan_to_num(peer.astype(np.float64), nan=0.0 if a in ("count", "sum") else -1.0)
            np.testing.assert_allclose(np.nan_to_num(exact[name], nan=-1.0), filled, rtol=1e-9, err_msg=name)
    decay = next(v for n, v in exact.items() if "decay" in n)
    for peer in (from_polars["decay"].to_numpy(), from_duckdb["decay"].to_numpy()):
        np.testing.assert_allclose(decay, peer, rtol=1e-6, atol=1e-6)
    seconds = in_turn(
        {
            "exact": lambda: ours(events, 512),
            "tiles": lambda: ours(events, 0),
            "polars": lambda: with_polars(polars_frame),
            "duckdb": lambda: with_duckdb(connection),
        },
        RUNS,
    )
    rows: list[dict[str, Any]] = []
    for mode in ("exact", "tiles"):
        for peer in ("polars", "duckdb"):
            module = pl if peer == "polars" else duckdb
            rows.append(
                row(f"{len(frame):,} events, 10 windows + decay, {mode}", median(seconds[mode]), "s",
                    peer=median(seconds[peer]), peer_name=f"{peer} {module.__version__}",
                    spread=spread(seconds[mode]), runs=RUNS)
            )  # fmt: skip
    finish("features_windows", rows)


def _duration(seconds: int) -> str:
    return {HOUR_S: "1h", DAY_S: "1d", 7 * DAY_S: "7d"}[seconds]


if __name__ == "__main__":
    main()
