"""The schema file: what is accepted, and that errors name the field."""

from pathlib import Path

import pytest
from assay_features.schema import FraudSchema, RecommendSchema, read_schema, schema_from_dict, schema_to_dict
from assay_platform.errors import SchemaError

FRAUD = {"kind": "fraud", "columns": {"timestamp": "t", "label": "y", "entities": ["c"], "numeric": ["a"]}}
MOMENTS = {"validation_from": "2017-11-01", "test_from": "2017-12-01T06:00:00+01:00"}
RECOMMEND = {"kind": "recommend", "columns": {"user": "u", "item": "i", "timestamp": "t"}}


ITEMS = {"path": "i.csv", "id": "i", "categorical": ["kind"]}
RULES = {"diversity_loss": 0.01, "new_share": 0.1, "explore": 0.05, "at_most": {"kind": 3}, "never": {"kind": ["x"]}}


@pytest.mark.parametrize(
    "document", [FRAUD, RECOMMEND, {**RECOMMEND, "split": {**MOMENTS, "max_items": 10}, "items": ITEMS, "lists": RULES}]
)
def test_a_schema_survives_the_artifact(document: dict[str, object]) -> None:
    schema = schema_from_dict(document)
    assert schema_from_dict(schema_to_dict(schema)) == schema


def test_items_and_split_are_read() -> None:
    items = {"path": "i.csv", "id": "i", "text": ["title"]}
    schema = schema_from_dict({**RECOMMEND, "items": items, "split": {"protocol": "leave-last-out", "repeats": True}})
    assert isinstance(schema, RecommendSchema)
    assert schema.items is not None
    assert schema.items.text == ("title",)
    assert schema.split.repeats
    assert schema_from_dict(schema_to_dict(schema)) == schema


def changed(**columns: object) -> dict[str, object]:
    return {**FRAUD, "columns": {**FRAUD["columns"], **columns}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"kind": "spam"}, "'spam'"),
        ({"kind": "fraud", "columns": {"timestamp": "t", "label": "y"}}, "a model needs one at least"),
        (changed(groups=[["c"]]), "two columns or more"),
        (changed(groups=[["c", "zzz"]]), "'zzz'"),
        ({**FRAUD, "labels": {"delay_days": -1}}, "delay_days = -1"),
        ({**FRAUD, "labels": {"delay": 1}}, "unknown field 'delay'"),
        ({**FRAUD, "constraints": {"integer": ["c"]}}, "no numeric column"),
        ({**FRAUD, "constraints": {"bounds": {"a": [2, 1]}}}, "must not be above"),
        ({**FRAUD, "constraints": {"bounds": {"a": [2]}}}, r"a table of \[low, high\]"),
        ({**FRAUD, "constraints": {"times": {"a": [2, 3]}}}, "must hold 1"),
        ({**FRAUD, "constraints": {"relations": ["a < b"]}}, "smaller_column <= larger_column"),
        ({**FRAUD, "constraints": {"increasing": ["a"], "decreasing": ["a"]}}, "increasing and decreasing"),
        ({**FRAUD, "constraints": {"values": {"a": ["x"]}}}, "no category or entity"),
        ({**FRAUD, "decisions": {"target_fpr": 2}}, "target_fpr = 2"),
        ({**FRAUD, "decisions": {"costs": {"review": 1}}}, "'declined_good' is missing"),
        ({**RECOMMEND, "labels": {}}, r"\[labels\] belongs"),
        (changed(entities="c"), "expected a list of strings"),
        (changed(colour="x"), "unknown field 'colour'"),
        (changed(amount="b"), "must also be listed in numeric"),
        (changed(immutable=["zzz"]), "'zzz'"),
        (changed(label="a"), "label = 'a'"),
        (changed(numeric=["a", "a"]), "more than once"),
        ({**FRAUD, "split": {"train": 0.9, "validation": 0.2}}, "train = 0.9"),
        ({**FRAUD, "split": {"train": "most"}}, "expected a number"),
        ({**FRAUD, "items": {}}, r"\[items\]"),
        ({**RECOMMEND, "split": {"protocol": "magic"}}, "'magic'"),
        ({**RECOMMEND, "split": {"test_from": "2017-12-01"}}, "validation_from = None"),
        ({**RECOMMEND, "split": {**MOMENTS, "test_from": "soon"}}, "test_from = 'soon'"),
        ({**RECOMMEND, "split": {**MOMENTS, "test_from": "2017-01-01"}}, "not before test_from"),
        ({**RECOMMEND, "split": {**MOMENTS, "protocol": "random"}}, "need protocol 'temporal'"),
        ({**RECOMMEND, "lists": {"diversity_loss": 1.5}}, "diversity_loss = 1.5"),
        ({**RECOMMEND, "lists": {"explore": 2}}, "explore = 2"),
        ({**RECOMMEND, "lists": {"new_days": 0}}, "new_days = 0"),
        ({**RECOMMEND, "lists": {"at_most": {"kind": 3}}}, "'kind' is not a category of .items.; there are none"),
        ({**RECOMMEND, "items": ITEMS, "lists": {"at_most": {"kind": 0}}}, "kind = 0"),
        ({**RECOMMEND, "items": ITEMS, "lists": {"at_most": {"kind": "few"}}}, "expected a number"),
        ({**RECOMMEND, "items": ITEMS, "lists": {"never": {"kind": "x"}}}, "never"),
        ({**RECOMMEND, "split": {"max_items": 0.5}}, "max_items = 0.5"),
        ({**FRAUD, "split": {"max_items": 10}}, "max_items belongs to kind = 'recommend'"),
        ({**FRAUD, "lists": {}}, "belongs to kind = 'recommend'"),
        ({**FRAUD, "split": MOMENTS}, "belong to kind = 'recommend'"),
        ({**RECOMMEND, "columns": {"user": "u", "item": "u", "timestamp": "t"}}, "more than once"),
        ({**FRAUD, "extra": 1}, "'extra'"),
    ],
)
def test_a_wrong_schema_is_named(document: dict[str, object], named: str) -> None:
    with pytest.raises(SchemaError, match=named):
        schema_from_dict(document)


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"none\.toml"):
        read_schema(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("kind = ")
    with pytest.raises(SchemaError, match=r"broken\.toml.*not valid TOML"):
        read_schema(broken)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SchemaError, match=r"binary\.toml"):
        read_schema(binary)


