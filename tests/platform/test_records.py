"""What is kept of decisions, and how it is forgotten."""

from pathlib import Path

from assay_platform.tracking.records import DecisionRecords


def test_what_matches_is_forgotten_whether_it_is_on_disk_yet_or_not(tmp_path: Path) -> None:
    records = DecisionRecords(tmp_path, flush_s=60.0)
    records.remember({f"old {i}": {"event": {"card": f"c{i % 3}"}} for i in range(2500)})
    records.flush()
    records.remember({"new": {"event": {"card": "c1"}}, "other": {"event": {"card": "c2"}}})
    assert records.erase(lambda record: record["event"]["card"] == "c1") == 833 + 1
    assert records.get("new") is None
    assert records.get("old 1") is None
    assert records.get("old 2") is not None
    assert records.get("other") is not None
    assert records.erase(lambda record: record["event"]["card"] == "c1") == 0
    records.close()


def test_whatever_an_event_has_comes_back_from_disk(tmp_path: Path) -> None:
    event = {"card": 10**30, "name": "Åse \u2028", "none": None, "half": 0.5, "small": -1}
    records = DecisionRecords(tmp_path)
    records.remember({"one": {"event": event}})
    records.flush()
    records.remember({"one": {"label": {"fraud": True}}})
    records.flush()
    assert records.get("one") == {"event": event, "label": {"fraud": True}}
    records.close()


def test_records_that_nothing_was_added_to_for_long_go_and_others_stay(tmp_path: Path) -> None:
    records = DecisionRecords(tmp_path)
    records.remember({f"e{i:03}": {"event": {}, "kept_at": float(i)} for i in range(250)})
    records.remember({"e000": {"decision": {"decided_at": 500.0}}, "e001": {"label": {"reported_at": 500.0}}})
    records.remember({"before times were noted": {"event": {}}})
    records.flush()
    looked_at = [records.erase_old(200.0) for _ in range(4)]
    assert sum(looked_at) == 198
    assert max(looked_at) <= 100, "a part of them each time"
    assert records.get("e000") is not None
    assert records.get("e001") is not None
    assert records.get("e002") is None
    assert records.get("e200") is not None
    assert records.get("before times were noted") is not None
    records.close()
