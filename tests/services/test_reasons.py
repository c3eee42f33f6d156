"""Reasons: every definition has words, a learned vector is one reason, and nothing gets lost in adding up."""

from typing import get_args

import numpy as np
import pytest
from assay_features.definitions import Aggregate, Embedding, FeaturePlan, Ratio, Where, Window
from assay_services.reasons import OTHERS, ReasonWriter


@pytest.mark.parametrize("aggregate", get_args(Aggregate))
def test_every_aggregate_has_words(aggregate: str) -> None:
    more = {"against_s": 86_400} if aggregate == "rate" else {}
    where = Where(column="channel", values=("web",))
    window = Window(entity=("card", "store"), aggregate=aggregate, column="amount", length_s=3600, where=where, **more)  # type: ignore[arg-type]
    first, rest = ReasonWriter(FeaturePlan((window,)), (window.name,)).write(np.array([0.5]), {window.name: 3.0})
    assert first.text.endswith("in the last 1h (where channel web); this raises the risk")
    assert "for this card with store" in first.text
    assert rest.contribution == 0.0


def test_the_numbers_of_a_vector_are_one_reason_with_the_value_of_the_column() -> None:
    embedding = Embedding(column="store", width=3, table="0" * 12)
    ratio = Ratio(numerator="amount", denominator="card__amount__mean__7d")
    names = ("amount", *embedding.names, ratio.name)
    values = {"amount": 5.0, "store": "s7", ratio.name: np.nan, **dict.fromkeys(embedding.names, 0.1)}
    writer = ReasonWriter(FeaturePlan((embedding, ratio)), names)
    reasons = {r.feature: r for r in writer.write(np.array([0.1, 0.5, -0.2, 0.4, -0.3]), values)}
    assert list(reasons) == ["store__embedding", ratio.name, "amount", OTHERS]
    assert reasons["store__embedding"].contribution == pytest.approx(0.7)
    assert reasons["store__embedding"].value == "s7"
    assert reasons["store__embedding"].text == "store is s7, by what was learned of it; this raises the risk"
    assert reasons[ratio.name].text.startswith("amount is unknown times")
