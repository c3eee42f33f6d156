"""The fraud model: encoding, additive reasons, calibration, artifact."""

import json
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
import torch
from assay_platform.errors import ArtifactError, ConfigError, InputError
from assay_platform.models.calibration import PlattCalibration, fit_platt, sigmoid, threshold_at_fpr
from assay_platform.models.decisions import Policy
from assay_platform.models.embeddings import CategoricalEmbedding, PiecewiseLinearEmbedding
from assay_platform.models.encoding import TabularEncoder, fit_encoder, typical_row
from assay_platform.models.explain import Origin, integrated_gradients, segments_for
from assay_platform.models.fraud import Blend, FraudModel, FraudModelParts, FraudNet, FraudNetConfig
from assay_platform.models.trees import TreeEnsemble
from assay_platform.moe import BackboneConfig, MoELayer
from hypothesis import given, settings
from hypothesis import strategies as st


def columns(num_rows: int = 200) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    word = np.empty(num_rows, dtype=object)
    word[:] = [None if i % 9 == 0 else "abc"[i % 3] for i in range(num_rows)]
    return {"x": rng.normal(size=num_rows), "y": np.where(rng.random(num_rows) < 0.2, np.nan, 1.0), "word": word}


@pytest.fixture
def model() -> FraudModel:
    torch.manual_seed(0)
    table = columns()
    encoder, edges = fit_encoder(table, numeric=["x", "y"], categorical=["word"], num_bins=4, max_categories=10)
    config = FraudNetConfig(embedding_dim=4, num_bins=4, backbone=BackboneConfig(width=16, hidden=8, num_experts=4))
    net = FraudNet(edges, encoder.cardinalities, config).eval()
    torch.nn.init.normal_(net.head.weight)
    rows = encoder.apply(table)
    labels = np.arange(len(rows.values_NF)) % 3 == 0
    booster = lgb.train(
        {"objective": "binary", "verbosity": -1, "min_data_in_leaf": 3}, lgb.Dataset(rows.numbers(), labels), 9
    )
    return FraudModel(
        FraudModelParts(
            net=net,
            encoder=encoder,
            config=config,
            reference=typical_row(rows),
            trees=TreeEnsemble.from_lightgbm(booster),
            blend=Blend(net=0.4, trees=0.7),
            calibration=PlattCalibration(slope=0.7, intercept=-1.0),
            policy=Policy(decline_from=0.4, review_from=0.3),
        )
    )


@pytest.mark.parametrize("blend", [Blend(net=1.0, trees=0.0), Blend(net=0.0, trees=1.0)])
def test_a_part_without_weight_does_nothing_and_is_not_saved(model: FraudModel, blend: Blend, tmp_path: Path) -> None:
    alone = model.changed(blend=blend)
    rows = alone.encode(columns())
    part = model.net_logits(rows) if blend.net else model.parts.trees.logits(rows.numbers())
    np.testing.assert_allclose(alone.logits(rows), part, atol=1e-9)
    alone.save(tmp_path, {})
    np.testing.assert_array_equal(FraudModel.load(tmp_path).logits(rows), alone.logits(rows))


