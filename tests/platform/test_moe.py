"""The MoE backbone against an obvious loop, and what embeddings promise."""

import pytest
import torch
from assay_platform.errors import ConfigError
from assay_platform.moe import Backbone, BackboneConfig, CategoricalEmbedding, MoELayer, PiecewiseLinearEmbedding
from assay_platform.moe.balance import balance_loss, jensen_shannon_imbalance
from assay_platform.moe.router import Routing
from hypothesis import given, settings
from hypothesis import strategies as st


def obvious_layer(layer: MoELayer, x_ND: torch.Tensor) -> torch.Tensor:
    """One row and one expert at a time."""
    routing = layer.router(x_ND)
    rows = []
    for n in range(len(x_ND)):
        y = layer.shared.run_one(0, x_ND[n : n + 1])
        for expert, gate in zip(routing.expert_NK[n].tolist(), routing.gate_NK[n], strict=True):
            y = y + gate * layer.routed.run_one(expert, x_ND[n : n + 1])
        rows.append(y)
    return torch.cat(rows) if rows else x_ND.clone()


@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 64])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 2), (16, 3)])
def test_layer_equals_the_obvious_loop_in_values_and_gradients(num_rows: int, num_experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 12, num_experts, top_k)
    x = torch.randn(num_rows, 8)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours).y_ND, obvious_layer(layer, theirs)
    torch.testing.assert_close(y, expected)
    if num_rows:
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_layer_takes_a_non_contiguous_batch() -> None:
    layer = MoELayer(8, 8, 4, 2)
    x = torch.randn(8, 16).T[:, :8]
    torch.testing.assert_close(layer(x).y_ND, layer(x.contiguous()).y_ND)


def test_no_row_is_dropped_when_all_choose_one_expert() -> None:
    layer = MoELayer(8, 8, 4, 1)
    torch.nn.init.zeros_(layer.router.gate.weight)  # ties: everything goes to one expert
    x = torch.randn(50, 8)
    torch.testing.assert_close(layer(x).y_ND, obvious_layer(layer, x))


def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    backbone = Backbone(5, BackboneConfig(width=16, hidden=8, num_experts=4)).eval()
    x = torch.randn(20, 5)
    torch.testing.assert_close(backbone(x).y_ND[3:4], backbone(x[3:4]).y_ND, rtol=1e-4, atol=1e-5)


def test_balance_loss_is_one_when_even_and_e_when_collapsed() -> None:
    even = Routing(torch.arange(4).view(4, 1), torch.ones(4, 1), torch.full((4, 4), 0.25))
    one = torch.zeros(4, 4)
    one[:, 0] = 1.0
    collapsed = Routing(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), one)
    assert balance_loss(even, 4).item() == pytest.approx(1.0)
    assert balance_loss(collapsed, 4).item() == pytest.approx(4.0)
    assert jensen_shannon_imbalance(torch.full((4,), 0.25)) == pytest.approx(0.0, abs=1e-6)
    assert jensen_shannon_imbalance(torch.tensor([1.0, 0, 0, 0])) > 0.3


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


@pytest.mark.parametrize("change", [{"width": 0}, {"top_k": 9}, {"dropout": 1.0}])
def test_an_impossible_shape_is_refused_by_name(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        BackboneConfig(**change)
