"""The MoE layer against an obvious loop, for every router; balance, capacity, and what one may do to experts."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from assay_platform.errors import ConfigError, InputError, WorkError
from assay_platform.models.artifact import load_weights
from assay_platform.moe import (
    ROUTERS,
    Backbone,
    BackboneConfig,
    CapacityConfig,
    Expert,
    ExpertSpec,
    MoELayer,
    Router,
    Routing,
)
from assay_platform.moe.balance import AuxiliaryLoss, LoadForecast, jensen_shannon_imbalance, utilisation
from assay_platform.moe.capacity import ElasticCapacity
from assay_platform.monitoring.routing import LayerReport, RoutingMonitor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SPECS = (
    ExpertSpec(hidden=12),
    ExpertSpec(hidden=5, kind="gelu"),
    ExpertSpec(hidden=7, columns=(2, 5)),
    ExpertSpec(hidden=3, kind="gelu", columns=(0, 1)),
)


def obvious_layer(layer: MoELayer, x_ND: Tensor, routing: Routing) -> Tensor:
    """One row and one expert at a time."""
    rows = []
    for n in range(len(x_ND)):
        x = x_ND[n : n + 1]
        y = layer.pool.always(x)
        for expert, gate in zip(routing.expert_NK[n].tolist(), routing.gate_NK[n], strict=True):
            if expert >= 0:
                y = y + gate * layer.pool[expert](x)
        rows.append(y)
    return torch.cat(rows) if rows else x_ND.clone()


def trained(layer: MoELayer, steps: int = 20, num_rows: int = 64, skew: float = 0.0) -> MoELayer:
    """Some steps toward a random target."""
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(1)
    layer.train()
    for _ in range(steps):
        x = torch.randn(num_rows, layer.width, generator=generator) + skew
        out = layer(x)
        ((out.y_ND - x.sin()).square().mean() + out.balance_loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        layer.router.after_step()
    return layer


# ------------------------------------------------------------------------------------------------ against the oracle


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 33])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 2), (9, 3)])
def test_layer_equals_the_obvious_loop_in_values_and_gradients(
    router: str, num_rows: int, num_experts: int, top_k: int
) -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 12, num_experts, top_k, router=router)
    x = torch.randn(num_rows, 8)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer(ours)
    expected = obvious_layer(layer, theirs, layer.router(theirs)[0])
    torch.testing.assert_close(out.y_ND, expected)
    if num_rows:
        grads = [
            torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()], allow_unused=True)
            for y, leaf in ((out.y_ND, ours), (expected, theirs))
        ]
        for a, b in zip(*grads, strict=True):
            if b is None or a is None:
                assert a is None or not a.any()
                continue
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_experts_of_different_kinds_and_sizes_equal_the_obvious_loop() -> None:
    torch.manual_seed(0)
    layer = MoELayer(6, 8, 4, 2, experts=SPECS, num_shared=2)
    x = torch.randn(40, 6)
    out = layer(x)
    torch.testing.assert_close(out.y_ND, obvious_layer(layer, x, out.routing))
    assert set(out.routing.expert_NK.flatten().tolist()) == {0, 1, 2, 3}


def test_layer_takes_a_non_contiguous_batch_and_autocast() -> None:
    layer = MoELayer(8, 8, 4, 2).eval()
    x = torch.randn(8, 16).T[:, :8]
    torch.testing.assert_close(layer(x).y_ND, layer(x.contiguous()).y_ND)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.y_ND.dtype == torch.bfloat16
    assert out.routing.gate_NK.dtype == torch.float32
    torch.testing.assert_close(out.y_ND.float(), layer(x).y_ND, rtol=0.05, atol=0.1)


def test_no_row_is_dropped_when_all_choose_one_expert() -> None:
    layer = MoELayer(8, 8, 4, 1)
    torch.nn.init.zeros_(layer.router.scores.weight_ED)  # ties: everything goes to one expert
    x = torch.randn(50, 8)
    out = layer(x)
    assert len(out.routing.expert_NK.unique()) == 1
    torch.testing.assert_close(out.y_ND, obvious_layer(layer, x, out.routing))


def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    for router in ROUTERS:
        backbone = Backbone(5, BackboneConfig(width=16, hidden=8, num_experts=4, router=router)).eval()
        x = torch.randn(20, 5)
        torch.testing.assert_close(backbone(x).y_ND[3:4], backbone(x[3:4]).y_ND, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_serving_a_small_batch_gives_what_training_gives_and_follows_every_change(router: str) -> None:
    torch.manual_seed(0)
    layer = trained(MoELayer(8, 8, 6, 2, router=router), steps=30, skew=0.5).eval()
    x = torch.randn(50, 8)

    def same() -> bool:
        expected = layer(x)  # with gradients: the operators one by one
        with torch.inference_mode():
            served = [layer(x), *(layer(x[n : n + 1]) for n in range(5))]
        torch.testing.assert_close(served[0].y_ND, expected.y_ND, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(served[0].routing.gate_NK, expected.routing.gate_NK, rtol=1e-4, atol=1e-5)
        assert torch.equal(served[0].routing.expert_NK, expected.routing.expert_NK)
        for n, one in enumerate(served[1:]):
            torch.testing.assert_close(one.y_ND, expected.y_ND[n : n + 1], rtol=1e-4, atol=1e-5)
        return True

    assert same()
    with torch.no_grad():
        layer.pool[3].w_in_DF.mul_(2.0)
    assert same()
    layer.add(like=0)
    assert same()
    trained(layer, steps=30).eval()
    assert same()
    layer.remove(1)
    assert same()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.pool[0].w_in_DF.zero_()
    assert same()
    twin.load_state_dict(layer.state_dict())
    with torch.inference_mode():
        assert torch.equal(twin(x).y_ND, layer(x).y_ND)
    layer.isolate([0, 2, 3])
    assert same()
    layer.open_all()
    assert same()
    layer.replace(0, Expert(8, ExpertSpec(hidden=3, kind="gelu")))
    assert same()
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert same()
    layer.double().float()
    assert same()


# ------------------------------------------------------------------------------------------------ routers


@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_chooses_distinct_experts_with_gates_that_add_up(router: str) -> None:
    torch.manual_seed(0)
    made = Router(router, 8, 9, 3)
    routing, loss = made(torch.randn(64, 8))
    assert loss.ndim == 0
    for experts, gates in zip(routing.expert_NK.tolist(), routing.gate_NK.tolist(), strict=True):
        taken = [e for e in experts if e >= 0]
        assert len(taken) == len(set(taken))
        assert all(g == 0.0 for e, g in zip(experts, gates, strict=True) if e < 0)
        if router != "relu":
            assert len(taken) == 3
            assert sum(gates) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(routing.probability_NE.sum(dim=1), torch.ones(64))


@pytest.mark.parametrize("router", ROUTERS)
def test_only_allowed_experts_are_chosen(router: str) -> None:
    torch.manual_seed(0)
    made = Router(router, 8, 6, 2)
    allowed = torch.tensor([False, True, False, False, False, False])
    routing, _ = made(torch.randn(30, 8), allowed)
    assert set(routing.expert_NK.flatten().tolist()) <= {1, -1}
    assert routing.gate_NK[routing.expert_NK < 0].eq(0).all()


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"unbalanced"}))
def test_a_balance_evens_out_what_no_balance_leaves_uneven(router: str) -> None:
    def imbalance(name: str) -> float:
        torch.manual_seed(0)
        layer = trained(MoELayer(8, 8, 8, 2, router=name), steps=300, num_rows=128, skew=0.7)
        generator = torch.Generator().manual_seed(2)
        with RoutingMonitor(layer) as monitor:
            layer(torch.randn(4096, 8, generator=generator) + 0.7)
        return monitor.metrics()["moe..imbalance"]

    assert imbalance(router) < 0.6 * imbalance("unbalanced")


def test_relu_gates_settle_at_about_k_experts_a_row() -> None:
    torch.manual_seed(0)
    layer = trained(MoELayer(8, 8, 12, 2, router="relu"), steps=400)
    routing = layer(torch.randn(500, 8)).routing
    chosen = (routing.expert_NK >= 0).sum(dim=1).float()
    assert chosen.mean() == pytest.approx(2.0, abs=1.0)
    assert len(chosen.unique()) > 1  # some rows take more than others


def test_a_forecast_steers_only_once_it_beats_the_load_now() -> None:
    balance = LoadForecast(4, 2)
    even = torch.full((4,), 0.25)
    tilt = torch.tensor([0.15, 0.05, -0.05, -0.15])
    for step in range(30):
        balance.observe(even + tilt * (-1) ** step, torch.tensor(2.0))
    assert not balance.active
    for step in range(30, 600):  # the load swings from step to step: 'same as now' is always wrong
        balance.observe(even + tilt * (-1) ** step, torch.tensor(2.0))
    assert balance.active
    next_load = (even + tilt * (-1) ** 600) * 4
    torch.testing.assert_close(balance.forecast_E, next_load, atol=0.2, rtol=0.0)
    ahead = balance.factor_E.lerp(balance.forecast_E, 0.05)
    torch.testing.assert_close(balance.steer(), -2.0 * (ahead - 1.0))
    noise = LoadForecast(4, 2)
    generator = torch.Generator().manual_seed(0)
    level = even.clone()
    for _ in range(300):  # a random walk: nothing beats the load now
        level = (level + 0.01 * torch.randn(4, generator=generator)).clamp_min(0.05)
        noise.observe(level / level.sum(), torch.tensor(2.0))
    assert noise.errors[0] >= 0.9 * noise.errors[1]


def test_auxiliary_loss_is_its_weight_when_even_and_e_times_that_when_collapsed() -> None:
    balance = AuxiliaryLoss(4, 1, weight=1.0)
    even, one = torch.full((4,), 0.25), torch.tensor([1.0, 0, 0, 0])
    assert balance.loss(even, even.expand(6, 4), even).item() == pytest.approx(1.0)
    assert balance.loss(one, one.expand(6, 4), one).item() == pytest.approx(4.0)
    assert jensen_shannon_imbalance(even) == pytest.approx(0.0, abs=1e-6)
    assert jensen_shannon_imbalance(one) > 0.3
    assert utilisation(even) == pytest.approx(1.0)
    assert utilisation(one) == pytest.approx(0.25)
    assert utilisation(torch.zeros(4)) == 0.0


@pytest.mark.parametrize("router", ROUTERS)
def test_router_state_is_part_of_the_checkpoint(router: str) -> None:
    torch.manual_seed(0)
    layer = trained(MoELayer(8, 8, 6, 2, router=router), steps=60, skew=0.5)
    torch.manual_seed(7)
    other = MoELayer(8, 8, 6, 2, router=router)
    other.load_state_dict(layer.state_dict())
    for steps in (0, 5):  # the same now, and after training on
        a, b = trained(layer, steps=steps), trained(other, steps=steps)
        x = torch.randn(20, 8)
        assert torch.equal(a(x).y_ND, b(x).y_ND)


_STATEFUL = ("sigmoid-bias", "load-aware", "centroid", "relu")


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
    for router in _STATEFUL:
        torch.manual_seed(0)
        made = Router(router, 8, 6, 2)
        torch.manual_seed(100 + rank)  # other rows on every rank
        for _ in range(60):
            made(torch.randn(32, 8) + rank)
            made.after_step()
        state = {name: value for name, value in made.state_dict().items() if "weight_" not in name}
        torch.save(state, Path(folder) / f"{router}.{rank}.pt")
    torch.distributed.destroy_process_group()


def test_router_state_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    for router in _STATEFUL:
        first, second = (torch.load(tmp_path / f"{router}.{rank}.pt", weights_only=True) for rank in (0, 1))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), router


# ------------------------------------------------------------------------------------------------ capacity


def test_bounded_capacity_serves_first_choices_and_counts_the_rest() -> None:
    layer = MoELayer(8, 8, 4, 1, capacity=CapacityConfig(factor=1.0))
    torch.nn.init.zeros_(layer.router.scores.weight_ED)
    x = torch.randn(40, 8)
    out = layer(x)
    kept = obvious_layer(layer, x[:10], Routing(*(t[:10] for t in out.routing[:3])))
    torch.testing.assert_close(out.y_ND[:10], kept)
    torch.testing.assert_close(out.y_ND[10:], layer.pool.always(x[10:]))
    assert out.overflow == pytest.approx(0.75)


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 40), num_experts=st.integers(1, 6), top_k=st.integers(1, 3), spares=st.integers(0, 6),
    factor=st.floats(0.3, 2.0), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_elastic_capacity_serves_is_the_dropless_result(
    num_rows: int, num_experts: int, top_k: int, spares: int, factor: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = MoELayer(4, 5, num_experts, min(top_k, num_experts), num_shared=0)
    torch.nn.init.normal_(layer.router.scores.weight_ED, std=3.0)
    x = torch.randn(num_rows, 4) + 1.0
    routing, _ = layer.router(x)
    capacity = ElasticCapacity(CapacityConfig(factor=factor, spares=spares))
    y = capacity.run(x, routing, layer.pool.block, num_experts)
    places = max(1, -(-int(factor * 1e6 * routing.expert_NK.numel()) // int(num_experts * 1e6)))
    counts = torch.bincount(routing.expert_NK.flatten(), minlength=num_experts)
    assert capacity.last.spares <= spares
    if counts.max() <= places or spares >= sum(-(-int(c - places) // places) for c in counts if c > places):
        assert capacity.last.served == 1.0
        torch.testing.assert_close(y, layer.pool(x, routing), rtol=1e-4, atol=1e-5)
    else:
        assert capacity.last.served < 1.0


def test_spares_come_under_load_and_go_back_when_it_is_over() -> None:
    layer = MoELayer(4, 5, 4, 1)
    capacity = ElasticCapacity(CapacityConfig(factor=1.0, spares=3, patience=3))

    def batch(experts: list[int]) -> int:
        expert = torch.tensor(experts).unsqueeze(1)
        capacity.run(
            torch.randn(len(experts), 4), Routing(expert, torch.ones(len(experts), 1), torch.empty(0)),
            layer.pool.block, 4,
        )  # fmt: skip
        return capacity.last.spares

    even, burst = [0, 1, 2, 3] * 4, [2] * 12 + [0, 1, 3, 0]
    assert batch(even) == 0
    assert batch(burst) == 2
    assert capacity.last.served == 1.0
    assert [batch(even) for _ in range(4)] == [2, 2, 0, 0]


# ------------------------------------------------------------------------------------------------ experts come and go


@pytest.mark.parametrize("router", ROUTERS)
def test_a_trained_layer_grows_without_a_change_of_its_function(router: str) -> None:
    torch.manual_seed(0)
    layer = trained(MoELayer(8, 8, 9, 3, router=router), steps=40).eval()
    for parameter in layer.router.scores.parameters():
        torch.nn.init.normal_(parameter)  # far from even
    x = torch.randn(50, 8)
    before = layer(x).y_ND
    assert layer.add(like=2) == 9
    assert layer.add(like=0, spec=ExpertSpec(hidden=3, kind="gelu")) == 10
    torch.testing.assert_close(layer(x).y_ND, before)
    layer.router.train()(x)
    layer.router.after_step()
    layer.eval()
    assert (layer(x).y_ND - before).abs().mean() < 0.02  # they come in little by little
    trained(layer, steps=260)
    chosen = set(layer(torch.randn(2000, 8)).routing.expert_NK.flatten().tolist())
    newcomers = {9, 10} & chosen
    assert newcomers == {9, 10} or (router == "relu" and newcomers)  # an L1 loss may close a gate for good


@pytest.mark.parametrize("router", ROUTERS)
def test_removing_an_expert_leaves_the_rest_as_they_were(router: str) -> None:
    torch.manual_seed(0)
    layer = trained(MoELayer(8, 8, 5, 2, router=router), steps=40).eval()
    x = torch.randn(50, 8)
    allowed = torch.tensor([True, True, False, True, True])
    expected, _ = layer.router(x, allowed)
    layer.remove(2)
    found = layer(x).routing
    renamed = torch.where(expected.expert_NK > 2, expected.expert_NK - 1, expected.expert_NK)
    num_slots = found.expert_NK.shape[1]  # ReLU has room for all; what is past it is empty now
    assert torch.equal(found.expert_NK, renamed[:, :num_slots])
    torch.testing.assert_close(found.gate_NK, expected.gate_NK[:, :num_slots])
    single = MoELayer(8, 8, 1, 1)
    with pytest.raises(ConfigError, match="last expert"):
        single.remove(0)


def test_a_grown_and_shrunk_layer_loads_into_a_fresh_one(tmp_path: Path) -> None:
    config = BackboneConfig(width=8, hidden=8, num_experts=4, router="sigmoid-bias")
    torch.manual_seed(0)
    backbone = Backbone(5, config)
    trained(backbone.layers[0])  # type: ignore[arg-type]
    backbone.layers[0].add(like=1, spec=ExpertSpec(hidden=3, columns=(0, 4)))  # type: ignore[operator]
    backbone.layers[1].remove(0)  # type: ignore[operator]
    backbone.layers[1].place(0, "cpu")  # type: ignore[operator]
    other = Backbone(5, config)
    load_weights(other, backbone.state_dict(), tmp_path)
    x = torch.randn(30, 5)
    assert torch.equal(backbone.eval()(x).y_ND, other.eval()(x).y_ND)
    assert [layer.num_experts for layer in other.layers] == [5, 3]  # type: ignore[union-attr, arg-type]


def test_frozen_experts_keep_their_weights_and_train_only_trains_nothing_else() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 8, 4, 2)
    layer.freeze([1])
    before = copy.deepcopy(layer.state_dict())
    trained(layer)
    after = layer.state_dict()
    assert torch.equal(before["pool.experts.1.w_in_DF"], after["pool.experts.1.w_in_DF"])
    assert not torch.equal(before["pool.experts.0.w_in_DF"], after["pool.experts.0.w_in_DF"])
    layer.train_only([3])
    before = copy.deepcopy(layer.state_dict())
    trained(layer)
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"pool.experts.3.w_in_DF", "pool.experts.3.w_out_HD"}


@pytest.mark.parametrize("router", ["softmax", "sigmoid-bias", "load-aware"])
def test_isolated_pre_training_touches_selected_experts_alone_and_fine_tuning_opens_all(router: str) -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 8, 6, 2, router=router)
    layer.isolate([1, 3, 4])  # the last call counts
    layer.isolate([0, 2, 5])
    before = copy.deepcopy(layer.state_dict())
    trained(layer, steps=300)
    changed = {e for e in range(6) if not torch.equal(layer.pool[e].w_in_DF, before[f"pool.experts.{e}.w_in_DF"])}
    assert changed == {0, 2, 5}
    x = torch.randn(200, 8)
    layer.eval()
    out = layer(x)
    assert set(out.routing.expert_NK.flatten().tolist()) == {0, 2, 5}
    layer.open_all()
    torch.testing.assert_close(layer(x).y_ND, out.y_ND)
    trained(layer, steps=260)
    assert set(layer.eval()(x).routing.expert_NK.flatten().tolist()) == set(range(6))
    load = torch.bincount(layer(x).routing.expert_NK.flatten(), minlength=6) / 400
    assert load[[0, 2, 5]].sum() > 0.25  # those that were trained first still have work
    with pytest.raises(InputError, match="a row needs 2"):
        layer.isolate([1])


def test_experts_that_no_row_chose_get_no_gradient_even_from_one_product() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 8, 6, 1, capacity=CapacityConfig(factor=6.0))
    torch.nn.init.zeros_(layer.router.scores.weight_ED)
    out = layer(torch.randn(30, 8))
    out.y_ND.sum().backward()
    assert all(layer.pool[e].w_in_DF.grad is not None for e in range(6))  # zeros
    layer.drop_unchosen_gradients()
    kept = {e for e in range(6) if layer.pool[e].w_in_DF.grad is not None}
    assert kept == set(out.routing.expert_NK.flatten().tolist())
    assert len(kept) == 1


def test_a_layer_with_fewer_open_experts_than_a_row_wants_chooses_those_alone() -> None:
    layer = MoELayer(8, 8, 2, 2).eval()
    layer.add(like=0)
    layer.remove(0)
    x = torch.randn(20, 8)
    routing = layer(x).routing
    assert set(routing.expert_NK.flatten().tolist()) == {0, -1}
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).y_ND, obvious_layer(layer, x, routing))


def test_a_change_that_bounded_capacity_does_not_take_leaves_the_layer_as_it_was() -> None:
    layer = MoELayer(8, 8, 4, 2, capacity=CapacityConfig(factor=4.0))
    x = torch.randn(20, 8)
    before = layer(x).y_ND
    for change in (
        lambda: layer.add(like=0, spec=ExpertSpec(hidden=3)),
        lambda: layer.replace(0, Expert(8, ExpertSpec(hidden=3))),
        lambda: layer.place(0, "cpu"),
    ):
        with pytest.raises(ConfigError, match="bounded capacity"):
            change()
    assert torch.equal(layer(x).y_ND, before)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_takes_the_shape_of_any_checkpoint(router: str) -> None:
    torch.manual_seed(0)
    small, large = MoELayer(8, 8, 4, 2, router=router).eval(), MoELayer(8, 8, 9, 2, router=router).eval()
    small.load_state_dict(large.state_dict())
    x = torch.randn(30, 8)
    assert torch.equal(small(x).y_ND, large(x).y_ND)


def test_a_replaced_expert_answers_for_the_same_rows() -> None:
    layer = MoELayer(8, 8, 4, 2).eval()
    x = torch.randn(30, 8)
    before = layer(x).routing
    new = Expert(8, ExpertSpec(hidden=3))
    layer.replace(1, new)
    out = layer(x)
    assert torch.equal(out.routing.expert_NK, before.expert_NK)
    torch.testing.assert_close(out.y_ND, obvious_layer(layer, x, out.routing))
    assert layer.pool[1] is new
    with pytest.raises(InputError, match="no expert 4; allowed are 0 to 3"):
        layer.freeze([4])


@pytest.mark.parametrize(
    "change",
    [{"kind": "relu"}, {"hidden": 0}, {"columns": (3, 3)}],
)
def test_an_impossible_expert_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ExpertSpec(**{"hidden": 4, **change})  # type: ignore[arg-type]


def test_mixed_experts_with_bounded_capacity_are_refused() -> None:
    with pytest.raises(ConfigError, match="bounded capacity"):
        MoELayer(6, 8, 4, 2, experts=SPECS, capacity=CapacityConfig())
    with pytest.raises(ConfigError, match=r"factor is 0\.0"):
        CapacityConfig(factor=0.0)
    with pytest.raises(ConfigError, match="router is 'best'; allowed are"):
        Router("best", 4, 4, 2)


# ------------------------------------------------------------------------------------------------ failing experts


class _Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _broken(*_: object) -> Tensor:
    raise RuntimeError("device lost")


@pytest.mark.parametrize("fault", ["raises", "not finite"])
def test_a_failing_expert_is_fenced_off_and_all_rows_are_answered(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    layer = trained(MoELayer(8, 8, 4, 2)).eval()
    clock, reports = _Clock(), []
    fences = layer.guard(clock=clock, retry_after_s=10.0, on_failure=lambda *report: reports.append(report))
    x = torch.randn(60, 8)
    healthy = layer(x)
    weights = copy.deepcopy(layer.pool[1].state_dict())
    if fault == "raises":
        hook = layer.pool[1].register_forward_pre_hook(_broken)
    else:
        torch.nn.init.constant_(layer.pool[1].w_out_HD, float("nan"))
    with caplog.at_level(logging.ERROR):
        out = layer(x)
    assert out.y_ND.isfinite().all()
    assert not (out.routing.expert_NK == 1).any()
    untouched = (healthy.routing.expert_NK != 1).all(dim=1)
    torch.testing.assert_close(out.y_ND[untouched], healthy.y_ND[untouched])
    torch.testing.assert_close(out.y_ND, obvious_layer(layer, x, out.routing))
    assert [fence.expert for fence in fences.fenced()] == [1]
    assert reports[0][:2] == ("moe", 1)
    assert ("device lost" if fault == "raises" else "not finite") in reports[0][2]
    assert "expert 1 failed" in caplog.text
    with pytest.raises(InputError, match="still"):
        layer.restore(1)
    clock.now_s = 11.0  # tried again, fails again, out for twice as long
    layer(x)
    assert fences.num_failures == 2
    assert fences.fenced()[0].wait_s == 20.0
    if fault == "raises":
        hook.remove()
    layer.restore(1, weights)
    assert not fences.fenced()
    assert torch.equal(layer(x).y_ND, healthy.y_ND)


def test_fences_follow_their_experts_and_guarded_layers_are_copied() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 8, 4, 2).eval()
    fences = layer.guard()
    layer.pool[3].w_out_HD.data.fill_(float("nan"))
    x = torch.randn(60, 8)
    layer(x)
    assert [fence.expert for fence in fences.fenced()] == [3]
    twin = copy.deepcopy(layer)
    layer.remove(0)
    assert [fence.expert for fence in fences.fenced()] == [2]
    assert layer(x).y_ND.isfinite().all()
    assert fences.num_failures == 1
    layer.remove(2)
    assert not fences.fenced()
    assert layer(x).y_ND.isfinite().all()
    assert layer.guard() is fences
    assert [fence.expert for fence in twin.fences.fenced()] == [3]  # type: ignore[union-attr]
    assert twin(x).y_ND.isfinite().all()


def test_a_shared_expert_has_no_substitute() -> None:
    layer = MoELayer(8, 8, 4, 2).eval()
    layer.guard()
    layer.pool[4].w_out_HD.data.fill_(float("nan"))
    with pytest.raises(WorkError, match="shared expert"):
        layer(torch.randn(5, 8))


def test_many_threads_serve_one_layer() -> None:
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    layer = MoELayer(8, 8, 6, 2).eval()
    x = torch.randn(20, 8)
    expected = layer(x).y_ND

    def serve(_: int) -> Tensor:
        with torch.inference_mode():
            return layer(x).y_ND

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(serve, range(64)))
    for y in answers:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    layer.pool[0].w_out_HD.data.zero_()
    torch.testing.assert_close(serve(0), layer(x).y_ND, rtol=1e-4, atol=1e-5)


def test_a_row_that_is_not_a_number_spoils_no_other_in_serving() -> None:
    layer = MoELayer(8, 8, 6, 2).eval()
    x = torch.randn(5, 8)
    clean = layer(x).y_ND
    x[2, 1] = float("nan")
    with torch.inference_mode():
        y = layer(x).y_ND
    torch.testing.assert_close(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]], rtol=1e-4, atol=1e-5)
    assert not y[2].isfinite().all()


def test_serving_fences_off_an_expert_whose_weights_went_bad() -> None:
    torch.manual_seed(0)
    layer = trained(MoELayer(8, 8, 4, 2)).eval()
    fences = layer.guard()
    x = torch.randn(60, 8)
    with torch.inference_mode():
        healthy = layer(x).y_ND
        weights = copy.deepcopy(layer.pool[1].state_dict())
        layer.pool[1].w_out_HD[0, 0] = float("inf")
        assert layer(x).y_ND.isfinite().all()
        assert [fence.expert for fence in fences.fenced()] == [1]
        layer.restore(1, weights)
        assert torch.equal(layer(x).y_ND, healthy)


def test_an_expert_that_recovers_is_back_after_its_time() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 8, 4, 2).eval()
    clock = _Clock()
    fences = layer.guard(clock=clock, retry_after_s=10.0)
    x = torch.randn(60, 8)
    healthy = layer(x).y_ND
    hook = layer.pool[2].register_forward_pre_hook(_broken)
    layer(x)
    hook.remove()
    clock.now_s = 5.0
    assert not torch.equal(layer(x).y_ND, healthy)
    clock.now_s = 11.0
    assert torch.equal(layer(x).y_ND, healthy)
    assert not fences.fenced()


def test_a_row_that_is_not_finite_fences_nobody_and_a_layer_without_experts_still_answers() -> None:
    layer = MoELayer(8, 8, 3, 2).eval()
    fences = layer.guard()
    x = torch.randn(4, 8)
    x[2, 3] = float("nan")
    assert layer(x).y_ND[[0, 1, 3]].isfinite().all()
    assert not fences.fenced()
    for e in range(3):
        torch.nn.init.constant_(layer.pool[e].w_out_HD, float("inf"))
    x = torch.randn(30, 8)
    torch.testing.assert_close(layer(x).y_ND, layer.pool.always(x))
    assert len(fences.fenced()) == 3


# ------------------------------------------------------------------------------------------------ instruments


def test_the_monitor_counts_what_routers_chose_and_warns_of_collapse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    backbone = Backbone(5, BackboneConfig(width=8, hidden=4, num_experts=4, num_blocks=2))
    collapsed = backbone.layers[1].router.scores.weight_ED  # type: ignore[union-attr]
    with torch.no_grad():
        collapsed.zero_()  # type: ignore[operator]
    with caplog.at_level(logging.WARNING), RoutingMonitor(backbone) as monitor:
        for _ in range(3):
            for _ in range(4):
                backbone(torch.randn(64, 5))
            numbers = monitor.metrics()
        backbone.eval()(torch.randn(64, 5))
        assert monitor.metrics() == {}  # serving is not training
    assert numbers["moe.layers.0.utilisation"] > 0.7
    assert sum(numbers[f"moe.layers.0.load.{e}"] for e in range(4)) == pytest.approx(1.0)
    assert numbers["moe.layers.0.overflow"] == 0.0
    assert numbers["moe.layers.1.utilisation"] == pytest.approx(0.5)
    assert numbers["moe.layers.1.entropy"] == pytest.approx(1.0)
    assert numbers["moe.layers.1.choices"] == 2.0
    assert all(isinstance(report, LayerReport) for report in monitor.history["layers.0"])
    monitor.plot(tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 10_000
    with caplog.at_level(logging.WARNING), RoutingMonitor(backbone.train()) as monitor, torch.no_grad():
        for layer in backbone.layers:
            layer.router.scores.weight_ED[0] = 100.0  # type: ignore[union-attr, operator, index]
            layer.router.scores.top_k = 1  # type: ignore[union-attr, assignment]
        for reports, warned in ((1, 0), (2, 2), (3, 2)):  # not at once, and once a layer
            backbone(torch.full((64, 5), 1.0))
            monitor.metrics()
            assert caplog.text.count("experts collapse") == warned, reports
    assert caplog.text.count("experts collapse") == 2


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_on_a_gpu_gives_what_it_gives_on_a_cpu(router: str) -> None:
    torch.manual_seed(0)
    here = trained(MoELayer(32, 16, 6, 2, router=router), steps=10)
    there = copy.deepcopy(here).cuda()
    x = torch.randn(200, 32)
    for layer, rows in ((here, x.clone().requires_grad_()), (there, x.cuda().requires_grad_())):
        layer.zero_grad()
        out = layer(rows)
        (out.y_ND.square().mean() + out.balance_loss).backward()
        layer.router.after_step()
    for (name, a), (_, b) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None or not b.grad.any(), name
        else:
            torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-5, msg=name)
    for (name, a), (_, b) in zip(here.named_buffers(), there.named_buffers(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-4, msg=name)
    with torch.inference_mode():
        torch.testing.assert_close(there.eval()(x.cuda()).y_ND.cpu(), here.eval()(x).y_ND, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_experts_live_on_different_devices_and_capacity_is_bounded_on_a_gpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = MoELayer(32, 16, 6, 2).cuda()
    x = torch.randn(100, 32, device="cuda")
    expected = layer(x).y_ND
    layer.capacity = ElasticCapacity(CapacityConfig(factor=6.0))
    torch.testing.assert_close(layer(x).y_ND, expected, rtol=1e-3, atol=1e-4)
    layer.capacity = None
    layer.place(2, "cpu")
    y = layer(x).y_ND
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    y.square().mean().backward()
    assert layer.pool[2].w_in_DF.grad is not None
    assert layer.pool[2].w_in_DF.grad.device.type == "cpu"
    other = MoELayer(32, 16, 6, 2)
    load_weights(other, layer.state_dict(), tmp_path)
    torch.testing.assert_close(other(x.cpu()).y_ND, expected.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", [{"width": 0}, {"top_k": 9}, {"dropout": 1.0}, {"router": "x"}, {"num_shared": -1}])
def test_an_impossible_shape_is_refused_by_name(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        BackboneConfig(**change)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.sampled_from(["softmax", "sigmoid-bias"]), st.integers(1, 4), st.integers(0, 1),
    st.integers(0, 1000),
)  # fmt: skip
def test_the_compiled_layer_has_the_gradients_of_the_eager_one(
    num_rows: int, router: str, top_k: int, num_shared: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = MoELayer(16, 8, 4, top_k, router=router, num_shared=num_shared).eval().requires_grad_(False)
    layer.router.scores.weight_ED.mul_(20.0)  # choices that are clear
    x, weight = torch.randn(num_rows, 16), torch.randn(num_rows, 16)
    found = {}
    for name, compiled in (("compiled", None), ("eager", False)):
        layer._compiled = compiled
        leaf = x.clone().requires_grad_(True)
        y = layer(leaf).y_ND
        found[name] = y.detach(), *torch.autograd.grad((y * weight).sum(), leaf)
        assert bool(layer._compiled) == (name == "compiled")
    for ours, expected in zip(found["compiled"], found["eager"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_learn_get_their_gradients_outside_of_training_too() -> None:
    layer = MoELayer(16, 8, 4, 2).eval()
    with torch.no_grad():
        layer(torch.randn(3, 16))  # prepares the compiled form
    layer(torch.randn(3, 16)).y_ND.sum().backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum()) for p in layer.pool.parameters())
