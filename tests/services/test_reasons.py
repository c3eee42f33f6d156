"""Reasons: every definition has words, a learned vector is one reason, and nothing gets lost in adding up."""

from typing import get_args

import numpy as np
import pytest
from assay_features.definitions import DAY_S, Aggregate, Embedding, FeaturePlan, Ratio, Where, Window
from assay_features.events import Reports
from assay_features.reports import fraud_share, ring
from assay_features.rules import Rule
from assay_services.reasons import OTHERS, ReasonWriter, rule_reason


@pytest.mark.parametrize("aggregate", get_args(Aggregate))
def test_every_aggregate_has_words(aggregate: str) -> None:
    more = {"against_s": 86_400} if aggregate == "rate" else {}
    where = Where(column="channel", values=("web",))
    window = Window(entity=("card", "store"), aggregate=aggregate, column="amount", length_s=3600, where=where, **more)  # type: ignore[arg-type]
    first, rest = ReasonWriter(FeaturePlan((window,)), (window.name,)).write(np.array([[0.5]]), {window.name: [3.0]})[0]
    assert first.text.endswith("in the last 1h (where channel web); this raises the risk")
    assert "for this card with store" in first.text
    assert rest.contribution == 0.0


def test_the_numbers_of_a_vector_are_one_reason_with_the_value_of_the_column() -> None:
    embedding = Embedding(column="store", width=3, table="0" * 12)
    ratio = Ratio(numerator="amount", denominator="card__amount__mean__7d")
    names = ("amount", *embedding.names, ratio.name)
    values = {"amount": [5.0], "store": ["s7"], ratio.name: [np.nan], **{name: [0.1] for name in embedding.names}}
    writer = ReasonWriter(FeaturePlan((embedding, ratio)), names)
    reasons = {r.feature: r for r in writer.write(np.array([[0.1, 0.5, -0.2, 0.4, -0.3]]), values)[0]}
    assert list(reasons) == ["store__embedding", ratio.name, "amount", OTHERS]
    assert reasons["store__embedding"].contribution == pytest.approx(0.7)
    assert reasons["store__embedding"].value == "s7"
    assert reasons["store__embedding"].text == "store is s7, by what was learned of it; this raises the risk"
    assert reasons[ratio.name].text.startswith("amount is unknown times")


def test_a_value_is_compared_with_the_usual_one_and_a_share_of_fraud_reads_as_one() -> None:
    reports = Reports("fraud", 7 * DAY_S)
    plan = FeaturePlan(tuple(fraud_share("card", reports, 30 * DAY_S)))
    share, count = plan.row_numeric_names[0], "card__events__count__7d"
    writer = ReasonWriter(plan, (share, count, "amount", "shop"), usual={share: 0.0, count: 1.0, "shop": "grocer"})
    frauds, judged, late = "card__fraud__sum__30d", "card__events__count__37d", count
    columns = {share: [0.25, np.nan], count: [7.0, 1.0], "amount": [12.5, 1.0], "shop": ["casino", "grocer"]}
    columns |= {frauds: [3.0, 0.0], judged: [19.0, 1.0], late: [7.0, 1.0]}
    written = writer.write(np.tile([4.0, 3.0, 2.0, 1.0], (2, 1)), columns)
    texts = {r.feature: r.text for r in written[0]}
    assert texts[share] == (
        "3 of 12 payments of this card in 30d were reported as fraud, usual is 0 %; this raises the risk"
    )
    assert texts[count] == "7 events for this card in the last 7d, usual is 1; this raises the risk"
    assert texts["shop"] == "shop is casino, usual is grocer; this raises the risk"
    assert texts["amount"] == "amount is 12.5; this raises the risk"
    later = {r.feature: r.text for r in written[1]}
    assert later[share].startswith("no payment of this card in 30d is old enough to be judged")
    assert later[count] == "1 events for this card in the last 7d; this raises the risk"


def test_a_ring_is_told_where_frauds_have_several_cards() -> None:
    reports = Reports("fraud", 7 * DAY_S)
    plan = FeaturePlan((*fraud_share("device", reports, 30 * DAY_S), ring("device", reports, "card", 30 * DAY_S)))
    share, different = plan.row_numeric_names[0], plan.helper_names[-1]
    assert different not in {share, *plan.row_numeric_names}
    names = dict(zip(("frauds", "judged", "late"), plan.numeric_names[:3], strict=True))
    columns = {share: [0.75, 0.25], different: [4.0, 1.0]}
    columns |= {names["frauds"]: [6.0, 2.0], names["judged"]: [9.0, 9.0], names["late"]: [1.0, 1.0]}
    writer = ReasonWriter(plan, (share,))
    texts = [reasons[0].text for reasons in writer.write(np.ones((2, 1)), columns)]
    assert texts[0] == (
        "6 of 8 payments of this device in 30d were reported as fraud, with 4 different values of card; "
        "this raises the risk"
    )
    assert "different" not in texts[1]


def test_a_rule_says_what_it_saw() -> None:
    rule = Rule(
        name="velocity", action="review",
        when=(Where(column="n", at_least=11.0), Where(column="shop", values=("a", "b")), Where(column="m", below=2.0)),
    )  # fmt: skip
    reason = rule_reason(rule)
    assert reason.text == "rule 'velocity' says review: n is 11 or more and shop is one of a, b and m is below 2"
    assert reason.contribution == 0.0
