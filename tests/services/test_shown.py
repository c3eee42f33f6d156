"""What of lists is taken, and how much of the catalogue they show."""

import pytest
from assay_services import shown
from assay_services.shown import ShownLists


def test_an_item_of_the_newest_list_counts_once_and_not_after_a_week() -> None:
    now = [0.0]
    lists = ShownLists(clock=lambda: now[0])
    assert not lists.taken("ann", "a")
    lists.add("ann", ["a", "b", "c"])
    assert lists.taken("ann", "a")
    assert not lists.taken("ann", "a"), "twice"
    assert not lists.taken("ann", "z")
    assert not lists.taken("bob", "b")
    lists.add("ann", ["a", "d"])
    assert not lists.taken("ann", "c"), "the list before"
    now[0] = 7 * 86400.0 + 1
    assert not lists.taken("ann", "d")


def test_coverage_is_of_the_newest_lists_and_users_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "_LISTS", 2)
    monkeypatch.setattr(shown, "_USERS", 2)
    lists = ShownLists()
    for user, items in (("1", ["a", "b"]), ("2", ["b", "c"]), ("3", ["c", "d"])):
        lists.add(user, items)
    assert lists.coverage(10) == 0.3
    assert not lists.taken("1", "a")
    assert lists.taken("3", "d")
