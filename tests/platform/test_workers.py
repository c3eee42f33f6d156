"""Workers that train together: their shares, their cores, the loss of one of them."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from assay_platform.errors import ConfigError, WorkError
from assay_platform.training import ALONE, Checkpoint, Ranks, TrainConfig, Workers, fit
from assay_platform.training.workers import _check_lost, cores_each
from torch import Tensor


def test_shares_are_all_rows_once() -> None:
    for num_rows in (3, 7, 100):
        rows = [n for number in range(3) for n in range(num_rows)[Ranks(number, 3).share(num_rows)]]
        assert rows == list(range(num_rows))
    assert range(5)[ALONE.share(5)] == range(5)
    with pytest.raises(ConfigError, match="2 rows cannot be divided among 3 workers"):
        Ranks(0, 3).share(2)


@pytest.mark.parametrize(
    ("nodes", "num_workers", "expected"),
    [([2], 2, 1), ([2], 1, 2), ([16, 16], 2, 16), ([16, 16], 3, 8), ([2, 6], 2, 3), ([0, 4], 4, 1)],
)
def test_cores_are_shared_as_far_as_nodes_can_hold(nodes: list[int], num_workers: int, expected: int) -> None:
    assert cores_each(nodes, num_workers) == expected


def test_a_cluster_that_is_too_small_is_named() -> None:
    with pytest.raises(ConfigError, match="5 workers need a core each; the cluster has 4"):
        cores_each([2, 2], 5)


# -------------------------------------------------------------------------------------------------- on Ray


def line(rows: Tensor, killed: Path, on_epoch: Any, checkpoint: Checkpoint | None, ranks: Ranks = ALONE) -> Any:
    """A line through points; the second worker dies once, where `killed` does not exist."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(rows.shape[1], 1))
    generator = torch.Generator().manual_seed(1)

    def wrong(part: Tensor) -> Tensor:
        error: Tensor = (net(rows[part]).squeeze(1) - rows[part].sum(1)).square().sum()
        return error

    def done(epoch: int, metric: float) -> None:
        on_epoch(epoch, metric)
        if epoch == 3 and ranks.number == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return net, fit(
        net,
        batches=lambda _: torch.randperm(len(rows), generator=generator).split(16),
        num_batches=len(rows) // 16,
        loss=lambda part: wrong(part[ranks.share(len(part))]) / len(part),
        evaluate=lambda: -float(wrong(torch.arange(len(rows))).detach()),
        config=TrainConfig(num_epochs=6, learning_rate=0.1),
        on_epoch=done,
        checkpoint=checkpoint,
        generators=[generator],
        ranks=ranks,
    )


def failing(data: int, on_epoch: Any, checkpoint: Any, ranks: Ranks) -> None:
    raise ValueError(f"{data} is not a table")


class LostError(Exception):
    """As Ray's kinds are told: by the module that they are of."""

    __module__ = "ray.train"


def test_what_the_training_itself_fails_with_is_not_taken_for_a_loss() -> None:
    for causes in (
        [LostError()],
        [RuntimeError("connection closed"), LostError()],
        [RuntimeError("connection closed")],
    ):
        _check_lost(causes, 2)
    with pytest.raises(WorkError, match="RuntimeError: out of memory"):
        _check_lost([RuntimeError("out of memory"), RuntimeError("out of memory")], 2)
    with pytest.raises(WorkError, match="KeyError"):
        _check_lost([KeyError("x"), LostError()], 2)
    with pytest.raises(ConfigError, match="two rows"):
        _check_lost([RuntimeError("connection closed"), ConfigError("two rows")], 2)


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_training_goes_on_when_a_worker_dies(ray_session: str, tmp_path: Path) -> None:
    rows, killed = torch.randn(64, 4, generator=torch.Generator().manual_seed(2)), tmp_path / "killed"
    workers, told = Workers(num=2, folder=tmp_path / "training"), []
    net, result = workers.train(line, {"rows": rows, "killed": killed}, on_epoch=lambda *epoch: told.append(epoch))
    expected, of_one = line(rows, killed, lambda *_: None, None)
    assert killed.exists()
    assert result.history == pytest.approx(of_one.history, rel=1e-4)
    assert [epoch for epoch, _ in told] == [1, 2, 3, 4, 5, 6], "none was trained twice"
    for weight, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other)
    assert not list((tmp_path / "training").iterdir()), "nothing is left behind"
    with pytest.raises(WorkError, match="failed: ValueError: 7 is not a table"):
        workers.train(failing, {"data": 7})
    with pytest.raises(ConfigError, match="the cluster has 2"):
        replace(workers, num=3).train(line, {"rows": rows, "killed": killed})