@pytest.mark.parametrize(("net", "trees"), [(0.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_a_blend_of_nothing_is_refused(net: float, trees: float) -> None:
    with pytest.raises(ConfigError, match="blend"):
        Blend(net=net, trees=trees)


def test_slopes_say_what_a_small_change_does(model: FraudModel) -> None:
    rows = model.encode({name: column[:40] for name, column in columns().items()})
    slopes, before = model.net_slopes(rows), model.net_logits(rows)
    step = torch.tensor([1e-3, 0.0])
    moved = model.net_logits(rows._replace(values_NF=rows.values_NF + step))
    found = (moved - before) / 1e-3
    near = np.abs(found - slopes.numbers[:, 0]) < 0.05 * np.abs(found).max()
    assert near.mean() > 0.9  # the rest lies beside the edge of a bin or of an expert
    assert (slopes.numbers[np.isnan(rows.values_NF.numpy()[:, 1]), 1] == 0).all()
    falls = slopes.codes[0]
    np.testing.assert_allclose(falls[np.arange(40), rows.codes_NC[:, 0].numpy()], 0.0, atol=1e-6)
    other = model.net_logits(rows._replace(codes_NC=torch.full_like(rows.codes_NC, 2))) - before
    assert np.corrcoef(other, falls[:, 2])[0, 1] > 0.8


def test_the_reference_row_is_its_own_base_and_contributes_nothing(model: FraudModel) -> None:
    reference = model.parts.reference
    scores, explanation = model.explain(reference)
    assert np.abs(explanation.contribution_NG).max() < 1e-6
    assert scores.probability[0] == pytest.approx(sigmoid(explanation.base), abs=1e-6)
    assert model.reference_columns()["y"] == 1.0


def test_categories_with_many_values_have_no_vector_but_a_share_in_the_reasons() -> None:
    rng = np.random.default_rng(0)
    card = np.array([f"card {i}" for i in rng.integers(0, 60, 3000)], dtype=object)
    table = {"x": rng.normal(size=3000), "card": card}
    encoder, edges = fit_encoder(table, numeric=["x"], categorical=["card"], num_bins=4, max_categories=100)
    config = FraudNetConfig(num_bins=4, max_embedded=20, backbone=BackboneConfig(width=16, hidden=8, num_experts=4))
    net = FraudNet(edges, encoder.cardinalities, config)
    assert net.embedded == []
    rows = encoder.apply(table)
    labels = rows.codes_NC[:, 0].numpy() > 30
    booster = lgb.train({"objective": "binary", "verbosity": -1}, lgb.Dataset(rows.numbers(), labels), 5)
    parts = FraudModelParts(
        net=net, encoder=encoder, config=config, reference=typical_row(rows),
        trees=TreeEnsemble.from_lightgbm(booster), blend=Blend(net=1.0, trees=1.0),
    )  # fmt: skip
    _, explanation = FraudModel(parts).explain(rows)
    assert np.abs(explanation.contribution_NG[:, 1]).max() > 0.1


def test_contributions_add_up_to_the_calibrated_score(model: FraudModel) -> None:
    rows = model.encode(columns())
    scores, explanation = model.explain(rows)
    total = sigmoid(explanation.base + explanation.contribution_NG.sum(axis=1))
    np.testing.assert_allclose(total, model.score(rows).probability, atol=1e-5)
    np.testing.assert_allclose(scores.probability, model.score(rows).probability, atol=1e-5)


def explained(linear: Any, rest: Any, x: torch.Tensor, reference: torch.Tensor, **options: Any) -> Any:
    return integrated_gradients(linear, rest, x, Origin.of(linear, rest, reference), **options)


def test_a_feature_at_its_reference_contributes_nothing() -> None:
    x = torch.randn(5, 3, 2)
    reference = torch.randn(3, 2)
    x[:, 1] = reference[1]
    contribution, _ = explained(lambda e: e.flatten(1), lambda h: (h**2).sum(1), x, reference)
    assert contribution[:, 1].abs().max() < 1e-6


def test_the_path_is_walked_behind_the_linear_map() -> None:
    """f(x) = Σ (a·x)³: from 0, the integrated gradient of a feature is its own part of a·x, times (a·x)²."""
    torch.manual_seed(0)
    a, x = torch.randn(4, 3 * 2), torch.randn(5, 3, 2)
    contribution, base = explained(
        lambda e: e.flatten(1) @ a.T, lambda h: (h**3).sum(1), x, torch.zeros(3, 2), num_segments=512
    )
    h = x.flatten(1) @ a.T
    expected = torch.einsum("nd,dgp,ngp->ng", h**2, a.view(4, 3, 2), x)  # ∫ 3 (t h)² dt = h²
    torch.testing.assert_close(contribution, expected.double(), rtol=1e-3, atol=1e-3)
    assert float(base) == 0.0


@pytest.mark.parametrize("options", [{"num_members": 4}, {"numeric_embedding": "periodic"}])
def test_other_nets_learn_explain_and_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    edges = torch.linspace(-2, 2, 5).expand(2, 5)
    config = FraudNetConfig(
        embedding_dim=4, num_bins=4, backbone=BackboneConfig(width=16, hidden=8, num_experts=4), **options
    )
    torch.manual_seed(0)
    net = FraudNet(edges, (3,), config)
    encoder = TabularEncoder(numeric=("x", "y"), categorical=("word",), vocabularies=(("a", "b"),))
    rows = encoder.apply({"x": [0.1, np.nan, 9.0], "y": [np.nan, 0.0, -1.0], "word": ["a", "c", None]})
    logits, _ = net(rows)
    logits.sum().backward()
    first = [*net.numeric.parameters(), net.head.weight, *([net.scale] if net.scale is not None else [])]
    assert all(p.grad is not None for p in first)
    model = FraudModel(FraudModelParts(net=net, encoder=encoder, config=config, reference=rows.rows(slice(0, 1))))
    _, explanation = model.explain(rows)
    total = explanation.base + explanation.contribution_NG.sum(axis=1)
    np.testing.assert_allclose(sigmoid(total), model.score(rows).probability, atol=1e-6)
    model.save(tmp_path / "m", {})
    np.testing.assert_array_equal(
        FraudModel.load(tmp_path / "m").score(rows).probability, model.score(rows).probability
    )


def test_completeness_holds_across_a_jump() -> None:
    def jumpy(h: torch.Tensor) -> torch.Tensor:
        total = h.sum(1)
        return total + 3.0 * (total > 1.0)

    x, reference = torch.full((1, 2, 1), 2.0), torch.zeros(2, 1)
    contribution, base = explained(lambda e: e.flatten(1), jumpy, x, reference)
    assert float(contribution.sum() + base) == pytest.approx(7.0, abs=1e-6)


def test_new_rare_and_missing_categories_share_the_trained_row_zero(model: FraudModel) -> None:
    table = {"x": [0.0] * 3, "y": [1.0] * 3, "word": ["never seen", None, "a"]}
    codes = model.encode(table).codes_NC[:, 0].tolist()
    assert codes[:2] == [0, 0]
    assert codes[2] > 0


def test_numbers_beyond_float32_still_score(model: FraudModel) -> None:
    rows = model.encode({"x": [1e300, -1e300], "y": [np.nan, 1.0], "word": [None, None]})
    assert np.isfinite(model.score(rows).probability).all()


def test_a_missing_column_is_named(model: FraudModel) -> None:
    with pytest.raises(InputError, match="'word' is missing"):
        model.encode({"x": [0.0], "y": [0.0]})


def test_saved_and_loaded_the_model_scores_the_same(model: FraudModel, tmp_path: Path) -> None:
    model.save(tmp_path, {"features": {"plan": {}}})
    loaded = FraudModel.load(tmp_path)
    rows = model.encode(columns())
    np.testing.assert_array_equal(loaded.score(rows).probability, model.score(rows).probability)
    np.testing.assert_allclose(loaded.explain(rows)[1].contribution_NG, model.explain(rows)[1].contribution_NG)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]


@pytest.mark.parametrize("damage", ["flip", "truncate", "kind", "missing", "field"])
def test_a_damaged_artifact_is_refused(model: FraudModel, tmp_path: Path, damage: str) -> None:
    model.save(tmp_path, {})
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "missing":
        weights.unlink()
    else:
        document = json.loads(config.read_text())
        if damage == "kind":
            document["kind"] = "recommend"
        else:
            del document["config"]["encoder"]["numeric"]
        config.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        FraudModel.load(tmp_path)


def test_platt_recovers_the_scale_of_logits() -> None:
    rng = np.random.default_rng(0)
    true_logit = rng.normal(-2, 2, 20_000)
    labels = rng.random(20_000) < sigmoid(true_logit)
    fitted = fit_platt(true_logit / 3 + 1, labels)
    assert fitted.slope == pytest.approx(3, rel=0.1)
    assert fitted.probability(true_logit / 3 + 1).mean() == pytest.approx(labels.mean(), abs=0.005)


def test_platt_of_a_useless_model_answers_the_base_rate() -> None:
    logits = np.r_[np.full(50, 1.0), np.full(50, -1.0)]
    labels = np.r_[np.zeros(50, bool), np.arange(50) < 20]
    np.testing.assert_allclose(fit_platt(logits, labels).probability(logits), 0.2, atol=0.01)


def test_one_class_cannot_be_calibrated() -> None:
    with pytest.raises(InputError, match="both classes"):
        fit_platt(np.zeros(3), np.zeros(3, bool))


@pytest.mark.parametrize("fpr", [0.0, 0.003, 0.1, 1.0])
def test_threshold_flags_at_most_the_allowed_negatives_even_with_ties(fpr: float) -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 50, 2000) / 50, rng.random(2000) < 0.1
    flagged = scores >= threshold_at_fpr(scores, labels, fpr)
    assert flagged[~labels].mean() <= fpr


def test_a_payment_is_scored_while_an_expert_is_lost_and_operators_see_it(model: FraudModel) -> None:
    from assay_platform.monitoring.metrics import ServiceMetrics

    rows = model.encode(columns())
    healthy = model.score(rows).probability

    def base_is_the_reference() -> bool:
        return bool(np.isclose(sigmoid(np.array(model.explain(rows)[1].base)), model.score(reference).probability[0]))

    reference = model.parts.reference
    assert base_is_the_reference()
    metrics = ServiceMetrics()
    metrics.watch_experts(lambda: {"fraud": model.fences})
    assert 'assay_experts_fenced{application="fraud",layer="0"} 0.0' in metrics.render().decode()
    layer = model._net.backbone.layers[0]
    assert isinstance(layer, MoELayer)
    weights = [{name: value.clone() for name, value in expert.state_dict().items()} for expert in layer.pool]
    for expert in range(3):  # of four, two of which a row chooses
        layer.pool[expert].w_out_HD.fill_(float("nan"))
    scores, explanation = model.explain(rows)
    assert np.isfinite(model.score(rows).probability).all()
    assert np.isfinite(explanation.contribution_NG).all()
    np.testing.assert_allclose(scores.probability, model.score(rows).probability, atol=1e-5)
    lost = [fence.expert for fence in model.fences[0].fenced()]
    assert lost
    assert base_is_the_reference()
    text = metrics.render().decode()
    assert f'assay_experts_fenced{{application="fraud",layer="0"}} {len(lost)}.0' in text
    assert f'assay_expert_failures_total{{application="fraud",layer="0"}} {len(lost)}.0' in text
    for expert in range(3):
        layer.restore(expert, weights[expert])
    np.testing.assert_array_equal(model.score(rows).probability, healthy)
    assert base_is_the_reference()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_piecewise_linear_encoding_keeps_order(values: list[float]) -> None:
    edges = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.linspace(0, 1, 9, dtype=torch.float64))
    embedding = PiecewiseLinearEmbedding(edges.float().unsqueeze(0), 1)
    torch.nn.init.ones_(embedding.weight_FBP)
    embedding.weight_FBP.data[:, -1] = 0.0  # the bin for missing values
    ordered = embedding(torch.tensor(sorted(values)).float().unsqueeze(1)).flatten()
    assert (ordered.diff() >= -1e-4).all()


def test_missing_infinite_and_constant_numbers_stay_finite() -> None:
    edges = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    embedding = PiecewiseLinearEmbedding(edges, 4)
    out = embedding(torch.tensor([[float("nan"), 5.0], [3e38, -3e38], [0.5, float("nan")]]))
    assert out.isfinite().all()
    assert not torch.equal(out[0, 0], out[2, 0])


def test_categories_of_different_columns_do_not_share_rows() -> None:
    embedding = CategoricalEmbedding((3, 2), 4)
    out = embedding(torch.tensor([[0, 0], [2, 1]]))
    assert len({tuple(v.tolist()) for v in out.flatten(0, 1)}) == 4


def test_a_part_that_says_little_is_walked_in_fewer_steps() -> None:
    assert [segments_for(share) for share in (1.0, 0.6, 0.3, 0.1, 0.0)] == [3, 3, 2, 2, 1]
