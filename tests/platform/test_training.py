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
