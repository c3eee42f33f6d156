"""G against SciPy, summaries through JSON, clean windows that stay quiet, and each kind of drift under its own name."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from assay_platform.errors import ConfigError, DataError
from assay_platform.monitoring.alarms import Alarms, Finding
from assay_platform.monitoring.calibration import Calibration
from assay_platform.monitoring.drift_cells import Cells, Column, Rows, at_top, read_columns
from assay_platform.monitoring.drift_findings import findings
from assay_platform.monitoring.drift_reference import Reference, ReferenceConfig, repeated
from assay_platform.monitoring.g_test import GTest, block_counts, each_against_rest, g_statistic, moved
from assay_platform.monitoring.skew import cell_skew, heavy_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2, chi2_contingency

Table = dict[str, Column]
WINDOW = 1000


def payments(seed: int, num_rows: int = WINDOW) -> Table:
    """Independent rows; `tax` and `total` follow `amount`, and `age_s` is how old a feature was."""
    rng = np.random.default_rng(seed)
    amount = np.round(np.exp(rng.normal(3, 0.8, num_rows)), 2)
    city = rng.choice(["Paris", "Lyon", "Nice", "Lille"], num_rows, p=[0.5, 0.3, 0.15, 0.05]).astype(object)
    city[rng.random(num_rows) < 0.1] = None
    rate = rng.normal(size=num_rows)
    rate[rng.random(num_rows) < 0.02] = np.nan
    return {
        "id": rng.choice(10**9, num_rows, replace=False),
        "amount": amount,
        "tax": np.round(amount * rng.uniform(0.1, 0.3, num_rows), 2),
        "total": np.round(amount * rng.uniform(1.1, 1.3, num_rows), 2),
        "rate": rate,
        "num_items": rng.poisson(3, num_rows),
        "city": city,
        "card": np.array([f"k{v}" for v in np.minimum(rng.zipf(1.6, num_rows), 3000)], dtype=object),
        "age_s": np.floor(rng.exponential(3600, num_rows)),
    }


@pytest.fixture(scope="module")
def reference() -> Reference:
    made = Reference.of(payments(0, 30_500), ReferenceConfig(window_rows=WINDOW), event_id="id")
    return Reference.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))


counts = st.lists(st.integers(0, 200), min_size=2, max_size=8)


@given(data=st.data(), window=counts)
def test_g_is_that_of_scipy(data: st.DataObject, window: list[int]) -> None:
    before = data.draw(st.lists(st.integers(0, 200), min_size=len(window), max_size=len(window)))
    table = np.array([window, before])
    g = float(g_statistic(table[0], table[1]))
    if not table.sum(1).all() or (table.sum(0) > 0).sum() < 2:
        assert g == pytest.approx(0.0, abs=1e-9)
        return
    expected = chi2_contingency(table[:, table.sum(0) > 0], correction=False, lambda_="log-likelihood")
    assert g == pytest.approx(expected.statistic, rel=1e-9, abs=1e-9)
    # Few blocks: rows are taken as independent, and p is that of χ².
    test = GTest.fitted(table[1], np.empty(0), expected.dof, np.ones(len(window)))
    assert test.log_p(g) == pytest.approx(chi2.logsf(expected.statistic, expected.dof), abs=1e-6)


@given(window=counts)
def test_g_of_a_cell_is_that_of_the_cell_and_the_rest(window: list[int]) -> None:
    now, before = np.array(window), np.arange(1, len(window) + 1) * 7
    g_C = each_against_rest(now, before)
    for i in range(len(window)):
        rest = [np.array([c[i], c.sum() - c[i]]) for c in (now, before)]
        assert g_C[i] == pytest.approx(float(g_statistic(*rest)))


@given(code=st.lists(st.integers(-1, 4), min_size=6, max_size=60), num_blocks=st.integers(1, 6))
def test_counts_of_blocks_are_those_of_a_loop(code: list[int], num_blocks: int) -> None:
    code_N = np.array(code[: len(code) // num_blocks * num_blocks])
    expected = [[int((part == c).sum()) for c in range(5)] for part in np.split(code_N, num_blocks)]
    assert block_counts(code_N, 5, num_blocks).tolist() == expected


@given(ids=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=4, max_size=40), num_blocks=st.integers(1, 4))
def test_repeats_are_those_of_a_loop(ids: list[str | None], num_blocks: int) -> None:
    ids = ids[: len(ids) // num_blocks * num_blocks]
    size = len(ids) // num_blocks
    expected = [int(v is not None and v in ids[i // size * size : i]) for i, v in enumerate(ids)]
    assert repeated(np.array(ids, dtype=object), num_blocks).tolist() == expected


@given(
    values=st.lists(st.one_of(st.just(float("nan")), st.integers(-3, 3), st.floats(-1e6, 1e6)), max_size=80),
    other=st.lists(st.floats(-1e7, 1e7), max_size=20),
)
def test_every_row_is_missing_unseen_or_in_one_cell(values: list[float], other: list[float]) -> None:
    cells = Cells.of(np.array(values, dtype=np.float64), 0.05, 10)
    table = np.array([*values, *other], dtype=np.float64)
    codes = cells.codes(Rows.of(table, np.ones(len(table), dtype=bool)))
    placed = (codes.missing_N == 1).astype(int) + (codes.unseen_N == 1) + (codes.values_N >= 0)
    assert (placed == 1).all()
    assert codes.values_N.max(initial=-1) < cells.num_cells
    assert not (codes.unseen_N[: len(values)] == 1).any()


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), min_size=4, max_size=40), st.integers(1, 4))
def test_what_shares_the_top_of_its_block_is_that_of_a_loop(values: list[float], num_blocks: int) -> None:
    value_BW = np.array(values[: len(values) // num_blocks * num_blocks]).reshape(num_blocks, -1)
    expected: list[int] = []
    for block in value_BW.tolist():
        tops = [i for i, v in enumerate(block) if all(not w > v for w in block) and not np.isnan(v)]
        expected += [-1 if np.isnan(v) else int(i in tops[1:]) for i, v in enumerate(block)]
    assert at_top(value_BW.ravel(), num_blocks).tolist() == expected


def test_restless_blocks_make_findings_rarer_and_never_more_frequent() -> None:
    rng = np.random.default_rng(1)
    steady = rng.multinomial(500, [0.7, 0.2, 0.1], 60)
    restless = np.array([rng.multinomial(500, p) for p in rng.dirichlet([70, 20, 10], 60)])
    odd = np.array([300, 120, 80])
    quiet, loud = GTest.of(steady), GTest.of(restless)
    assert max(quiet.effects) < 1.5 < min(loud.effects)
    assert quiet.log_p(float(quiet.distance(odd))) < -10 < loud.log_p(float(loud.distance(odd)))
    assert all(loud.log_p(float(g)) >= 0 for g in loud.distance(restless)[:1])
    # What only one half of the window has is no finding.
    assert quiet.log_p_of_halves(np.array([odd, steady[0]])) > -5 > quiet.log_p_of_halves(np.array([odd, odd]))


def test_a_summary_is_the_same_after_json() -> None:
    made = Reference.of(payments(0, 2_000), ReferenceConfig(window_rows=100, partners=1), event_id="id")
    assert Reference.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made
    assert ("amount", "total") in made.pairs
    scores = np.random.default_rng(0).random(3_000)
    calibration = Calibration.of(scores, scores > 0.4, window_rows=100)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict(), allow_nan=False))) == calibration


@given(
    texts=st.lists(st.one_of(st.none(), st.text(max_size=3)), min_size=100, max_size=130),
    numbers=st.lists(st.floats(width=32), min_size=130, max_size=130),
)
@settings(max_examples=20, deadline=None)
def test_any_table_of_text_and_numbers_is_summarised_and_fits_itself(
    texts: list[str | None], numbers: list[float]
) -> None:
    table = {"t": np.array(texts, dtype=object), "x": np.array(numbers[: len(texts)])}
    made = Reference.of(table, ReferenceConfig(window_rows=100))
    assert Reference.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made
    newest = {name: values[-100:] for name, values in table.items()}
    assert findings(made, newest) == []


def test_clean_windows_give_no_finding_and_no_alarm(reference: Reference) -> None:
    alarms = Alarms()
    for seed in range(100, 150):
        found = findings(reference, payments(seed))
        assert (seed, found, alarms.after(found)) == (seed, [], [])


def some(table: Table, name: str, share: float, value: Any) -> Table:
    rows = np.random.default_rng(9).random(len(table[name])) < share
    values = table[name].astype(object if isinstance(value, str) or value is None else np.float64)
    values[rows] = value
    return {**table, name: values}


def change(name: str, how: Callable[[Any], Any]) -> Callable[[Table], Table]:
    return lambda table: {**table, name: np.asarray(how(table[name]))}


def each_text(how: Callable[[str], str]) -> Callable[[Column], Column]:
    return lambda values: np.array([None if v is None else how(v) for v in values.tolist()], dtype=object)


def replayed(table: Table) -> Table:
    again = np.r_[np.arange(900), np.arange(100)]
    return {name: values[again] for name, values in table.items()}


DRIFTS: list[tuple[str, str, Callable[[Table], Table], str]] = [
    ("amount", "values", change("amount", lambda x: np.round(x * 1.4, 2)), "in training"),
    ("amount", "units", change("amount", lambda x: x * 100), "100 times"),
    ("age_s", "sign", change("age_s", lambda x: -x), "sign"),
    ("rate", "values", change("rate", lambda x: x * 2), "in training"),
    ("rate", "missing", lambda t: some(t, "rate", 0.08, np.nan), "of the rows are missing, 2."),
    ("city", "missing", lambda t: some(t, "city", 1.0, None), "100.0% of the rows are missing"),
    ("amount", "constant", change("amount", lambda x: np.full(len(x), 7.77)), "100.0% of the values are 7.77"),
    ("amount", "grain", change("amount", np.round), "multiples of 1,"),
    ("rate", "clipped", change("rate", lambda x: np.minimum(x, 1.28)), "share the largest one"),
    ("amount", "unseen", lambda t: some(t, "amount", 0.02, 1e6), "outside of"),
    ("num_items", "unseen", lambda t: some(t, "num_items", 0.03, -1.0), "outside of 0 …"),
    ("city", "unseen", lambda t: some(t, "city", 0.03, "Brest"), "unknown in training"),
    ("city", "one value", lambda t: some(t, "city", 0.2, "Lyon"), "are 'Lyon', 30"),
    ("city", "encoding", change("city", each_text(lambda v: f" {v.lower()}")), "written unlike"),
    ("rate", "exchanged", lambda t: {**t, "rate": t["tax"], "tax": t["rate"]}, "exchanged?"),
    ("tax", "relation", change("tax", lambda x: np.random.default_rng(3).permutation(x)), "goes with amount, total"),
    ("age_s", "values", lambda t: {**t, "age_s": t["age_s"] + 7200.0 * (t["rate"] > 0.3)}, "in training"),
    ("card", "one value", lambda t: some(t, "card", 0.06, "k77"), "'k77'"),
    ("events", "repeat", replayed, "10.0% came before in this window, 0.0%"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "kind", "inject", "said"), DRIFTS, ids=[f"{c} {k}" for c, k, *_ in DRIFTS])
def test_each_kind_of_drift_is_found_under_its_column_and_named(
    reference: Reference, column: str, kind: str, inject: Callable[[Table], Table], said: str
) -> None:
    alarms = Alarms()
    for seed in (500, 501):
        found = findings(reference, inject(payments(seed)))
        one = next((f for f in found if f.column == column), None)
        assert one is not None, found
        assert one.text.startswith(f"{column}: ")
        assert (one.kind, said in one.text) == (kind, True), one.text
        assert one.log_p < np.log(0.03 / reference.num_tests)
        raised = [alarm.column for alarm in alarms.after(found)]
    assert column in raised


def test_a_burst_of_one_entity_is_no_drift_of_all_and_a_hot_key_of_its_own_column(reference: Reference) -> None:
    once = Reference.of(payments(0, 30_500), ReferenceConfig(window_rows=WINDOW), entity="card")
    assert Reference.from_dict(json.loads(json.dumps(once.to_dict(), allow_nan=False))) == once
    table = payments(600)
    burst = np.random.default_rng(0).random(WINDOW) < 0.08
    table["card"][burst], table["city"][burst], table["amount"][burst] = "k77", "Lille", 9.99
    assert {"amount", "city", "card"} <= {f.column for f in findings(reference, table)}
    assert [(f.column, f.kind, f.value) for f in findings(once, table, alarm_rate=1e-3)] == [
        ("card", "one value", "k77")
    ]


def test_an_alarm_is_a_column_that_is_found_twice_in_a_row() -> None:
    def found(column: str, kind: str = "values") -> Finding:
        return Finding(column=column, kind=kind, statistic=1.0, log_p=-20.0, moved=0.1, text=f"{column}: moved")

    alarms = Alarms()
    steps: list[tuple[list[Finding], list[str]]] = [
        ([found("a")], []),
        ([found("a", "unseen"), found("b")], ["a"]),
        ([], []),
        ([found("a"), found("b")], []),
        ([found("b"), found("c")], ["b"]),
    ]
    for given_, expected in steps:
        assert [one.column for one in alarms.after(given_)] == expected


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 99])
def test_short_windows_find_nothing_by_chance(reference: Reference, num_rows: int) -> None:
    assert findings(reference, payments(7, num_rows)) == []


def test_columns_without_a_value_are_found_or_not_and_never_fail() -> None:
    empty = {"x": np.full(4_000, np.nan), "t": np.full(4_000, None, dtype=object), "y": np.arange(4_000.0) % 7}
    reference = Reference.of(empty, ReferenceConfig(window_rows=200))
    window = {name: values[:200] for name, values in empty.items()}
    assert findings(reference, window) == []
    filled = {**window, "x": np.ones(200), "t": np.full(200, "new", dtype=object), "y": np.full(200, np.inf)}
    assert {f.column: f.kind for f in findings(reference, filled)} == {"x": "missing", "t": "missing", "y": "missing"}


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda r: findings(r, {k: v for k, v in payments(1).items() if k != "tax"}), DataError, "'tax'"),
        (lambda r: findings(r, payments(1, 1001)), DataError, "1001"),
        (lambda r: findings(r, {**payments(1), "tax": np.full(WINDOW, "x")}), DataError, "'tax'"),
        (lambda r: findings(r, {**payments(1), "tax": np.zeros(3)}), DataError, r"'tax'.*\(3,\)"),
        (lambda r: findings(r, payments(1), alarm_rate=0.0), ConfigError, "alarm_rate is 0"),
        (lambda r: findings(r, payments(1), min_moved=1.5), ConfigError, r"min_moved is 1\.5"),
        (lambda r: read_columns({"c": np.array(["a", 5], dtype=object)}), DataError, "'c', row 1: 5"),
        (lambda r: Reference.of({}, ReferenceConfig()), DataError, "0 training rows"),
        (lambda r: Reference.of(payments(1, 999), ReferenceConfig()), DataError, "999 training rows"),
        (lambda r: Reference.of(payments(1), ReferenceConfig(), event_id="uid"), DataError, "event_id 'uid'"),
        (lambda r: Reference.of(payments(1), ReferenceConfig(), entity="uid"), DataError, "entity 'uid'"),
        (lambda r: ReferenceConfig(window_rows=50), ConfigError, "window_rows is 50"),
        (lambda r: Calibration.of(np.array([0.1, 1.5]), np.array([False, True])), DataError, r"row 1: 1\.5"),
        (lambda r: Calibration.of(np.full(9, 0.1), np.zeros(9, bool), window_rows=99), ConfigError, "window_rows"),
        (lambda r: Calibration.of(np.full(9, 0.1), np.zeros(9, bool)), DataError, "9 rows with 0 positives"),
        (lambda r: cell_skew({"a": np.zeros(1)}, {}, ["e"]), DataError, "'a'"),
        (lambda r: cell_skew({"a": np.zeros(1)}, {"a": np.zeros(2)}, ["e"]), DataError, "'a'"),
        (lambda r: cell_skew({}, {}, [], tolerance=-1.0), ConfigError, "tolerance"),
        (lambda r: heavy_keys("k", ["a"], np.array([4]), 4), DataError, "0 to 3"),
        (lambda r: heavy_keys("k", ["a"], np.array([0]), 0), ConfigError, "num_partitions is 0"),
    ],
)
def test_bad_input_is_named(
    reference: Reference, make: Callable[[Reference], object], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        make(reference)


def scored(seed: int, num_rows: int, factor: float = 1.0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    score = rng.beta(0.5, 10, num_rows)
    return score, rng.random(num_rows) < score * factor


def test_scores_that_ceased_to_be_true_are_found_from_labels() -> None:
    calibration = Calibration.of(*scored(0, 60_000), window_rows=4_000)
    assert not any(calibration.findings(*scored(seed, 4_000)) for seed in range(1, 40))
    assert calibration.findings(*scored(1, 1)) == calibration.findings(*scored(1, 0)) == []
    (one,) = calibration.findings(*scored(1, 4_000, 1.8))
    assert (one.column, one.kind) == ("score", "calibration")
    assert "positives in 4000 events" in one.text


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["x", "t"])), max_size=20))
def test_skew_is_found_cell_by_cell(wrong: list[tuple[int, str]]) -> None:
    table = {"x": np.linspace(-1, 1, 41), "t": np.array([f"v{i}" for i in range(40)] + [None], dtype=object)}
    table["x"][7] = np.nan
    served = {name: values.copy() for name, values in table.items()}
    for row, name in wrong:
        served[name][row] = 9.0 if name == "x" else "odd"
    found = cell_skew(served, table, [f"e{i}" for i in range(41)])
    expected = {name: {row for row, other in wrong if other == name} for name in ("x", "t")}
    assert {f.column: f.statistic for f in found} == {name: len(rows) for name, rows in expected.items() if rows}
    for one in found:
        assert one.value == f"e{min(expected[one.column])}"
    assert [f.moved for f in found] == sorted((f.moved for f in found), reverse=True)


def test_a_tolerance_forgives_rounding_and_nothing_else() -> None:
    batch = {"x": np.array([1.0, 1000.0, np.nan, 0.0])}
    served = {"x": np.array([1.0 + 1e-9, 1000.0 + 1e-6, np.nan, 0.0])}
    ids = ["a", "b", "c", "d"]
    assert [f.statistic for f in cell_skew(served, batch, ids)] == [2.0]
    assert cell_skew(served, batch, ids, tolerance=1e-8) == []
    assert len(cell_skew({"x": np.array([1.0, 1000.0, 0.0, 0.0])}, batch, ids, tolerance=1e-8)) == 1


def test_a_key_that_dominates_a_partition_is_named() -> None:
    rng = np.random.default_rng(0)
    keys = [f"k{v}" for v in rng.integers(0, 5_000, 4_000)]
    places = {key: i % 16 for i, key in enumerate(sorted({*keys, "hot"}))}
    even = np.array([places[key] for key in keys])
    assert heavy_keys("card", keys, even, 16) == []
    hot = ["hot" if rng.random() < 0.15 else key for key in keys]
    (one,) = heavy_keys("card", hot, np.array([places[key] for key in hot]), 16)
    assert (one.column, one.kind, one.value) == ("card", "partition", "hot")
    assert one.text.startswith(f"card: partition {places['hot']} holds")
    # A partition that many keys fill has nobody to blame.
    crowded = np.where(np.arange(4_000) % 4 == 0, 3, even)
    (one,) = heavy_keys("card", keys, crowded, 16)
    assert one.value is None
    assert "many keys alike" in one.text
    assert heavy_keys("card", [], np.empty(0, dtype=np.int64), 16) == []


@given(counts)
def test_moved_is_half_the_distance_of_shares(window: list[int]) -> None:
    before = np.ones(len(window), dtype=np.int64)
    share = moved(np.array(window), before)
    assert 0 <= share <= 1
    if sum(window):
        assert share == pytest.approx(0.5 * np.abs(np.array(window) / sum(window) - 1 / len(window)).sum())


def test_a_summary_holds_plain_values_only() -> None:
    made = Reference.of(payments(0, 2_000), ReferenceConfig(window_rows=100))
    assert all(isinstance(v, float) for v in made.columns["amount"].cells.known)
    assert json.loads(json.dumps(asdict(made.columns["city"].tests["values"])))["counts"]
