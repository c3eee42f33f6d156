"""The training loop keeps the best weights and can be stopped."""

import pytest
import torch
from assay_platform.errors import ConfigError
from assay_platform.training import StopTraining, TrainConfig, fit


def run(metrics: list[float], *, patience: int = 10, stop_at: int = 0) -> tuple[torch.nn.Linear, object, list[float]]:
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1)
    weights: list[float] = []

    def evaluate() -> float:
        weights.append(net.weight[0, 0].item())
        return metrics[len(weights) - 1]

    def on_epoch(epoch: int, _: float) -> None:
        if epoch == stop_at:
            raise StopTraining

    result = fit(
        net,
        batches=lambda _: [torch.ones(4, 2)] * 3,
        num_batches=3,
        loss=lambda x: net(x).square().mean(),
        evaluate=evaluate,
        config=TrainConfig(num_epochs=len(metrics), patience=patience),
        on_epoch=on_epoch,
    )
    return net, result, weights


def test_the_best_epoch_is_restored() -> None:
    net, result, weights = run([0.1, 0.9, 0.2])
    assert result.best_epoch == 2  # type: ignore[attr-defined]
    assert net.weight[0, 0].item() == weights[1]


def test_patience_ends_training_early() -> None:
    _, result, _ = run([0.9, 0.1, 0.1, 0.1, 0.1], patience=2)
    assert len(result.history) == 3  # type: ignore[attr-defined]


def test_a_stop_signal_keeps_what_was_learned() -> None:
    net, _, weights = run([0.1, 0.2, 0.3], stop_at=2)
    assert net.weight[0, 0].item() == weights[1]


def test_a_wrong_learning_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainConfig(learning_rate=0.0)


class _Two(torch.nn.Module):
    """Two 'experts', of which a batch chooses some, and a follower of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)])
        self.steps = 0

    def after_step(self) -> None:
        self.steps += 1


def _trained(isolated_fraction: float, chosen: list[list[int]]) -> _Two:
    net = _Two()

    def loss(experts: list[int]) -> torch.Tensor:
        return torch.stack([net.experts[e].square().sum() for e in experts]).sum()

    fit(
        net,
        batches=lambda _: chosen,
        num_batches=len(chosen),
        loss=loss,
        evaluate=None,
        config=TrainConfig(num_epochs=1, learning_rate=0.1, isolated_fraction=isolated_fraction),
    )
    assert net.steps == len(chosen)
    return net


def test_isolated_training_leaves_what_was_not_chosen_alone() -> None:
    net = _trained(1.0, [[0], [0], [0]])
    assert torch.equal(net.experts[1], torch.ones(2, 2))
    assert not torch.equal(net.experts[0], torch.ones(2, 2))
    everything = _trained(0.0, [[0], [0], [0]])
    assert not torch.equal(everything.experts[1], torch.ones(2, 2))  # weight decay takes every step
    opened = _trained(0.5, [[0], [0], [0], [0]])
    assert not torch.equal(opened.experts[1], torch.ones(2, 2))


def test_isolated_training_is_exactly_the_same_where_all_are_chosen() -> None:
    a, b = _trained(1.0, [[0, 1], [1, 0], [0, 1]]), _trained(0.0, [[0, 1], [1, 0], [0, 1]])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_an_isolated_fraction_beyond_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"isolated_fraction is 1\.5"):
        TrainConfig(isolated_fraction=1.5)