def test_a_column_may_be_entity_and_category_but_is_read_once() -> None:
    schema = schema_from_dict(changed(categorical=["c", "d"]))
    assert isinstance(schema, FraudSchema)
    assert schema.keys == ("c", "d")


def test_all_that_a_fraud_schema_can_say_survives_the_round_trip() -> None:
    document = {
        **FRAUD,
        "labels": {"delay_days": 7},
        "constraints": {"bounds": {"a": [0, 5]}, "times": {"a": [0.5, 2]}, "integer": ["a"], "increasing": ["a"]},
        "decisions": {"target_fpr": 0.01, "review_fpr": 0.05, "costs": {"declined_good": 20, "review": 3}},
    }
    schema = schema_from_dict(document)
    assert isinstance(schema, FraudSchema)
    assert schema.label_delay_days == 7
    assert schema.constraints.bounds == {"a": (0, 5)}
    assert schema.decisions.costs is not None
    assert schema_from_dict(schema_to_dict(schema)) == schema


def test_actions_and_their_column_belong_together() -> None:
    columns = {**RECOMMEND["columns"], "action": "did"}
    schema = schema_from_dict({**RECOMMEND, "columns": columns, "actions": {"order": ["view", "buy"]}})
    assert isinstance(schema, RecommendSchema)
    assert schema.keys[-1] == "did"
    assert schema_from_dict(schema_to_dict(schema)) == schema
    for document, message in (
        ({"columns": columns}, "belong together"),
        ({"actions": {"order": ["view", "buy"]}}, "belong together"),
        ({"columns": columns, "actions": {"order": ["view"]}}, "two different actions"),
        ({"columns": columns, "actions": {"order": ["view", "view"]}}, "two different actions"),
        ({"columns": columns, "actions": {}}, "'order' is missing"),
    ):
        with pytest.raises(SchemaError, match=message):
            schema_from_dict({**RECOMMEND, **document})
