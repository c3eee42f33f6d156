"""Rules as data: lists and limits, checked before anything runs."""

from pathlib import Path

import numpy as np
import pytest
from assay_features.rules import check_rules, read_rules, rules_from_dict, rules_to_dict
from assay_platform.errors import SchemaError

TEXT = """
[[rules]]
name = "known mule"
action = "decline"
when = [{column = "account", values = ["A-17", 99]}]
[[rules]]
name = "too fast"
action = "review"
when = [{column = "n", at_least = 3}, {column = "account", values = ["B"]}]
[[rules]]
name = "at night"
action = "approve"
when = [{column = "hour", at_least = 22, below = 6}]
"""


def test_rules_are_read_hold_where_they_should_and_survive_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(TEXT)
    rules = read_rules(tmp_path / "rules.toml")
    assert rules_from_dict(rules_to_dict(rules)) == rules
    columns = {
        "account": np.array(["A-17", "99", "B", None, "B"], dtype=object),
        "n": np.array([1.0, np.nan, 3.0, 9.0, 2.0]),
        "hour": [23.0, 5.9, 6.0, np.nan, 12.0],
    }
    held = {rule.name: rule.holds(columns).tolist() for rule in rules}
    assert held == {
        "known mule": [True, True, False, False, False],
        "too fast": [False, False, True, False, False],
        "at night": [True, True, False, False, False],
    }
    check_rules(rules, columns)
    with pytest.raises(SchemaError, match="'too fast': 'n' is neither a column nor a feature"):
        check_rules(rules, ["account", "hour"])
    with pytest.raises(SchemaError, match="two rules have the name 'known mule'"):
        check_rules((*rules, rules[0]), columns)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[rules]]\nname = 'a'\naction = 'burn'\nwhen = [{column = 'n', below = 1}]", "'burn'"),
        ("[[rules]]\nname = 'a'\naction = 'review'\nwhen = []", "one condition at least"),
        ("[[rules]]\nname = 'a'\naction = 'review'", "'when'"),
        ("[[rules]]\nname = 'a'\naction = 'review'\nwhen = [{column = 'n'}]", "either values"),
        ("[[rules]]\nname = 'a'\naction = 'review'\nwhen = [{colum = 'n', below = 1}]", "colum"),
        ("rules = 3", "tables"),
        ("[other]\na = 1", "nothing else"),
        ("[[rules", "cannot be read"),
    ],
)
def test_a_wrong_rule_is_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(SchemaError, match=r"rules\.toml") as error:
        read_rules(tmp_path / "rules.toml")
    assert named in str(error.value)


def test_a_list_of_words_is_no_limit() -> None:
    [rule] = rules_from_dict({"rules": [{"name": "a", "action": "review", "when": [{"column": "c", "below": 1}]}]})
    with pytest.raises(SchemaError, match="'c' is no number"):
        rule.holds({"c": np.array(["x"], dtype=object)})
